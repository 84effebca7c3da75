"""Read, check and write files of weights, only safetensors; and the folders of finished weights."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.errors import RunError, reason
from diffussm_cli.machine.files import PARTIAL, whole_file, write_text
from diffussm_cli.machine.tensors import NOT_FINITE, first_not_finite
from diffussm_cli.machine.tensors import write as write_file
from diffussm_cli.runs.checkpoints import whole_folder
from diffussm_cli.runs.layout import METRICS, MODEL
from diffussm_cli.runs.metadata import write_config, write_state

DTYPES = {  # of weights, with their names in safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
ANOTHER_COPY = "take another copy of the file, or another checkpoint"


def check_weights_match(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path
) -> None:
    """Raises RunError if names or shapes of weights differ from a model's own, or if values are not
    finite.
    """
    wrong = [k for k in expected if k not in weights] + [k for k in weights if k not in expected]
    if wrong:
        raise RunError(f"{path}: weights of another model: {wrong[0]} is in only one of the two")

    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise RunError(f"{path}: weights of another model: {name} is {shapes}")
        if weights[name].dtype not in DTYPES:
            raise RunError(
                f"{path}: damaged: {name} holds {weights[name].dtype}, not floating-point numbers"
            )

    not_finite = first_not_finite(weights)
    if not_finite is not None:
        raise RunError(f"{path}: damaged: {not_finite} {NOT_FINITE}; {ANOTHER_COPY}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, on the CPU. Raises RunError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise RunError(f"{path}: cannot be read: {reason(e)}") from e


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write tensors of any device to a safetensors file; returns its sha256, computed while
    writing.

    Raises:
        RunError: if a number is not finite; nothing is written then.
        OSError: if the file cannot be written.
    """
    not_finite = first_not_finite(tensors)
    if not_finite is not None:
        raise RunError(f"{path.parent.name.removeprefix(PARTIAL)}: {not_finite} {NOT_FINITE}")

    # so that all are aligned
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    layout = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in ordered}
    buffers = (t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in ordered)
    with path.open("wb") as file:
        return write_file(file, layout, buffers, {"format": "pt"})


def write_weights(
    path: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    step: int,
    metrics: Mapping[str, Any] | None = None,
    further: Mapping[str, Mapping[str, Tensor]] | None = None,
    others: Mapping[str, bytes] | None = None,
    beside: bool = False,
) -> None:
    """Write `final/` or `best/`: weights, `further` averages by file, configuration, metrics, and
    `others` by file.

    Args:
        beside: write into a folder that exists and keep what else it holds. By default the folder
            is replaced in one piece, once everything is written.

    Raises:
        RunError: if the folder cannot be written.
        OSError: the same with `beside`.
    """
    with contextlib.nullcontext(path) if beside else whole_folder(path) as folder:
        files = {MODEL: weights, **(further or {})}
        hashes = {name: write_tensors(content, folder / name) for name, content in files.items()}
        write_config(folder, config)
        if metrics is not None:
            write_text(folder / METRICS, json.dumps(metrics) + "\n")

        for name, content in (others or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            with whole_file(folder / name) as file:
                file.write(content)

        # the hashes come last: with them, the folder is complete
        write_state(folder, {"step": step, "sha256": hashes})
