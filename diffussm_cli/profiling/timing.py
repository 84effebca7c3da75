"""Time and memory of models on this machine, with random weights.

Models take turns (A B A B ...) in one process, so that drift of the machine affects all of them
alike. Each figure is a median with its quartiles. A large matrix product takes turns with the
models, and the rate of a model (its Gflops over its time) is given as a fraction of the rate of
that product.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffussm_cli.config import Config, SampleConfig
from diffussm_cli.data.text import Text
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.diffusion.samplers import make_scheduler
from diffussm_cli.diffusion.schedulers import sample
from diffussm_cli.machine.device import is_out_of_memory
from diffussm_cli.model import Backbone, build_model
from diffussm_cli.model.mixer import StateSpace, kept_kernels
from diffussm_cli.profiling.flops import cost
from diffussm_cli.sampling.generate import make_denoiser
from diffussm_cli.sampling.precision import cast_products

FORWARD = "forward"
TRAINING = "forward+backward"
GUIDED = "guided step"
KINDS = (FORWARD, TRAINING, GUIDED)


@dataclass(frozen=True)
class Setting:
    """How time and memory are measured."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of autocast; float32 means no autocast
    batch_size: int = 1
    repeats: int = 5
    compiled: bool = False  # with torch.compile


# ---------------------------------------------------------------------------------- what is timed
def random_model(config: Config, setting: Setting) -> Backbone:
    """A model with small random weights: the published initialisation would multiply by zeros."""
    with torch.device("meta"):
        model = build_model(config)
    model.materialize(setting.device)

    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, StateSpace):
                module.reset_parameters()

    if setting.compiled:
        model.compile_blocks()
    return model


def workload(model: Backbone, config: Config, kind: str, setting: Setting) -> Callable[[], None]:
    """The call to time, on a fixed batch. Its first run puts the model into train or eval mode."""
    # A batch: noise, one timestep, one class, one caption.
    device = setting.device
    B = setting.batch_size
    x = torch.randn(B, model.in_channels, *model.input_size, device=device)
    t = torch.full((B,), 500, device=device)
    y = torch.zeros(B, dtype=torch.long, device=device) if model.num_classes else None
    text = None
    if model.text_width:
        text = torch.ones(B, 1 + model.text_tokens, model.text_width, device=device)

    def forward() -> None:
        with torch.no_grad():
            model(x, t, y, text)

    def forward_backward() -> None:
        model(x, t, y, text).square().mean().backward()
        model.zero_grad()

    # One step of DDPM, guided if the model has a condition.
    process = GaussianDiffusion.from_config(config.diffusion, device)
    request = SampleConfig(guidance=1.5 if model.num_classes or model.text_width else 1.0)
    captions = None if text is None else Text(text)
    denoise = make_denoiser(model, process, request, y, captions)
    generators = [torch.Generator() for _ in range(B)]

    def guided_step() -> None:
        sample(denoise, make_scheduler("ddpm", process, 1, model.learn_sigma), x, generators)

    call = {FORWARD: forward, TRAINING: forward_backward, GUIDED: guided_step}[kind]
    if kind != TRAINING:
        cast_products(model, setting.dtype)  # as sampling does

    def run() -> None:
        if model.training != (kind == TRAINING):
            model.train(kind == TRAINING)  # walks all modules, so only if the mode changes
        with torch.autocast(device.type, setting.dtype, enabled=setting.dtype != torch.float32):
            call()

    return run


def product(
    setting: Setting,
    rows: int = 4096,
    width: int = 1152,
) -> tuple[Callable[[], object], float]:
    """A matrix product of the size that XL uses at 512, and its multiply-adds."""
    x = torch.randn(rows, width, device=setting.device, dtype=setting.dtype)
    W = torch.randn(2 * width, width, device=setting.device, dtype=setting.dtype)
    return lambda: nn.functional.linear(x, W), rows * width * 2 * width


# --------------------------------------------------------------------------------------- the clock
def take_turns(calls: Sequence[Callable[[], object]], setting: Setting) -> list[list[float]]:
    """Milliseconds of every repeat of each call; the calls take turns after one warm-up each."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(setting.repeats):
        for call, times_of_call in zip(calls, times):
            times_of_call.append(_milliseconds(call, setting.device))
    return times


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    # On CUDA by events on the stream of the measured device, which need not be the current one.
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end)

    began = time.perf_counter()
    call()
    if device.type == "mps":
        torch.mps.synchronize()
    return 1e3 * (time.perf_counter() - began)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low = median = high = times[0]
    if len(times) > 1:
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_ms": median, "low_ms": low, "high_ms": high}


def exponent(lengths: Sequence[int], times: Sequence[float]) -> float:
    """The slope of log(time) against log(L) by least squares."""
    x = [math.log(length) for length in lengths]
    y = [math.log(milliseconds) for milliseconds in times]
    return statistics.linear_regression(x, y).slope


# ---------------------------------------------------------------------------------------- measuring
def measure(
    configs: Sequence[Config],
    kind: str,
    setting: Setting,
) -> list[dict[str, Any] | None]:
    """Time and memory of several models at one kind of work; None for one that does not fit.

    The models take turns. Times are in milliseconds per batch. `of_product_rate` is the rate in
    multiply-adds, relative to a large matrix product. `peak_bytes` is the peak of the allocator
    with the weights, on CUDA, and None elsewhere.
    """
    with contextlib.ExitStack() as kernels:
        prepared = [_prepare(config, kind, setting, kernels) for config in configs]
        reference, reference_macs = product(setting)
        calls = [reference, *(call for call, _ in filter(None, prepared))]
        times = iter(take_turns(calls, setting))
    product_rate = reference_macs / summary(next(times))["median_ms"]

    results: list[dict[str, Any] | None] = []
    for config, fits in zip(configs, prepared):
        if fits is None:
            results.append(None)
            continue
        time_of_batch = summary(next(times))
        milliseconds = time_of_batch["median_ms"]
        passes = {FORWARD: 1, TRAINING: 3, GUIDED: 2 if config.model.is_conditional else 1}[kind]
        macs = cost(config).gflops * 1e9 * passes * setting.batch_size
        results.append(
            {
                **time_of_batch,
                "images_per_second": 1e3 * setting.batch_size / milliseconds,
                "of_product_rate": macs / milliseconds / product_rate,
                "peak_bytes": fits[1],
            }
        )
    return results


def _prepare(
    config: Config,
    kind: str,
    setting: Setting,
    kernels: contextlib.ExitStack,
) -> tuple[Callable[[], None], int | None] | None:
    """A model's call, run twice, and its peak memory on CUDA; None if it does not fit.

    Until `kernels` is closed the model keeps its kernels, as while images are drawn.
    """
    device = setting.device
    on_cuda = device.type == "cuda"
    if on_cuda:
        other_models = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    try:
        with _limited_memory(device):
            model = random_model(config, setting)
            call = workload(model, config, kind, setting)
            kernels.enter_context(kept_kernels(model))
            call()
            call()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return None

    peak = torch.cuda.max_memory_allocated(device) - other_models if on_cuda else None
    return call, peak


# ------------------------------------------------------------------------------------------ memory
def available_bytes(device: torch.device) -> int | None:
    """Free memory of a CUDA device, otherwise of the machine, if the system reports it (Linux)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _bytes_in(Path("/proc/meminfo"), "MemAvailable")


@contextlib.contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """Make allocations that do not fit fail on a CPU, before the system kills this process."""
    free = available_bytes(device)
    used = _bytes_in(Path("/proc/self/status"), "VmData")
    if device.type != "cpu" or free is None or used is None:
        yield
        return

    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + free if hard == resource.RLIM_INFINITY else min(used + free, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _bytes_in(file: Path, field: str) -> int | None:
    """A field that Linux reports in kilobytes; None on other systems."""
    if not file.is_file():
        return None
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    return None
