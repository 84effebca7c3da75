"""Health of a training run: steps that are not finite, spikes, relative sizes of updates, the SSM's time scales."""

import math
import statistics
from collections import deque

import torch
from torch import Tensor, nn

from diffussm_cli.model.mixer import StateSpace
from diffussm_cli.training.parallel import local_shards

SPIKE, WINDOW, LEAST = 3.0, 20, 5  # factor over the median of the last records; maximum and minimum number of them


class BadSteps:
    """Counts skipped steps on the device, so that no step waits for the host; read once per record."""

    def __init__(self, device: torch.device):
        self.in_a_row = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)
        self._flags: list[Tensor] = []

    def add(self, bad: Tensor) -> None:
        """Add a step: 1.0 if it was skipped, otherwise 0.0, as a 0-d tensor on the device."""
        self.in_a_row = (self.in_a_row + bad) * bad
        self.longest = torch.maximum(self.longest, self.in_a_row)
        self._flags.append(bad)

    def flush(self, step: int) -> tuple[list[int], int]:
        """The steps up to `step` that were skipped since the last flush, and the longest run of consecutive skips."""
        flags = torch.stack(self._flags).cpu()
        first = step - len(self._flags) + 1
        longest = int(self.longest)
        self._flags, self.longest = [], self.in_a_row.clone()
        return [first + i for i in flags.nonzero().flatten().tolist()], longest


class SpikeAlarm:
    """Detects a loss or gradient norm that is far above those of earlier records."""

    def __init__(self) -> None:
        self._before: dict[str, deque] = {name: deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}

    def check(self, record: dict) -> list[str]:
        """The names of values above three times their median."""
        risen = []
        for name, before in self._before.items():
            if len(before) >= LEAST and record[name] > SPIKE * statistics.median(before):
                risen.append(name)
            if math.isfinite(record[name]):  # else no later value would exceed the median
                before.append(record[name])
        return risen


@torch.no_grad()
def update_ratios(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Squared norms of the last update and of the weights by group: (2,), for the parts that this process holds."""
    found = {}
    for group in optimizer.param_groups:
        if group.get("muon"):
            size = sum(p.square().sum() for p in group["params"])
            found[group["name"]] = torch.stack([group["moved"], size])
            continue
        beta1, beta2 = group["betas"]
        sums = torch.zeros(2, device=group["params"][0].device)
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                continue
            w, m, v = local_shards((p, state["exp_avg"], state["exp_avg_sq"]))
            n = state["step"].to(w.device).clamp(min=1)
            update = (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + group["eps"]) + group["weight_decay"] * w
            sums += torch.stack([(group["lr"] * update).square().sum(), w.square().sum()])
        found[group["name"]] = sums
    return found


@torch.no_grad()
def time_scales(model: nn.Module) -> dict[str, Tensor]:
    """Range of dt and -Re A over all SSMs, for the parts that this process holds, as [min, -max] of the log: (2,)."""
    found = {}
    for name, symbol in (("log_dt", "dt"), ("log_A_real", "decay")):
        values = local_shards(getattr(m, name) for m in model.modules() if isinstance(m, StateSpace))
        if values:
            held = torch.cat([v.reshape(-1) for v in values])
            none = torch.full((2,), math.inf, device=held.device)
            found[symbol] = torch.stack([held.min(), -held.max()]) if held.numel() else none
    return found
