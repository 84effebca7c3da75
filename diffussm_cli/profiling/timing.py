"""Measured time of models on this machine.

Models take turns (A B A B ...) in one process, so that drift of the machine affects all of them alike. Each figure is a
median with its quartiles. A large matrix product takes turns with the models, and the rate of a model (its Gflops over
its time) is given as a fraction of the rate of that product.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from diffussm_cli.config import Config
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.memory import peak_bytes
from diffussm_cli.profiling.work import FORWARD, GUIDED, TRAINING, Setting, build, product, workload

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "linear")  # in place or not
ATTENTION = "scaled_dot_product"
SSM = "S4D"


# --------------------------------------------------------------------------------------------------- the clock
def take_turns(calls: Sequence[Callable[[], object]], setting: Setting) -> list[list[float]]:
    """Run the calls in turn after one warm-up each; returns the milliseconds of every repeat of each call."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(setting.repeats):
        for call, taken in zip(calls, times):
            taken.append(_milliseconds(call, setting.device))
    return times


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        if device.type == "mps":
            torch.mps.synchronize()
        return 1e3 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * [times[0]]
    return {"median_ms": median, "low_ms": low, "high_ms": high}


# ------------------------------------------------------------------------------------------- where time goes
def shares(model: nn.Module, call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Shares of one call's time spent in matrix products, fused attention, the SSM, and the rest."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _ssm_named(model), profile(activities=activities) as profiler:
        call()
    unit = "device" if device.type == "cuda" else "cpu"
    self_time, whole_time = f"self_{unit}_time_total", f"{unit}_time_total"
    # GPU kernels have entries of their own, but the entries of the operators already include their time.
    events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]
    total = sum(getattr(e, self_time) for e in events)
    named = {"products": 0.0, "attention": 0.0, "SSM": 0.0}
    for e in events:
        name = e.key.removeprefix("aten::").removesuffix("_")
        if e.key == SSM:
            named["SSM"] += getattr(e, whole_time)
        elif name in PRODUCTS:
            named["products"] += getattr(e, self_time)
        elif ATTENTION in name:
            named["attention"] += getattr(e, self_time)
    found = {kind: seconds / total for kind, seconds in named.items()}
    return found | {"rest": 1 - sum(found.values())}


@contextlib.contextmanager
def _ssm_named(model: nn.Module) -> Iterator[None]:
    """Make profiles show every S4D layer as one range."""
    ranges, hooks = [], []

    def enter(*_) -> None:
        ranges.append(torch.profiler.record_function(SSM))
        ranges[-1].__enter__()

    def leave(*_) -> None:
        ranges.pop().__exit__(None, None, None)

    for module in model.modules():
        if isinstance(module, S4D):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ------------------------------------------------------------------------------------------------- everything
def measure(configs: Sequence[Config], kind: str, setting: Setting) -> list[dict[str, Any] | None]:
    """Time and memory of several models at one kind of work, in turn; None for one that does not fit.

    Times are in milliseconds per batch; if only some blocks were measured, they are scaled to all. `of_product_rate` is
    the rate in multiply-adds, relative to a large matrix product. `shares` of the time are products, attention, SSM and
    rest, of a forward pass only.
    """
    peaks = [_fits(config, kind, setting) for config in configs]
    models = [_Model(config, kind, setting) if fits else None for config, (fits, _) in zip(configs, peaks)]
    reference, macs = product(setting)
    calls = [reference, *(call for model in models if model for call in model.calls)]
    times = iter(take_turns(calls, setting))
    best = macs / summary(next(times))["median_ms"]
    return [m.result(times, best, peak) if m else None for m, (_, peak) in zip(models, peaks)]


def _fits(config: Config, kind: str, setting: Setting) -> tuple[bool, int | None]:
    try:
        return True, peak_bytes(config, kind, setting)
    except MemoryError:
        return False, None


class _Model:
    """A model that takes turns; if only some blocks are measured, the same model without blocks does too."""

    def __init__(self, config: Config, kind: str, setting: Setting):
        self.config, self.kind, self.setting = config, kind, setting
        self.blocks = min(setting.depth or config.model.depth, config.model.depth)
        depths = [self.blocks] if self.blocks == config.model.depth else [self.blocks, 0]
        self.models = [build(config, setting, depth) for depth in depths]
        self.calls = [workload(model, config, kind, setting) for model in self.models]

    def result(self, times: Iterator[list[float]], best: float, peak: int | None) -> dict[str, Any]:
        """Summarise the times; `best` is in multiply-adds per millisecond."""
        found = summary(self._whole([next(times) for _ in self.calls]))
        B = self.setting.batch_size
        per_image = {FORWARD: 1, TRAINING: 3, GUIDED: 2 if self.config.model.num_classes else 1}[self.kind]
        macs = cost(self.config).gflops * 1e9 * per_image * B
        return {
            **found,
            "images_per_second": 1e3 * B / found["median_ms"],
            "of_product_rate": macs / found["median_ms"] / best,
            "peak_bytes": peak,
            "shares": shares(self.models[0], self.calls[0], self.setting.device) if self.kind == FORWARD else {},
            "blocks_measured": self.blocks,
            "scaled": self.blocks < self.config.model.depth,
        }

    def _whole(self, found: list[list[float]]) -> list[float]:
        """Times with all blocks, repeat by repeat, from those with some blocks and with none."""
        if len(found) == 1:
            return found[0]
        factor = self.config.model.depth / self.blocks
        return [shell + (some - shell) * factor for some, shell in zip(*found)]


def exponent(lengths: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log(time) against log(L) by least squares."""
    x, y = ([math.log(v) for v in values] for values in (lengths, times))
    return statistics.linear_regression(x, y).slope
