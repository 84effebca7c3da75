"""Health of a training run: steps that are not finite, relative sizes of updates, the SSM's time
scales.
"""

import math

import torch
from torch import Tensor, nn

from diffussm_cli.machine.processes import World, reduced
from diffussm_cli.model.mixer import StateSpace
from diffussm_cli.training.parallel import local_shards


class BadSteps:
    """Counts skipped steps on the device, so that no step waits for the host; read once per
    record.
    """

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
        """The steps up to `step` that were skipped since the last flush, and the longest run of
        consecutive skips.
        """
        flags = torch.stack(self._flags).cpu()
        first = step - len(self._flags) + 1
        longest = int(self.longest)
        self._flags, self.longest = [], self.in_a_row.clone()
        return [first + i for i in flags.nonzero().flatten().tolist()], longest


def diagnosis(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, float]:
    """The size of the last update relative to the weights, by group, and the range of the SSM's
    time scales.

    Args:
        world: the processes that each hold a shard of the model; one process if it is not sharded.
    """
    values = {}
    for name, sums in update_ratios(optimizer).items():
        moved, size = reduced(sums, world).tolist()
        values[f"update/{name}"] = math.sqrt(moved / size) if size else 0.0

    for name, ends in time_scales(model).items():
        least, most = reduced(ends, world, "MIN").exp().tolist()
        values[f"ssm/{name}_min"] = least
        values[f"ssm/{name}_max"] = 1 / most
    return values


@torch.no_grad()
def update_ratios(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Squared norms of the last update and of the weights by group: (2,), for the parts that this
    process holds.
    """
    by_group = {}
    for group in optimizer.param_groups:
        if group.get("muon"):
            size = sum(p.square().sum() for p in group["params"])
            by_group[group["name"]] = torch.stack([group["moved"], size])
            continue

        # AdamW: the update is computed again from its averages
        beta1, beta2 = group["betas"]
        sums = torch.zeros(2, device=group["params"][0].device)
        for p in group["params"]:
            state = optimizer.state[p]
            if not state:
                continue

            w, m, v = local_shards((p, state["exp_avg"], state["exp_avg_sq"]))
            n = state["step"].to(w.device).clamp(min=1)
            update = (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + group["eps"])
            update = update + group["weight_decay"] * w
            sums += torch.stack([(group["lr"] * update).square().sum(), w.square().sum()])
        by_group[group["name"]] = sums

    return by_group


@torch.no_grad()
def time_scales(model: nn.Module) -> dict[str, Tensor]:
    """Range of dt and -Re A over all SSMs, for the parts that this process holds, as [min, -max] of
    the log: (2,).
    """
    scales = {}
    for name, symbol in (("log_dt", "dt"), ("log_A_real", "decay")):
        # a state space of another kind may have other parameters
        parameters = local_shards(
            getattr(m, name)
            for m in model.modules()
            if isinstance(m, StateSpace) and hasattr(m, name)
        )
        if not parameters:
            continue

        values = torch.cat([p.reshape(-1) for p in parameters])
        none = torch.full((2,), math.inf, device=values.device)  # this process has no value
        scales[symbol] = torch.stack([values.min(), -values.max()]) if values.numel() else none
    return scales
