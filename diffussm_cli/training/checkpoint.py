"""Checkpoints: model, averaged weights and optimiser as safetensors; step, counts and the hashes of all as JSON.

A checkpoint appears under its name when it is complete and on disk. What a later accident did to it is found by its
hashes, and the one before is taken.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffussm_cli.config import TrainConfig
from diffussm_cli.errors import RunError
from diffussm_cli.machine.device import helpers
from diffussm_cli.machine.files import PARTIAL
from diffussm_cli.machine.processes import World, gather
from diffussm_cli.runs import (
    CHECKPOINTS,
    EMA,
    MODEL,
    OPTIMIZER,
    STATE,
    check_weights_match,
    checkpoint_name,
    damage,
    list_checkpoints,
    newest_good,
    read_state,
    read_tensors,
    step_of,
    whole_folder,
    write_state,
    write_tensors,
)
from diffussm_cli.training.parallel import full_tensor, load_full, shard_like

Tensors = Mapping[str, Mapping[str, Tensor]]  # by file, by name
KINDS = ("step", "exp_avg", "exp_avg_sq")


class CheckpointWriter:
    """Writes RUN/checkpoints/step-N, in a thread if the configuration says so, one at a time; removes old ones."""

    def __init__(self, root: Path, config: TrainConfig):
        self.root, self.config = root, config
        self._thread = helpers() if config.async_checkpoint else None
        self._running: Future | None = None

    def write(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Begin to write; the one before must have been finished for that. Raises RunError of either."""
        self.finish()
        if self._thread is None:
            self._write(tensors, state)
            return
        copies = {f: {k: _copy(v) for k, v in ts.items()} for f, ts in tensors.items()}
        self._running = self._thread.submit(self._write, copies, state)

    def check(self) -> None:
        """Without waiting. Raises RunError if what was begun has failed by now."""
        if self._running and self._running.done():
            self.finish()

    def finish(self) -> None:
        """Wait until everything is on disk. Raises RunError if it could not be written."""
        running, self._running = self._running, None
        if running:
            running.result()

    def _write(self, tensors: Tensors, state: dict[str, Any]) -> None:
        path = self.root / CHECKPOINTS / checkpoint_name(state["step"])
        with whole_folder(path) as folder:
            hashes = {name: write_tensors(content, folder / name) for name, content in tensors.items()}
            write_state(folder, state | {"sha256": hashes})
        self._remove_old(path.parent)

    def _remove_old(self, folder: Path) -> None:
        every, kept = self.config.keep_every, set(list_checkpoints(self.root)[-self.config.keep_checkpoints :])
        for old in list_checkpoints(self.root):
            for_good = every and step_of(old) % every == 0
            if old not in kept and not for_good:
                shutil.rmtree(old)
        for debris in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(debris)


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, and not changed by what training does next."""
    return tensor.detach().to("cpu", copy=True)


def collect(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True) -> Tensors:
    """All that a checkpoint holds, whole, for the process that `keep`s it; of parts, every process must be asked."""
    moments = {f"{n}/{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}
    files = {MODEL: model.state_dict(), EMA: ema.state_dict(), OPTIMIZER: moments}
    found: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            complete = full_tensor(tensor)
            if keep:
                found[file][name] = complete if complete is tensor else complete.cpu()
    return found


def agree_on_checkpoint(root: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint by the judgement of the first process, and what is wrong with newer ones.

    The first process alone decides: another one may see a stale state of a shared file system.

    Raises:
        RunError: if there are checkpoints but no good one, or another process does not see the same bytes.
    """
    name, state, damaged = None, None, []
    if world.rank == 0 and list_checkpoints(root):
        newest, damaged = newest_good(root)
        if newest is None:
            raise RunError(
                f"--resume: {root} has no good checkpoint: {damaged[0]}; name another --out to begin a new run"
            )
        name, state = newest.name, read_state(newest)
    name, state = gather((name, state), world)[0]
    if name is None:
        return None, damaged
    path = root / CHECKPOINTS / name
    for rank, wrong in enumerate(gather(_difference(path, state) if world.rank else None, world)):
        if wrong:
            raise RunError(f"--resume: process {rank} does not see the checkpoint of process 0 in {root}: {wrong}")
    return path, damaged


def _difference(path: Path, state: dict[str, Any]) -> str | None:
    """What makes a checkpoint another one than that of a state, or None."""
    wrong = damage(path, (MODEL, EMA, OPTIMIZER))
    return wrong or (None if read_state(path) == state else f"{path / STATE} differs")


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore all that `collect` gave; gives the checkpoint's state. Raises RunError."""
    state = read_state(path)
    for network, name in ((model, MODEL), (ema, EMA)):
        weights = read_tensors(path / name)
        check_weights_match(network.state_dict(), weights, path / name)
        load_full(network, weights)
    _restore_optimizer(model, optimizer, read_tensors(path / OPTIMIZER), path)
    return state


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], path: Path
) -> None:
    for name, p in model.named_parameters():
        entries = {k: saved.get(f"{name}/{k}") for k in KINDS}
        if any(v is None or (k != "step" and v.shape != p.shape) for k, v in entries.items()):
            raise RunError(f"{path / OPTIMIZER}: optimiser state of another model: {name} does not fit")
        if not all(v.is_floating_point() and v.isfinite().all() for v in entries.values()):
            raise RunError(f"{path / OPTIMIZER}: damaged: {name} holds numbers that are not finite")
        # A clone, because the tensor is a map of the file, which later goes with its checkpoint.
        moments = {k: shard_like(v.clone(), p) for k, v in entries.items() if k != "step"}
        optimizer.state[p] = {"step": entries["step"].to(p.device), **moments}
