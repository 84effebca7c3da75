"""Measured time and memory of models on this machine.

Models take turns (A B A B ...) in one process, so that a drift of the machine falls on all of them alike; each figure
is a median with its quartiles. A large matrix product takes its turn among them: a model's Gflops over its time are
given as a fraction of that product's rate. Peak memory is that of a fresh process on the CPU, and of the allocator on
CUDA.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from diffussm_cli.config import Config, SampleConfig
from diffussm_cli.device import is_out_of_memory, keep_freed_memory
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.diffusion.sampling import make_scheduler, sample
from diffussm_cli.generation import cast_products, make_denoiser
from diffussm_cli.model import build_model
from diffussm_cli.model.s4d import S4D
from diffussm_cli.profiling.flops import cost

FORWARD, TRAINING, GUIDED = "forward", "forward+backward", "guided step"
KINDS = (FORWARD, TRAINING, GUIDED)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "linear")  # in place or not
ATTENTION = "scaled_dot_product"
SSM = "S4D"


@dataclass(frozen=True)
class Setting:
    """How everything is measured."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of autocast; float32 for none
    batch_size: int = 1
    repeats: int = 5
    depth: int | None = None  # measure that many blocks and scale to all


class Timing(NamedTuple):
    """Milliseconds of one call: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One model at one kind of work. `shares` are of time: products, attention, SSM, rest (forward only)."""

    time: Timing
    rate: float  # multiply-adds a second over the rate of a large matrix product
    images_per_second: float
    peak_bytes: int | None
    shares: dict[str, float]
    blocks: int  # measured; fewer than the model has: scaled


# --------------------------------------------------------------------------------------------------- the work
def build(config: Config, setting: Setting, depth: int) -> nn.Module:
    """A model of `depth` blocks with small random weights: the published start would multiply by zeros."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=depth))
    with torch.device("meta"):
        model = build_model(config)
    model = model.to_empty(device=setting.device)
    model.fill_position()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, S4D):
                module.reset_parameters()
    return model


def workload(model: nn.Module, config: Config, kind: str, setting: Setting) -> Callable[[], None]:
    """What is timed: one call on a fixed batch. The model is put into train or eval mode by the first call."""
    B, device = setting.batch_size, setting.device
    x = torch.randn(B, model.in_channels, *model.input_size, device=device)
    t = torch.full((B,), 500, device=device)
    y = torch.zeros(B, dtype=torch.long, device=device) if model.num_classes else None
    process = GaussianDiffusion.from_config(config.diffusion, device)
    how = SampleConfig(guidance=1.5 if model.num_classes else 1.0)
    denoise = make_denoiser(model, process, how, y)
    generators = [torch.Generator() for _ in range(B)]

    def forward() -> None:
        with torch.no_grad():
            model(x, t, y)

    def forward_backward() -> None:
        model(x, t, y).square().mean().backward()
        model.zero_grad()

    def guided_step() -> None:
        sample(denoise, make_scheduler("ddpm", process, 1, model.learn_sigma), x, generators)

    if kind != TRAINING:
        cast_products(model, setting.dtype)  # as sampling does
    call = {FORWARD: forward, TRAINING: forward_backward, GUIDED: guided_step}[kind]

    def run() -> None:
        if model.training != (kind == TRAINING):
            model.train(kind == TRAINING)  # forgets kept kernels, so only where it must change
        with torch.autocast(device.type, setting.dtype, enabled=setting.dtype != torch.float32):
            call()

    return run


def product(setting: Setting, rows: int = 4096, width: int = 1152) -> tuple[Callable[[], None], float]:
    """A matrix product of the size that XL has at 512, and its multiply-adds."""
    x = torch.randn(rows, width, device=setting.device, dtype=setting.dtype)
    W = torch.randn(2 * width, width, device=setting.device, dtype=setting.dtype)
    return lambda: nn.functional.linear(x, W), rows * width * 2 * width


# --------------------------------------------------------------------------------------------------- the clock
def take_turns(calls: Sequence[Callable[[], None]], setting: Setting) -> list[list[float]]:
    """Milliseconds of every repeat of each call, after one warm-up each, in turn."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(setting.repeats):
        for call, taken in zip(calls, times):
            taken.append(_milliseconds(call, setting.device))
    return times


def _milliseconds(call: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        if device.type == "mps":
            torch.mps.synchronize()
        return 1e3 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream(device))
    call()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return start.elapsed_time(end)


def summary(times: Sequence[float]) -> Timing:
    """Median and quartiles."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), low, high)


# ------------------------------------------------------------------------------------------- where time goes
def shares(model: nn.Module, call: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Shares of one call's time in matrix products, fused attention, the SSM, and the rest."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _ssm_named(model), profile(activities=activities) as profiler:
        call()
    unit = "device" if device.type == "cuda" else "cpu"
    self_time, whole_time = f"self_{unit}_time_total", f"{unit}_time_total"
    # Kernels on a GPU have entries of their own; their time is in those of the operators already.
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
    """Profiles show S4D layers as one range."""
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


# ---------------------------------------------------------------------------------------------------- memory
def peak_bytes(config: Config, kind: str, setting: Setting) -> int | None:
    """Peak memory of one kind of work, weights included; None where the system does not tell.

    Raises:
        MemoryError: if it does not fit.
    """
    wanted = config.model.depth
    depth = min(setting.depth or wanted, wanted)
    peak = _peak_in_child(config, kind, setting, depth)
    if depth == wanted or peak is None:
        return peak
    less = depth // 2 or 2
    a_block = (peak - _peak_in_child(config, kind, setting, less)) / (depth - less)
    return int(peak + a_block * (wanted - depth))


def _peak_in_child(config: Config, kind: str, setting: Setting, depth: int) -> int | None:
    """In a process of its own: on the CPU, peak memory is a figure of the process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_here, config, kind, setting, depth, available_bytes()).result()
        except BrokenProcessPool as e:
            raise MemoryError("the system ended the process") from e


def _peak_here(config: Config, kind: str, setting: Setting, depth: int, limit: int | None) -> int | None:
    with torch.device("meta"):
        build_model(config)  # torch loads parts of itself late; they are not the model's, and must not meet the limit
    if limit is not None and setting.device.type == "cpu":
        _limit_memory(limit)
    keep_freed_memory()
    before = resident_peak()
    try:
        call = workload(build(config, setting, depth), config, kind, setting)
        call()
        call()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise MemoryError(str(e)) from e
    if setting.device.type == "cuda":
        return torch.cuda.max_memory_allocated(setting.device)
    return None if before is None else resident_peak() - before


def available_bytes(device: torch.device | None = None) -> int | None:
    """Free memory of a CUDA device; else of the machine, where the system says so (Linux)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def resident_peak() -> int | None:
    """Most memory that this process has held at a time, bytes, where the system says so (Linux)."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM")


def _kilobytes(path: Path, field: str) -> int | None:
    if not path.is_file():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    return 1024 * int(fields[field].split()[0])


def _limit_memory(size: int) -> None:
    """Make an allocation that does not fit fail in this process, before the system ends another."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))


# ------------------------------------------------------------------------------------------------- everything
def measure(configs: Sequence[Config], kind: str, setting: Setting) -> list[Measured | None]:
    """Time and memory of several models at one kind of work, in turn; None for one that does not fit into memory."""
    peaks = [_fits(config, kind, setting) for config in configs]
    models = [_Model(config, kind, setting) if fits else None for config, (fits, _) in zip(configs, peaks)]
    reference, macs = product(setting)
    calls = [reference, *(call for model in models if model for call in model.calls)]
    times = iter(take_turns(calls, setting))
    best = macs / summary(next(times)).median
    return [m and m.result(times, best, peak) for m, (_, peak) in zip(models, peaks)]


def _fits(config: Config, kind: str, setting: Setting) -> tuple[bool, int | None]:
    try:
        return True, peak_bytes(config, kind, setting)
    except MemoryError:
        return False, None


class _Model:
    """A model in the row of those that take turns; beside one of fewer blocks, the same without any."""

    def __init__(self, config: Config, kind: str, setting: Setting):
        self.config, self.kind, self.setting = config, kind, setting
        self.blocks = min(setting.depth or config.model.depth, config.model.depth)
        depths = [self.blocks] if self.blocks == config.model.depth else [self.blocks, 0]
        self.models = [build(config, setting, depth) for depth in depths]
        self.calls = [workload(model, config, kind, setting) for model in self.models]

    def result(self, times: Iterator[list[float]], best: float, peak: int | None) -> Measured:
        """What came of it; `best` in multiply-adds a millisecond."""
        time = summary(self._whole([next(times) for _ in self.calls]))
        B = self.setting.batch_size
        per_image = {FORWARD: 1, TRAINING: 3, GUIDED: 2 if self.config.model.num_classes else 1}[self.kind]
        macs = cost(self.config).gflops * 1e9 * per_image * B
        parts = shares(self.models[0], self.calls[0], self.setting.device) if self.kind == FORWARD else {}
        return Measured(time, macs / time.median / best, 1e3 * B / time.median, peak, parts, self.blocks)

    def _whole(self, found: list[list[float]]) -> list[float]:
        """Times of all blocks, repeat by repeat, from those of some blocks and of none."""
        if len(found) == 1:
            return found[0]
        times = self.config.model.depth / self.blocks
        return [shell + (some - shell) * times for some, shell in zip(*found)]


def exponent(lengths: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log(time) against log(L) by least squares."""
    x, y = ([math.log(v) for v in values] for values in (lengths, times))
    return statistics.linear_regression(x, y).slope
