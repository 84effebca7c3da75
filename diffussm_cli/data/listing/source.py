"""Lists a source: a folder, one shard, or a pattern of names in a folder."""

import fnmatch
import os
import re
from collections.abc import Mapping
from pathlib import Path

from diffussm_cli.config import HUB
from diffussm_cli.data.cifar import kind_of_file
from diffussm_cli.data.images import SUFFIXES
from diffussm_cli.data.listing.entries import Listing
from diffussm_cli.data.listing.folders import list_folder
from diffussm_cli.data.listing.hub import fetch_shards
from diffussm_cli.data.listing.left_out import (
    COMPRESSED,
    KINDS,
    SHARDS,
    left_out_line,
    unpacking,
)
from diffussm_cli.errors import DataError

BRACES = r"\{.*?\}"  # as webdataset writes a series of shards: {000..010}


def list_source(source: Path, option: str = "SOURCE", columns: Mapping[str, str] = {}) -> Listing:
    """List a folder, one file of images, a pattern of names in a folder, or a data set of the hub.
    No image is decoded.

    Args:
        columns: names of columns of parquet shards, or of arrays of .npz files, from
            `named_columns`; the others are found by their usual names.

    Raises:
        DataError: if the source is missing, unreadable, holds several splits of a data set, lacks
            shards of a series, or holds no images.
    """
    try:
        if str(source).startswith(HUB):
            source = fetch_shards(str(source)).pattern
        root, names = _names_in(source)
        listing = list_folder(root, names, columns, not os.path.isdir(source))
    except DataError as e:
        raise DataError(f"{option}: {e}") from e

    if not listing.entries:
        looked_for = ", ".join((*SUFFIXES, *SHARDS, ".npz"))
        rest = left_out_line(source, listing.left_out())
        packed = [name for name, _ in listing.ignored if name.lower().endswith(COMPRESSED)]
        remedy = unpacking(listing.root / packed[0]) if packed else ""
        raise DataError(
            f"{option}: no images in {str(source)!r} (looked for {looked_for}){rest and '; '}{rest}"
            f"{remedy and f'; unpack{remedy}'}"
        )

    if columns and not listing.columns:
        named = ", ".join(columns.values())
        raise DataError(
            f"{option}: the columns {named} are named, but {str(source)!r} holds no parquet shards "
            "or .npz files"
        )
    return listing


def _names_in(source: Path) -> tuple[Path, list[str]]:
    """The folder of a source, and the names in it that were asked for, sorted."""
    is_folder = os.path.isdir(source)
    root = source if is_folder or not source.name else source.parent
    if not is_folder and os.path.exists(source):
        return root, [_single_file(source)]

    # A folder, or a pattern of names in it.
    pattern = not is_folder and bool(re.search(r"[*?\[]", source.name))
    try:
        names = sorted(os.listdir(root if is_folder or pattern else source))
    except OSError as e:
        hint = ""
        if re.search(r"[*?]", str(root)):
            hint = "; a pattern may stand in the last part of a path only"
        elif re.search(BRACES, source.name):
            hint = f"; braces are not read, but a star is: {re.sub(BRACES, '*', source.name)!r}"
        raise DataError(
            f"cannot read the folder {str(root if pattern else source)!r}: {e.strerror}{hint}"
        ) from e

    if pattern:
        names = fnmatch.filter(names, source.name)
        if not names:
            raise DataError(
                f"no images in {str(source)!r}: the pattern fits no name in {str(root)!r}"
            )
    return root, names


def _single_file(source: Path) -> str:
    """The name of a file that holds images. Raises DataError for any other."""
    is_known = source.suffix.lower() in (*SHARDS, ".npz") or kind_of_file(source) is not None
    if not is_known:
        what = next(
            (why for ends, why in KINDS.items() if source.name.lower().endswith(ends)), "a file"
        )
        how = unpacking(source)
        raise DataError(
            f"{str(source)!r} is {what}{how}; give a folder, or a .tar, .parquet or .npz file"
        )
    if not os.path.isfile(source):
        raise DataError(f"{str(source)!r} is not a regular file")
    return source.name
