"""What a run folder holds, how it is written so that a kill leaves it whole, and how a trained model is read from it.

RUN/config.yaml                      the resolved configuration
RUN/metrics.jsonl, RUN/tensorboard/  records of the training loop
RUN/samples/step-*.png               previews
RUN/skipped.jsonl                    images that could not be read, with data.skip_unreadable
RUN/checkpoints/step-*/              model, ema, optimizer (.safetensors), state.json
RUN/final/                           model.safetensors (averaged weights) and config.yaml: all that sampling needs
RUN/best/                            the same of the step of the lowest FID, with metrics.json

state.json holds the step and the hashes of the weights beside it.
"""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffussm_cli import published
from diffussm_cli.config import Config, config_from_dict, parse_yaml, read_text, to_yaml
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.files import PARTIAL, sha256, sync, tensors_header, write_text
from diffussm_cli.model import build_model

RUNS = Path("runs")
CONFIG, STATE, MODEL, METRICS = "config.yaml", "state.json", "model.safetensors", "metrics.json"
EMA, OPTIMIZER = "ema.safetensors", "optimizer.safetensors"
CHECKPOINTS, FINAL, BEST, SAMPLES, BOARD = "checkpoints", "final", "best", "samples", "tensorboard"
LOG, SKIPPED = "metrics.jsonl", "skipped.jsonl"
BEFORE_CHECKPOINTS = {CONFIG, LOG, BOARD, SAMPLES, SKIPPED, CHECKPOINTS}  # what a run may hold by its first one
DTYPES = {  # of weights, as safetensors spells them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


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
def find_run(path: Path | None) -> TrainedRun:
    """The averaged weights under a run folder, its `final/` or `best/`, a checkpoint, or a published DiT's .pt file.

    Without a path, those of the newest run in runs/.

    Raises:
        RunError: if there is none.
    """
    path = path or newest_run(RUNS)
    if path is None:
        raise RunError(f"RUN: no run in {RUNS}/; train one first: diffussm train")
    if path.suffix == published.SUFFIX and path.is_file():
        return TrainedRun(path.with_suffix(""), published.published_config(path), path, None)
    if not path.is_dir():
        raise RunError(f"RUN: no folder {str(path)!r}; train one with: diffussm train --out {path}")
    if (path / CONFIG).is_file() and (path / MODEL).is_file():  # final/ or best/ itself, perhaps copied elsewhere
        root = path.parent if (path.parent / CONFIG).is_file() else path
        _refuse_damage(path, MODEL, "name the run folder, or another copy")
        return TrainedRun(root, read_config(path), path / MODEL, read_metrics(path).get("step"))
    if (path / EMA).is_file() and (path.parent.parent / CONFIG).is_file():  # a checkpoint
        root = path.parent.parent
        _refuse_damage(path, EMA, "name the run folder to take the newest good checkpoint")
        return TrainedRun(root, read_config(root), path / EMA, read_state(path)["step"])
    if (path / FINAL / MODEL).is_file():
        _refuse_damage(path / FINAL, MODEL, f"write it again with: diffussm train --resume --out {path}")
        return TrainedRun(path, read_config(path / FINAL), path / FINAL / MODEL, None)
    newest, damaged = newest_good(path, [EMA])
    if newest is None:
        also = f": {damaged[0]}" if damaged else ""
        raise RunError(f"RUN: {str(path)!r} holds no finished training and no good checkpoint{also}")
    return TrainedRun(path, read_config(path), newest / EMA, read_state(newest)["step"])


def _refuse_damage(folder: Path, file: str, remedy: str) -> None:
    """Raises RunError for weights that are not as they were written; those of earlier versions have no hashes."""
    wrong = damage(folder, [file]) if (folder / STATE).exists() else None
    if wrong:
        raise RunError(f"RUN: {wrong}; {remedy}")


def has_final(root: Path, step: int) -> bool:
    """Whether `final/` is complete, as it was written, and of this step."""
    try:
        read_config(root / FINAL)
        return damage(root / FINAL, [MODEL]) is None and read_state(root / FINAL)["step"] == step
    except RunError:
        return False


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
    named = (p for p in (root / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))
    return sorted((p for p in named if (p / STATE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_config(folder: Path, option: str = "RUN") -> Config:
    """The configuration that a run was made with; `option` is what the run was given by. Raises RunError."""
    path = folder / CONFIG
    try:
        return config_from_dict(_saved_values(read_text(path, option), f"{option}: {path}"), str(path))
    except ConfigError as e:
        raise RunError(str(e)) from e


def _saved_values(text: str, where: str) -> dict[str, Any]:
    try:
        values, problem = parse_yaml(text, where), ""
    except ConfigError as e:
        values, problem = None, f" ({str(e).removeprefix(f'{where}: ')})"
    if not isinstance(values, dict) or not {"model", "data", "train"} <= values.keys():
        remedy = "delete it and repeat the command that made the run, with --preset and --resume"
        raise ConfigError(f"{where} is empty or damaged{problem}; {remedy}")
    return values


def read_state(folder: Path) -> dict[str, Any]:
    """The small numbers of a checkpoint. Raises RunError."""
    state = _read_object(folder / STATE)
    if type(state.get("step")) is not int or state["step"] < 0:
        raise RunError(f"{folder / STATE}: damaged")
    return state


def _read_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """A small JSON object. Raises RunError."""
    try:
        found = json.loads(read_text(path, "RUN"))
        if isinstance(found, dict):
            return found
    except (ConfigError, ValueError, RecursionError):
        pass
    raise RunError(f"{path}: damaged{remedy}")


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
    """Raises RunError for weights of other names or shapes than a model's own, or that are no finite numbers."""
    wrong = [k for k in own if k not in weights] + [k for k in weights if k not in own]
    if wrong:
        raise RunError(f"{path}: weights of another model: {wrong[0]} is in only one of the two")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            raise RunError(f"{path}: weights of another model: {name} is {shapes}")
        if weights[name].dtype not in DTYPES:
            raise RunError(f"{path}: damaged: {name} holds {weights[name].dtype}, not floating-point numbers")
        if not weights[name].isfinite().all():
            raise RunError(f"{path}: damaged: {name} holds numbers that are not finite")


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
    temporary, replaced = (path.with_name(f"{PARTIAL}{path.name}{end}") for end in ("", ".old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            path.rename(replaced)
        temporary.rename(path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise RunError(f"{path}: cannot be written: {e.strerror or e}; what was saved before is intact") from e


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Tensors of any device to a safetensors file; gives its sha256, taken while it is written. Raises OSError."""
    held = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # so that all are aligned
    digest = hashlib.sha256()
    with path.open("wb") as file:
        parts = itertools.chain(
            [tensors_header({n: (DTYPES[t.dtype], t.shape, t.nbytes) for n, t in held})],
            (t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, t in held),
        )
        for part in parts:
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """What `read_state` reads. Raises OSError."""
    write_text(folder / STATE, json.dumps(state))


def write_weights(
    path: Path, config: Config, weights: Mapping[str, Tensor], step: int, metrics: Mapping[str, Any] | None = None
) -> None:
    """`final/` or `best/`: averaged weights of a step and what they are. Raises RunError."""
    with whole_folder(path) as folder:
        hashes = {MODEL: write_tensors(weights, folder / MODEL)}
        write_text(folder / CONFIG, to_yaml(config))
        if metrics is not None:
            write_text(folder / METRICS, json.dumps(metrics) + "\n")
        write_state(folder, {"step": step, "sha256": hashes})


def read_metrics(folder: Path) -> dict[str, float]:
    """What `best/` was measured at; empty where there is none. Raises RunError."""
    path, remedy = folder / METRICS, f"; delete the folder {folder}"
    if not path.is_file():
        return {}
    found = _read_object(path, remedy)
    if not all(isinstance(v, (int, float)) for v in found.values()):
        raise RunError(f"{path}: damaged{remedy}")
    return found


def write_skipped(root: Path, skipped: Sequence[tuple[int | None, str, str]]) -> None:
    """Index, name and reason of images that a run leaves out, as `encode` writes them. Raises OSError."""
    lines = [json.dumps({"index": i, "file": name, "reason": reason}) + "\n" for i, name, reason in skipped]
    write_text(root / SKIPPED, "".join(lines))


def read_skipped(root: Path) -> list[tuple[int | None, str, str]]:
    """What `write_skipped` wrote. Raises RunError."""
    path = root / SKIPPED
    try:
        if not path.is_file():
            raise ValueError
        lines = path.read_text(encoding="utf-8").splitlines()
        skipped = [(s["index"], s["file"], s["reason"]) for s in map(json.loads, lines)]
        if not all(i is None or type(i) is int for i, _, _ in skipped):
            raise ValueError
        return skipped
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise RunError(f"{path}: damaged; the run cannot know which images it left out") from e
