"""Data sets of the Hugging Face hub by name: their parquet shards, in the hub's cache.

    hub:OWNER/NAME@REVISION:FILES

where the revision and the files may be left out. FILES is a pattern of paths in the repository.
"""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffussm_cli.config import HUB
from diffussm_cli.data.listing.splits import refuse_gaps, split_folder, split_of
from diffussm_cli.errors import DataError, reason
from diffussm_cli.machine.hub import HUB_NAME, quiet, root_cause

NAME = re.compile(rf"{HUB}({HUB_NAME})(?:@(\w[\w./-]*))?(?::(.+))?")
CONVERTED = "refs/convert/parquet"  # where the hub keeps sets of other formats as parquet


class Shards(NamedTuple):
    """Shards in the hub's cache."""

    pattern: Path  # of their files
    name: str  # with the revision and the files, so that it always means the same shards


def fetch_shards(path: str) -> Shards:
    """Fetch the shards of a data set; those of the split train, if it has splits and no FILES are
    named.

    Raises:
        DataError: for a name that is none, a set that cannot be reached and is not in the cache,
            and for one without parquet shards, or with several sets of them.
    """
    import huggingface_hub as hub

    match = NAME.fullmatch(path)
    if match is None:
        raise DataError(f"{path!r} must read {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION:FILES")
    repository, revision, files = match.groups()

    # The files at a revision: of the hub, or else of its cache.
    folder = None
    try:
        with quiet():
            info = hub.HfApi().dataset_info(repository, revision=revision)
        commit = info.sha or ""
        names = [s.rfilename for s in info.siblings or ()]
    except Exception as e:  # the hub's client raises errors of several HTTP libraries
        try:
            folder = Path(
                hub.snapshot_download(
                    repository, repo_type="dataset", revision=revision, local_files_only=True
                )
            )
        except Exception:
            raise DataError(
                f"the data set {path!r} cannot be fetched from the hub: check its name and the "
                f"network, or download it and give the folder ({reason(root_cause(e))})"
            ) from e
        commit = folder.name
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]

    # The shards, and their files.
    begin = f"{HUB}{repository}@{commit}"
    pattern = choose_shards(sorted(names), files, f"{HUB}{repository}@{revision or commit}")
    if folder is None:
        try:
            with quiet():
                folder = Path(
                    hub.snapshot_download(
                        repository,
                        repo_type="dataset",
                        revision=commit,
                        allow_patterns=[pattern],
                    )
                )
        except Exception as e:
            raise DataError(f"{path!r} cannot be fetched: {reason(root_cause(e))}") from e
    return Shards(folder / pattern, f"{begin}:{pattern}")


def choose_shards(names: Sequence[str], files: str | None, begin: str) -> str:
    """A pattern of the shards to read, among the files of a repository.

    Args:
        files: the pattern that the user has named, if any.
        begin: what stands before FILES in an error.

    Raises:
        DataError: if no shards fit, or several splits or folders do and none is the training set,
            or some of a series are missing.
    """
    shards = [name for name in names if name.endswith(".parquet")]
    if files is not None:
        if not fnmatch.filter(shards, files):
            has = ", ".join(shards[:3]) or "none"
            raise DataError(f"'{begin}:{files}' fits no parquet file of the set; it has {has:.200}")
        return files

    if not shards:
        name = begin.partition("@")[0]
        raise DataError(
            f"{begin!r} holds no parquet files; the hub keeps most sets as parquet too: "
            f"{name}@{CONVERTED}"
        )

    # The split of each shard: told by its name, as train-00000-of-00004, or by its folder.
    splits: dict[str, set[str]] = {}
    for name in shards:
        folder, _, leaf = name.rpartition("/")
        split, pattern = split_of(leaf)
        if not split and split_folder(folder.rpartition("/")[2]):
            split = split_folder(folder.rpartition("/")[2])
        prefix = f"{folder}/" if folder else ""
        splits.setdefault(split, set()).add(prefix + (pattern or "*.parquet"))

    chosen = (
        splits.get("train") or splits.get("", set()) if len(splits) > 1 else splits[min(splits)]
    )
    if len(chosen) != 1:
        several = sorted(chosen or {p for patterns in splits.values() for p in patterns})
        some = ", ".join(f"'{begin}:{pattern}'" for pattern in several[:3])
        raise DataError(f"the set has {len(several)} parts; choose one: {some}")
    pattern = next(iter(chosen))
    refuse_gaps(fnmatch.filter(shards, pattern), f"{begin}:")  # the cache may hold some of them
    return pattern
