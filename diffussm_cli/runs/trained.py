"""A trained run: its averaged weights, found by the names that a user gives, and its model."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from diffussm_cli.config import RUNS, WIDTHS, Config, bundled_names, closest
from diffussm_cli.errors import ConfigError, RunError
from diffussm_cli.machine.files import sha256
from diffussm_cli.model import Backbone, build_model
from diffussm_cli.runs import dit_checkpoint, hub
from diffussm_cli.runs.checkpoints import damage, newest_good
from diffussm_cli.runs.layout import (
    CONFIG,
    EMA,
    FINAL,
    MODEL,
    STATE,
    ema_file,
    list_snapshots,
    newest_run,
    step_of,
    width_file,
)
from diffussm_cli.runs.metadata import read_config, read_metrics, read_state
from diffussm_cli.runs.power import Mixture, mixture_of
from diffussm_cli.runs.weights import check_weights_match, read_tensors


@dataclass(frozen=True)
class TrainedRun:
    """A run that can be sampled: its configuration and the file of its averaged weights."""

    root: Path
    config: Config
    weights: Path
    step: int | None  # None when training has finished
    ema: float | None = None  # the decay of the averaged weights; None for a published DiT
    mixture: Mixture | None = None  # in place of `weights`, an average of a chosen width
    remark: str = field(default="", compare=False)  # ends the label

    @property
    def weights_sha256(self) -> str:
        """A hash that identifies the weights."""
        return self.mixture.sha256 if self.mixture else sha256(self.weights)

    @property
    def averages(self) -> dict[float, Path]:
        """The files of averaged weights in the folder of `weights` by decay, the first one first;
        none for a DiT.
        """
        decays = () if self.weights.suffix == dit_checkpoint.SUFFIX else self.config.train.ema
        further = {
            d: file for d in decays if (file := self.weights.with_name(ema_file(d))).is_file()
        }
        return dict.fromkeys(decays[:1], self.weights) | further

    @property
    def assumption(self) -> str:
        """One line that says what is assumed of weights that do not tell it; empty for runs of this
        program.
        """
        return (
            dit_checkpoint.assumption(self.weights, self.config)
            if self.weights.suffix == dit_checkpoint.SUFFIX
            else ""
        )

    @property
    def is_sit(self) -> bool:
        """Whether the weights are those of a published file that is read as a SiT."""
        return bool(self.assumption) and self.config.diffusion.objective == "flow"

    @property
    def label(self) -> str:
        state = "finished" if self.step is None else f"step {self.step}"
        return f"{self.root} ({state}{self.remark})"


def find_run(
    path: Path | None,
    ema: float | None = None,
    objective: str | None = None,
    ema_width: float | None = None,
) -> TrainedRun:
    """Find the averaged weights of a run folder, its `final/` or `best/`, a checkpoint, or a
    published DiT's .pt file.

    A path that does not exist may name a model of the package, or one on the hub as OWNER/NAME or
    OWNER/NAME@REVISION. Without a path, take the newest run in runs/. Without `ema`, a decay, or
    `ema_width`, a width that its snapshots give, take the first average of the run.

    Args:
        objective: what a published .pt file predicts: noise, as DiT's, or flow, as SiT's.

    Raises:
        RunError: if there are none, or they are damaged.
        ConfigError: for an objective of a run that has its own.
    """
    trained = _find_weights(path or newest_run(RUNS))
    is_foreign = trained.weights.suffix == dit_checkpoint.SUFFIX
    if objective is not None and not is_foreign:
        raise ConfigError(
            f"--objective: {objective!r} is for a published .pt file; "
            f"{trained.root} has its own, {trained.config.diffusion.objective}"
        )
    if objective is not None:
        config = dit_checkpoint.published_config(trained.weights, objective)
        trained = dataclasses.replace(trained, config=config)
    if ema_width is not None:
        if ema is not None:
            raise RunError("--ema-width: cannot be given with --ema; leave one of them out")
        return _mixed(trained, ema_width)

    # The average that was asked for.
    averages = trained.averages
    if ema is not None and ema not in averages:
        holds = ", ".join(map(str, averages)) or "none"
        raise RunError(
            f"--ema: {str(trained.weights.parent)!r} holds no average with decay {ema}; "
            f"it holds {holds}"
        )

    decay = next(iter(averages), None) if ema is None else ema
    file = trained.weights if decay is None else averages[decay]
    if file != trained.weights:
        _refuse_damage(file.parent, file.name, "omit --ema to use the first average")
    return dataclasses.replace(trained, weights=file, ema=decay)


@contextlib.contextmanager
def named_by(option: str, name: str) -> Iterator[None]:
    """Let errors of `find_run` and `load_model` in the block name the option or field that names
    the run, where that is not RUN.

    Raises:
        RunError: also if there is nothing of that name.
    """
    is_file = Path(name).suffix == dit_checkpoint.SUFFIX
    if not is_file and not os.path.lexists(name) and not hub.is_elsewhere(name):
        raise RunError(
            f"{option}: no folder {name!r}; name a run, a model of the package "
            f"({', '.join(bundled_names())}), OWNER/NAME on the Hugging Face hub, or a .pt file of "
            "a published DiT or SiT"
        )
    try:
        yield
    except RunError as e:
        raise RunError(f"{option}: {str(e).removeprefix('RUN: ')}") from e


def _mixed(trained: TrainedRun, width: float) -> TrainedRun:
    """The same run with an average of a width, at its newest snapshot. Raises RunError."""
    root = trained.root
    last = trained.config.train.steps if trained.step is None else trained.step
    snapshots = [path for path in list_snapshots(root) if step_of(path) <= last]
    if trained.weights.suffix == dit_checkpoint.SUFFIX:
        snapshots = []
    step = step_of(snapshots[-1]) if snapshots else last
    files = [
        (snapshot / width_file(tracked), step_of(snapshot), tracked)
        for snapshot in snapshots
        for tracked in WIDTHS
    ]
    mixture = mixture_of(files, step, width, root)
    for path, _, _ in files:
        _refuse_damage(path.parent, path.name, "delete the folder to do without it")

    is_last = trained.step is None and step == last
    step_or_end = None if is_last else step
    return dataclasses.replace(
        trained, weights=files[-1][0], step=step_or_end, mixture=mixture, remark=""
    )


def _find_weights(path: Path | None) -> TrainedRun:
    if path is None:
        raise RunError(f"RUN: no run in {RUNS}/; train one first: diffussm train")
    if hub.is_elsewhere(path):
        folder, root = hub.locate(path.as_posix())
        return dataclasses.replace(_find_weights(folder), root=root)
    if path.suffix == dit_checkpoint.SUFFIX and path.is_file():
        return TrainedRun(path.with_suffix(""), dit_checkpoint.published_config(path), path, None)

    # No folder.
    if path.suffix == dit_checkpoint.SUFFIX and not os.path.lexists(path):
        raise RunError(
            f"RUN: no file {str(path)!r}; the READMEs of facebookresearch/DiT and willisma/SiT "
            "link to theirs"
        )
    if not path.is_dir() and os.path.lexists(path):
        raise RunError(
            f"RUN: {str(path)!r} is no folder of a run and no .pt file of a published DiT; "
            "give the run folder"
        )
    if not path.is_dir():
        meant = closest(str(path), bundled_names())
        remedy = (
            f"did you mean {meant!r}?" if meant else f"train one with: diffussm train --out {path}"
        )
        raise RunError(f"RUN: no folder {str(path)!r}; {remedy}")

    # final/ or best/ itself, perhaps copied elsewhere.
    if (path / CONFIG).is_file() and (path / MODEL).is_file():
        root = path.parent if (path.parent / CONFIG).is_file() else path
        _refuse_damage(path, MODEL, "give the run folder, or another copy")
        return TrainedRun(root, read_config(path), path / MODEL, read_metrics(path).get("step"))

    # A checkpoint.
    if (path / EMA).is_file() and (path.parent.parent / CONFIG).is_file():
        root = path.parent.parent
        _refuse_damage(path, EMA, "give the run folder to use the newest good checkpoint")
        return TrainedRun(root, read_config(root), path / EMA, read_state(path)["step"])

    return _newest_weights(path)


def _newest_weights(path: Path) -> TrainedRun:
    """The newest weights of a run folder: `final/`, or a good checkpoint if there is none or if the
    run continues after it. Raises RunError.
    """
    final = path / FINAL
    has_final = (final / MODEL).is_file()
    last = _step_of_final(final) if has_final else -1

    # A checkpoint.
    newest, damaged = newest_good(path, [EMA], after=last)
    if newest is not None:
        remark = ", newer than final/" if has_final else ""
        weights, step = newest / EMA, read_state(newest)["step"]
        return TrainedRun(path, read_config(path), weights, step, remark=remark)
    if not has_final:
        also = f": {damaged[0]}" if damaged else ""
        raise RunError(
            f"RUN: {str(path)!r} holds no finished training and no usable checkpoint{also}"
        )

    # The end of training, which is not the newest if a later checkpoint is damaged.
    _refuse_damage(final, MODEL, f"write it again with: diffussm train --resume --out {path}")
    step, remark = (last, f", final/, because {damaged[0]}") if damaged else (None, "")
    return TrainedRun(path, read_config(final), final / MODEL, step, remark=remark)


def _step_of_final(folder: Path) -> int:
    """The step of `final/`; without a state, as in earlier versions, that of its configuration.
    Raises RunError.
    """
    with contextlib.suppress(RunError):
        return read_state(folder)["step"]
    return read_config(folder).train.steps


def _refuse_damage(folder: Path, file: str, remedy: str) -> None:
    """Raises RunError if weights have changed since they were written; those of earlier versions
    have no hashes.
    """
    wrong = damage(folder, [file]) if (folder / STATE).exists() else None
    if wrong:
        raise RunError(f"RUN: {wrong}; {remedy}")


def load_model(trained: TrainedRun) -> Backbone:
    """Load the model of a run with its averaged weights, in eval mode, on the CPU.

    Raises RunError.
    """
    with torch.device("meta"):
        model = build_model(trained.config)
    is_foreign = trained.weights.suffix == dit_checkpoint.SUFFIX
    if is_foreign:
        weights = dit_checkpoint.published_weights(trained.weights, trained.config)
        dit_checkpoint.adapt(model, trained.config)
        check_weights_match(model.state_dict(), weights, trained.weights)
    elif trained.mixture is not None:
        weights = _sum_of(trained.mixture, model.state_dict())
    else:
        weights = read_tensors(trained.weights)
        check_weights_match(model.state_dict(), weights, trained.weights)

    # Memory is allocated once the weights are known to fit.
    model.materialize("cpu")
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def _sum_of(mixture: Mixture, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as a sum of files, computed in float64. Raises RunError."""
    total: dict[str, Tensor] = {}
    for path, coefficient in mixture.parts:
        weights = read_tensors(path)
        check_weights_match(expected, weights, path)
        for name, tensor in weights.items():
            part = tensor.double() * coefficient
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}
