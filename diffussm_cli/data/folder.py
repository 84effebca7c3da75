"""A folder of images as a source of training: every read decodes the files."""

import contextlib
import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.data.captions import read_captions
from diffussm_cli.data.images import coins, is_grey, to_model_space
from diffussm_cli.data.listing import (
    UNREADABLE,
    LeftOut,
    Listing,
    left_out_line,
    list_source,
    read_entry,
)
from diffussm_cli.data.text import Captioned
from diffussm_cli.errors import DataError
from diffussm_cli.events import Event, Progress
from diffussm_cli.machine.device import Helpers
from diffussm_cli.machine.processes import World, gather, own_cores

LOOKED_AT = 10  # images that tell whether a folder has colours
AT_ONCE = 256  # images that are handed to the threads at a time


class ImageFolder(Captioned):
    """A training source over a folder of images in any layout of `list_source`; every read decodes
    the files.
    """

    def __init__(
        self,
        root: Path,
        size: tuple[int, int],
        channels: int,
        flip: bool = False,
        columns: Mapping[str, str] = {},
        listing: Listing | None = None,
    ):
        if channels not in (1, 3):
            raise DataError(f"data.channels: {channels} must be 1 or 3 for a folder of images")
        self.size, self.channels, self.flip = size, channels, flip
        self.listing = listing or list_source(root, "data.path", columns)
        self.entries = self.listing.entries
        self.class_names = self.listing.class_names
        self._pool = Helpers(min(8, own_cores()))
        self._unused_captions: list[LeftOut] = []

    def in_colour(self) -> bool:
        """Whether a few images at equal distances, as they are in the files, show a colour."""
        n = len(self.entries)
        for place in sorted({i * (n - 1) // (LOOKED_AT - 1) for i in range(LOOKED_AT)}):
            # one that cannot be read is told elsewhere
            with contextlib.suppress(DataError):
                if not is_grey(read_entry(self.listing.root, self.entries[place], None)):
                    return True
        return False

    @property
    def left_out(self) -> str:
        """One line that counts what is not used of the folder, with the reasons; empty if
        everything is.
        """
        parts = self.listing.left_out(with_text=self.texts is not None)
        return left_out_line(self.listing.root, [*parts, *self._unused_captions])

    @property
    def labels(self) -> list[int]:
        """The label of each image."""
        return [e.label for e in self.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def read(
        self, indices: Sequence[int], generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.stack(list(self._pool.map(self._decode, indices)))).permute(
            0, 3, 1, 2
        )
        labels = torch.tensor([self.entries[i].label for i in indices])
        return to_model_space(images, coins(self.flip, generators)), labels

    def _decode(self, i: int) -> np.ndarray:
        return read_entry(self.listing.root, self.entries[i], self.size, self.channels)

    def captions_of(self, i: int) -> tuple[str, ...]:
        return self._captions.get(self.name_of(i), ())

    def name_of(self, i: int) -> str:
        return self.entries[i].name

    @functools.cached_property
    def _captions(self) -> dict[str, tuple[str, ...]]:
        return read_captions(self.listing, left_out=self._unused_captions)

    def check(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[int, str]]]:
        """Decode images once; yields the number of images in each block, and the reason of each
        failure by index.
        """
        for start in range(0, len(indices), AT_ONCE):
            block = indices[start : start + AT_ONCE]
            yield (
                len(block),
                {
                    i: reason
                    for i, reason in zip(block, self._pool.map(self._reason, block))
                    if reason
                },
            )

    def _reason(self, i: int) -> str | None:
        try:
            self._decode(i)
        except DataError as e:
            return str(e).removeprefix(f"{Path(self.entries[i].name)}: ")
        return None

    def leave_out(self, names: Mapping[int, str]) -> None:
        """Remove images from the source, each given by its index and name.

        Raises:
            DataError: if the image at an index has another name, or a class is left without images.
        """
        for i, name in names.items():
            if not 0 <= i < len(self.listing.entries) or self.listing.entries[i].name != name:
                raise DataError(
                    f"data.path: image {i} of {str(self.listing.root)!r} is no longer {name!r}"
                )
        self.entries = [e for i, e in enumerate(self.listing.entries) if i not in names]
        lost = {e.label for e in self.listing.entries} - {e.label for e in self.entries}
        for label in lost:
            folder = self.listing.root / (self.class_names[label] if self.class_names else "")
            raise DataError(f"data.path: {str(folder)!r} holds no readable images")


def unreadable_images(
    source: ImageFolder, world: World
) -> Generator[Event, None, list[tuple[int | None, str, str]]]:
    """Decode every image once, by all processes together.

    Returns:
        index, name and reason of every image that cannot be read; the index is None if it was not
        even listed.
    """
    places = range(world.rank, len(source), world.size)
    reasons: dict[int, str] = {}
    done = 0
    yield Progress(0, len(places), "checking images")
    for checked, failures in source.check(places):
        done += checked
        reasons |= failures
        yield Progress(done, len(places), "checking images")

    for failures in gather(reasons, world):
        reasons |= failures
    decoded: list[tuple[int | None, str, str]] = [
        (i, source.entries[i].name, reasons[i]) for i in sorted(reasons)
    ]
    return decoded + [
        (None, name, why) for name, why in source.listing.ignored if why.startswith(UNREADABLE)
    ]
