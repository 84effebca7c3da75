"""Checkpoints: model, averaged weights and optimiser as safetensors; step, counts and all hashes as
JSON.

A checkpoint gets its final name once it is complete and on disk. The hashes reveal later damage,
and then the previous checkpoint is used.
"""

import fnmatch
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from diffussm_cli import runs
from diffussm_cli.config import TrainConfig
from diffussm_cli.errors import RunError
from diffussm_cli.machine.device import helpers
from diffussm_cli.machine.files import PARTIAL
from diffussm_cli.machine.processes import World, gather
from diffussm_cli.machine.tensors import NOT_FINITE, first_not_finite
from diffussm_cli.training.muon import MOMENT, matrices_of
from diffussm_cli.training.parallel import full_tensor, load_full, shard_like

Tensors = Mapping[str, Mapping[str, Tensor]]  # by file, by name
Averages = Mapping[str, nn.Module]  # by file
KINDS = ("step", "exp_avg", "exp_avg_sq")  # the state that AdamW keeps of a parameter


class CheckpointWriter:
    """Writes RUN/checkpoints/step-N, in a thread if the configuration says so, one at a time;
    removes old ones.
    """

    def __init__(self, root: Path, config: TrainConfig):
        self.root = root
        self.config = config
        self._thread = helpers() if config.async_checkpoint else None
        self._running: Future | None = None

    def write(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Wait for the previous checkpoint, then start to write this one.

        A thread writes copies on the CPU, which further training does not change. Each tensor is
        taken out of `tensors` when it is copied, so that what was gathered from several processes
        is not in memory twice.

        Raises RunError if either fails.
        """
        self.finish()
        if self._thread is None:
            self._write(tensors, state)
            return
        copies = {
            file: {name: content.pop(name).detach().to("cpu", copy=True) for name in list(content)}
            for file, content in tensors.items()
        }
        self._running = self._thread.submit(self._write, copies, state)

    def check(self) -> None:
        """Raises RunError if the checkpoint in progress has failed by now; does not wait."""
        if self._running and self._running.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint is on disk. Raises RunError if it could not be written."""
        running, self._running = self._running, None
        if running:
            running.result()

    def _write(self, tensors: Tensors, state: dict[str, Any]) -> None:
        folder = self.root / runs.CHECKPOINTS
        write_tensor_folder(folder, tensors, state)
        self._remove_others(folder, state["step"])

    def _remove_others(self, folder: Path, newest: int) -> None:
        """Remove old checkpoints, what a killed process left, and checkpoints of later steps than
        the newest one: they are damaged, and training has begun before them.
        """
        every = self.config.keep_every
        checkpoints = runs.list_checkpoints(self.root)
        later = [path for path in checkpoints if runs.step_of(path) > newest]
        for path in later:
            runs.remove(path)

        good = checkpoints[: len(checkpoints) - len(later)]
        for old in good[: -self.config.keep_checkpoints]:
            is_permanent = every and runs.step_of(old) % every == 0
            if not is_permanent:
                runs.remove(old)

        for debris in folder.glob(f"{PARTIAL}step-*"):
            runs.remove(debris)


def write_tensor_folder(parent: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """Write PARENT/step-N with tensors by file, and the state of step N with their hashes.

    Raises:
        RunError: if it cannot be written.
    """
    with runs.whole_folder(parent / runs.checkpoint_name(state["step"])) as folder:
        hashes = {
            name: runs.write_tensors(content, folder / name) for name, content in tensors.items()
        }
        runs.write_state(folder, state | {"sha256": hashes})


def collect(
    model: nn.Module, averages: Tensors, optimizer: Optimizer, keep: bool = True
) -> dict[str, dict[str, Tensor]]:
    """The full tensors of a checkpoint, if `keep` is true.

    If the models are sharded, every process must call this.
    """
    moments = {
        f"{n}/{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()
    }
    return full_tensors({runs.MODEL: model.state_dict(), **averages, runs.OPTIMIZER: moments}, keep)


def full_tensors(files: Tensors, keep: bool = True) -> dict[str, dict[str, Tensor]]:
    """The full tensors of each file, if `keep` is true.

    If they are sharded, every process must call this.
    """
    full: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            complete = full_tensor(tensor)
            if keep:
                full[file][name] = complete if complete is tensor else complete.cpu()
    return full


def agree_on_checkpoint(root: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint as the first process sees it, and what is wrong with newer
    ones.

    Only the first process decides, because others may see a stale state of a shared file system.

    Raises:
        RunError: if all checkpoints are damaged, or another process does not see the same bytes.
    """
    # The first process chooses.
    name, state = None, None
    damaged: list[str] = []
    if world.rank == 0 and runs.list_checkpoints(root):
        newest, damaged = runs.newest_good(root)
        if newest is None:
            raise RunError(
                f"--resume: {root} has no good checkpoint: {damaged[0]}; "
                "choose another --out to begin a new run"
            )
        name, state = newest.name, runs.read_state(newest)
    name, state = gather((name, state), world)[0]
    if name is None:
        return None, damaged

    # The others compare.
    path = root / runs.CHECKPOINTS / name
    for rank, wrong in enumerate(gather(_difference(path, state) if world.rank else None, world)):
        if wrong:
            raise RunError(
                f"--resume: process {rank} does not see the checkpoint of process 0 in {root}: "
                f"{wrong}"
            )
    return path, damaged


def _difference(path: Path, state: dict[str, Any]) -> str | None:
    """How a checkpoint differs from the one with the given state, or None."""
    wrong = runs.damage(path, (runs.MODEL, runs.EMA, runs.OPTIMIZER), others=True)
    return wrong or (None if runs.read_state(path) == state else f"{path / runs.STATE} differs")


def load_checkpoint(
    path: Path, model: nn.Module, averages: Averages, optimizer: Optimizer
) -> dict[str, Any]:
    """Load model, averages and optimiser; a further average that the checkpoint lacks starts as a
    copy of the first.

    Returns:
        The state: step, counts and hashes.

    Raises:
        RunError: if the checkpoint is damaged or of another model.
    """
    state = runs.read_state(path)
    networks = [(model, runs.MODEL)]
    for file, average in averages.items():
        is_by_decay = fnmatch.fnmatch(file, runs.ema_file("*"))
        is_new = is_by_decay and not (path / file).is_file()
        networks.append((average, runs.EMA if is_new else file))

    for network, name in networks:
        weights = runs.read_tensors(path / name)
        runs.check_weights_match(network.state_dict(), weights, path / name)
        load_full(network, weights)
    _restore_optimizer(model, optimizer, runs.read_tensors(path / runs.OPTIMIZER), path)
    return state


def _restore_optimizer(
    model: nn.Module, optimizer: Optimizer, saved: dict[str, Tensor], path: Path
) -> None:
    matrices = {id(p) for p in matrices_of(optimizer)}
    for name, p in model.named_parameters():
        kinds = (MOMENT,) if id(p) in matrices else KINDS
        entries = {k: saved[f"{name}/{k}"] for k in kinds if f"{name}/{k}" in saved}
        if len(entries) < len(kinds) or any(
            v.shape != p.shape for k, v in entries.items() if k != "step"
        ):
            raise RunError(
                f"{path / runs.OPTIMIZER}: optimiser state of another model: {name} does not fit"
            )
        if first_not_finite(entries) or not all(v.is_floating_point() for v in entries.values()):
            raise RunError(
                f"{path / runs.OPTIMIZER}: damaged: {name} {NOT_FINITE}; take another checkpoint"
            )
        # A clone, because the tensor maps the file, which is later deleted with its checkpoint.
        moments = {k: shard_like(v.clone(), p) for k, v in entries.items() if k != "step"}
        step = {"step": entries["step"].to(p.device)} if "step" in entries else {}
        optimizer.state[p] = {**step, **moments}
