"""Checkpoints: model, averaged weights and optimiser as safetensors, step and counts as JSON."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffussm_cli.errors import RunError
from diffussm_cli.files import PARTIAL
from diffussm_cli.runs import (
    EMA,
    MODEL,
    OPTIMIZER,
    STATE,
    checkpoints,
    load_weights,
    read_state,
    read_tensors,
    whole_folder,
    write_tensors,
)


def save_checkpoint(
    root: Path, keep: int, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write RUN/checkpoints/step-N for state["step"] = N, then remove all but the newest `keep`. Raises RunError."""
    path = root / "checkpoints" / f"step-{state['step']:08d}"
    with whole_folder(path) as folder:
        write_tensors(model.state_dict(), folder / MODEL)
        write_tensors(ema.state_dict(), folder / EMA)
        write_tensors(_optimizer_tensors(model, optimizer), folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(state))
    for old in [*checkpoints(root)[:-keep], *path.parent.glob(f"{PARTIAL}*")]:
        shutil.rmtree(old)
    return path


def load_checkpoint(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore all that `save_checkpoint` wrote; gives its `state`. Raises RunError."""
    state = read_state(path)
    load_weights(model, path / MODEL)
    load_weights(ema, path / EMA)
    _restore_optimizer(model, optimizer, read_tensors(path / OPTIMIZER), path)
    return state


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `NAME/exp_avg`, `NAME/exp_avg_sq`, `NAME/step`."""
    return {f"{n}/{k}": v for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor], path: Path
) -> None:
    for name, p in model.named_parameters():
        entries = {k: saved.get(f"{name}/{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
        if any(v is None or (k != "step" and v.shape != p.shape) for k, v in entries.items()):
            raise RunError(f"{path / OPTIMIZER}: optimiser state of another model: {name} does not fit")
        moments = {k: v.to(p.device) for k, v in entries.items() if k != "step"}
        on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        optimizer.state[p] = {"step": entries["step"].to(p.device) if on_device else entries["step"], **moments}
