"""What a run folder holds, how it is written so that a kill leaves it whole, and how a trained model is read from it.

RUN/config.yaml                      the resolved configuration
RUN/metrics.jsonl, RUN/tensorboard/  records of the training loop
RUN/samples/step-*.png               previews
RUN/checkpoints/step-*/              model, ema, optimizer (.safetensors), state.json
RUN/final/                           model.safetensors (averaged weights) and config.yaml: all that sampling needs
RUN/best/                            the same of the step of the lowest FID, with metrics.json
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffussm_cli import published
from diffussm_cli.config import Config, config_from_dict, parse_yaml, read_text, to_yaml
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.files import PARTIAL, sha256, sync
from diffussm_cli.model import build_model

CONFIG, STATE, MODEL, METRICS = "config.yaml", "state.json", "model.safetensors", "metrics.json"
EMA, OPTIMIZER = "ema.safetensors", "optimizer.safetensors"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainedRun:
    """A run that can be sampled: its configuration and the file of its averaged weights."""

    root: Path
    config: Config
    weights: Path
    step: int | None  # None when training has finished

    @property
    def label(self) -> str:
        return f"{self.root} (finished)" if self.step is None else f"{self.root} (step {self.step})"


# ------------------------------------------------------------------------------------------------- reading
def find_run(path: Path) -> TrainedRun:
    """The averaged weights under a run folder, its `final/` or `best/`, a checkpoint, or a published DiT's .pt file.

    Raises:
        RunError: if there is none.
    """
    if path.suffix == published.SUFFIX and path.is_file():
        return TrainedRun(path.with_suffix(""), published.published_config(path), path, None)
    if not path.is_dir():
        raise RunError(f"RUN: no folder {str(path)!r}; train one with: diffussm train --out {path}")
    if (path / CONFIG).is_file() and (path / MODEL).is_file():  # final/ or best/ itself, perhaps copied elsewhere
        root = path.parent if (path.parent / CONFIG).is_file() else path
        return TrainedRun(root, read_config(path), path / MODEL, read_metrics(path).get("step"))
    if (path / EMA).is_file() and (path.parent.parent / CONFIG).is_file():  # a checkpoint
        root = path.parent.parent
        wrong = damage(path, [EMA])
        if wrong:
            raise RunError(f"RUN: {wrong}; name the run folder to take the newest good checkpoint")
        return TrainedRun(root, read_config(root), path / EMA, read_state(path)["step"])
    if (path / "final" / MODEL).is_file():
        return TrainedRun(path, read_config(path / "final"), path / "final" / MODEL, None)
    newest, damaged = newest_good(path, [EMA])
    if newest is None:
        also = f": {damaged[0]}" if damaged else ""
        raise RunError(f"RUN: {str(path)!r} holds no finished training and no good checkpoint{also}")
    return TrainedRun(path, read_config(path), newest / EMA, read_state(newest)["step"])


def newest_run(folder: Path, name: str | None = None) -> Path | None:
    """The run below `folder` whose configuration was written last; with a name, of NAME, NAME-2, NAME-3, ... only."""
    runs = [p.parent for p in folder.glob(f"*/{CONFIG}")]
    if name is not None:
        runs = [p for p in runs if re.fullmatch(re.escape(name) + r"(-\d+)?", p.name)]
    return max(runs, key=lambda p: (p / CONFIG).stat().st_mtime, default=None)


def newest_good(root: Path, files: Sequence[str] = (MODEL, EMA, OPTIMIZER)) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run whose `files` are as they were written, and what is wrong with newer ones."""
    damaged = []
    for path in reversed(checkpoints(root)):
        wrong = damage(path, files)
        if wrong is None:
            return path, damaged
        damaged.append(wrong)
    return None, damaged


def damage(checkpoint: Path, files: Sequence[str]) -> str | None:
    """What is wrong with a checkpoint in words, or None."""
    try:
        hashes = read_state(checkpoint)["sha256"]
        for name in files:
            if sha256(checkpoint / name) != hashes[name]:
                return f"{checkpoint / name} is not as it was written"
    except RunError as e:
        return str(e)
    except OSError as e:
        return f"{e.filename}: {e.strerror}"
    except (KeyError, TypeError):
        return f"{checkpoint / STATE} holds no hashes"
    return None


def checkpoint_name(step: int) -> str:
    """The folder of a step; names sort as steps do."""
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """Checkpoints of a run that were completed, oldest first; a folder counts only under its final name."""
    return sorted(p for p in (root / CHECKPOINTS).glob("step-*") if (p / STATE).is_file())


def read_config(folder: Path) -> Config:
    """The configuration that a run was made with. Raises RunError."""
    path = folder / CONFIG
    try:
        return config_from_dict(parse_yaml(read_text(path, "RUN"), str(path)), str(path))
    except ConfigError as e:
        raise RunError(str(e)) from e


def read_state(folder: Path) -> dict[str, Any]:
    """The small numbers of a checkpoint. Raises RunError."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
        if not isinstance(state["step"], int):
            raise ValueError
        return state
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunError(f"{path}: damaged") from e


def load_model(trained: TrainedRun) -> nn.Module:
    """The network of a run with its averaged weights, in eval mode, on the CPU. Raises RunError."""
    with torch.device("meta"):
        model = build_model(trained.config)
    weights = read_tensors(trained.weights)
    refuse_others(model.state_dict(), weights, trained.weights)  # before memory is taken for what a file asks for
    model = model.to_empty(device="cpu")
    model.fill_position()
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def refuse_others(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises RunError for weights of other names or shapes than a model's own."""
    wrong = [k for k in own if k not in weights] + [k for k in weights if k not in own]
    if wrong:
        raise RunError(f"{path}: weights of another model: {wrong[0]} is in only one of the two")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise RunError(f"{path}: weights of another model: {name} is {shapes}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a published DiT, on the CPU. Raises RunError."""
    if path.suffix == published.SUFFIX:
        return published.published_weights(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e).splitlines()[0]
        raise RunError(f"{path}: cannot be read: {reason}") from e


# ------------------------------------------------------------------------------------------------- writing
@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name complete and on disk, or not at all.

    Raises:
        RunError: if it cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(PARTIAL + path.name)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise RunError(f"{path}: cannot be written: {reason}; what was saved before is intact") from e


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tensors of any device to a safetensors file."""
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)


def write_weights(
    path: Path, config: Config, weights: Mapping[str, Tensor], metrics: Mapping[str, Any] | None = None
) -> None:
    """`final/` or `best/`: averaged weights and what they are. Raises RunError."""
    with whole_folder(path) as folder:
        write_tensors(weights, folder / MODEL)
        (folder / CONFIG).write_text(to_yaml(config))
        if metrics is not None:
            (folder / METRICS).write_text(json.dumps(metrics) + "\n")


def read_metrics(folder: Path) -> dict[str, Any]:
    """What `best/` was measured at; empty where there is none. Raises RunError."""
    path = folder / METRICS
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as e:
        raise RunError(f"{path}: damaged; delete the folder {folder}") from e
