"""safetensors files in the order of the caller: written in one pass, and mapped into memory; and
whether tensors are finite.

The package safetensors sorts tensors by itself, and copies each row that is asked for, which takes
three times as long as a row of a memory map.
"""

import hashlib
import json
import math
import mmap
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.machine.files import open_regular

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}  # of a number
ARRAYS: dict[str, np.dtype] = {  # of mapped tensors
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
}

NOT_FINITE = "holds numbers that are not finite"  # what errors say of a tensor

# Tensors by name, in the order of the file: the dtype as safetensors spells it, and the shape.
Layout = Mapping[str, tuple[str, Sequence[int]]]


def header(layout: Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    """Everything in a file before its tensors.

    Args:
        metadata: what the file says about itself; accelerate wants weights to have the format `pt`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in layout.items():
        start = end
        end += BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}

    # The length of the text is a multiple of 8, so that the tensors are aligned.
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(layout: Layout) -> int:
    """The number of bytes of a file without metadata."""
    numbers = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in layout.values())
    return len(header(layout)) + numbers


def write(
    file: BinaryIO, layout: Layout, parts: Iterable[Any], metadata: Mapping[str, str] | None = None
) -> str:
    """Write the header and the bytes of each tensor, in the order of the layout.

    Args:
        parts: the tensors as buffers, taken one after another, so that not all must be in memory.

    Returns:
        The sha256 of the file.
    """
    digest = hashlib.sha256()

    def put(part: Any) -> None:
        digest.update(part)
        file.write(part)

    put(header(layout, metadata))
    for part in parts:
        put(part)
    return digest.hexdigest()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinite numbers; None if all are finite."""
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite: exactly if the least and the greatest are.

    NaN is least and greatest if there is one. This needs no memory, and a thirtieth of the time of
    `isfinite().all()` on a CPU.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def map_file(path: Path, layout: Layout) -> dict[str, np.ndarray]:
    """Read-only views of the tensors of a file in its memory map.

    Only the pages that are read use memory.

    Raises:
        ValueError: if the file has another header or size than its layout.
        OSError: if it cannot be opened.
    """
    expected = header(layout)
    with open_regular(path) as file:
        if file.read(len(expected)) != expected:
            raise ValueError("its header differs from that of its layout")
        keep_no_handle: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **keep_no_handle)
    if len(data) != file_size(layout):
        raise ValueError(f"{len(data):,} bytes are not the size of its layout")
    if hasattr(mmap, "MADV_RANDOM"):
        data.madvise(mmap.MADV_RANDOM)  # no read-ahead: the next image is elsewhere

    views = {}
    start = len(expected)
    for name, (dtype, shape) in layout.items():
        views[name] = np.frombuffer(data, np.dtype(ARRAYS[dtype]), math.prod(shape), start).reshape(
            shape
        )
        start += views[name].nbytes
    return views
