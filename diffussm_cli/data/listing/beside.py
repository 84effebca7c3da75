"""What `diffussm sample` writes beside images, which is no image of the set."""

from collections.abc import Collection, Sequence

from diffussm_cli.data.images import GRID
from diffussm_cli.data.listing.entries import Entry
from diffussm_cli.data.listing.left_out import OURS
from diffussm_cli.data.samples import is_image_name


def without_overviews(
    entries: Sequence[Entry], ignored: list[tuple[str, str]], samples: Collection[str] = ()
) -> list[Entry]:
    """The images without the grids and films that `diffussm sample` writes beside them; these are
    added to `ignored`.

    Args:
        samples: folders of which a meta.json says that they hold samples. Elsewhere, only a grid
            is known, beside images that all have the names of samples.
    """
    others: dict[str, set[str]] = {}  # names of a folder that no sample has
    named: set[str] = set()  # folders with names that samples have
    for entry in entries:
        folder, _, leaf = entry.name.rpartition("/")
        if is_image_name(leaf):
            named.add(folder)
        else:
            others.setdefault(folder, set()).add(leaf)

    ours = {f for f, leaves in others.items() if f in samples or (f in named and leaves == {GRID})}
    kept = []
    for entry in entries:
        folder, _, leaf = entry.name.rpartition("/")
        if folder in ours and not is_image_name(leaf):
            ignored.append((entry.name, OURS))
        else:
            kept.append(entry)
    return kept
