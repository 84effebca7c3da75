"""Speed and memory of the SSM core against what it could cost: its own matrix products, and the
textbook form.

    python benchmarks/speed/core.py [ROW ...] [--device cuda] [--toy]

Rows: kernel, step, block, block_bf16, parts, public, saved, traffic, ceilings, convolutions,
convolutions_compiled, top, length, beside_dit, memory, options, axial, compiled; by default all.

Everything is measured in turn in one process; ratios of medians are what counts. Prints one JSON
object a line.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from diffussm_cli.config import Config, config_from_dict, load_config, to_dict
from diffussm_cli.machine.device import keep_freed_memory
from diffussm_cli.model.block import DiffuSSMBlock
from diffussm_cli.model.mixers import axial as axial_mixer
from diffussm_cli.model.mixers.axial import Axial
from diffussm_cli.model.s4d import numerics
from diffussm_cli.model.s4d.chunks import chunk_convolution
from diffussm_cli.model.s4d.convolution import Convolution, KernelSpectra
from diffussm_cli.model.s4d.kernel import Modes, s4d_kernel
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.model.s4d.reference import s4d_kernel_naive
from diffussm_cli.profiling import timing
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.paper import display_name, named_model
from diffussm_cli.profiling.plan import Noise
from diffussm_cli.sampling.precision import cast_products
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.step import Step

D, N, M = 1152, 64, 2  # of XL
SHORT, LONG = 1024, 4096  # tokens of a 256 and of a 512 image
SIDES = (32, 64, 128, 256)  # of latents, in the row `length`
RESOLUTIONS = (256, 512, 1024)  # of images, in the row `beside_dit`
AXIAL_SIDES = {64: 64, 128: 32, 256: 16, 512: 4, 1024: 2}  # tokens a side: channels
LARGE = 2048  # pixels of an image's side, in the row `memory`
IMAGES = 32  # of a batch, in the rows `convolutions` and `top`
SIDE = 8192  # of the matrices in the row `ceilings`
NO_DEVICE_TIMES = "the profiler saw no times of the device; it may need another permission (CUPTI)"
SMALLER: list[str] = []  # settings that make models of presets small; with --toy
BACKEND = "inductor"  # of torch.compile


class TextbookS4D(nn.Module):
    """S4D as the public layer computes it: every exponential of the Vandermonde matrix, autograd
    through torch.fft.
    """

    def __init__(self, s4d: S4D):
        super().__init__()
        self.s4d = s4d

    def forward(self, u: Tensor) -> Tensor:
        s, (J, M) = self.s4d, u.shape[2:]
        u = u.flatten(2).float()  # (B, D, L)
        L = u.shape[-1]
        # (2, D, L)
        K = s4d_kernel_naive(s.log_dt.exp(), -s.log_A_real.exp(), s.A_imag, s.B, s.C, L)
        U = torch.fft.rfft(u, n=2 * L)
        forward, backward = torch.fft.rfft(K, n=2 * L)
        y = torch.stack(
            [torch.fft.irfft(U * S, n=2 * L)[..., :L] for S in (forward, backward.conj())], 1
        )
        return (y + u[:, None] * s.D_skip[..., None]).flatten(1, 2).unflatten(2, (J, M))


def in_turn(
    calls: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Medians in milliseconds, and every ratio to the last one."""
    setting = timing.Setting(device, repeats=repeats)
    times = timing.take_turns(list(calls.values()), setting)
    medians = {name: statistics.median(taken) for name, taken in zip(calls, times)}
    reference = list(medians.values())[-1]
    return {f"{name}_ms": t for name, t in medians.items()} | {
        f"{name}_ratio": t / reference for name, t in medians.items()
    }


def make_block(device: torch.device) -> DiffuSSMBlock:
    block = DiffuSSMBlock(D, M, N).to(device)
    for name, p in block.named_parameters():
        if "s4d" not in name:
            nn.init.normal_(p, std=0.02)
    return block


def kernel(device: torch.device) -> dict:
    """One direction of XL's kernel: two-level against the definition, and both against float64."""
    results = {}
    for L in (SHORT, LONG):
        s = S4D(D, N).to(device)
        parameters = [
            p[:1].detach() for p in (s.log_dt.exp(), -s.log_A_real.exp(), s.A_imag, s.B, s.C)
        ]
        exact = s4d_kernel(*(p.double() for p in parameters), L)
        naive = s4d_kernel_naive(*parameters, L)
        ours = s4d_kernel(*parameters, L)
        worst = [
            ((k - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item() for k in (ours, naive)
        ]
        calls = {
            "naive": lambda p=parameters, L=L: s4d_kernel_naive(*p, L),
            "ours": lambda p=parameters, L=L: s4d_kernel(*p, L),
        }
        results[L] = in_turn(calls, device, 3) | {
            "worst_error": worst[0],
            "worst_error_naive": worst[1],
        }
        results[L] |= {
            "peak_mib": _peak_mib(calls["ours"]),
            "naive_peak_mib": _peak_mib(calls["naive"]),
        }
    return results


def _peak_mib(call: Callable[[], object]) -> float:
    """Most memory that was allocated at one time, by torch's own account."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak / 2**20


def step(device: torch.device) -> dict:
    """Kernels forward and backward beside a training step of the block at batch 8."""
    results = {}
    for L in (SHORT, LONG):
        block, s = make_block(device), S4D(D, N).to(device)
        x, c = torch.randn(8, L // M, D, device=device), torch.randn(8, D, device=device)

        def train(block=block, x=x, c=c) -> None:
            block(x, c).square().mean().backward()
            block.zero_grad()

        def kernels(s=s, L=L) -> None:
            s.taps(L).square().mean().backward()
            s.zero_grad()

        results[L] = in_turn({"kernels": kernels, "block": train}, device, 3)
    return results


def block(device: torch.device, dtype: torch.dtype = torch.float32) -> dict:
    """XL's block at L = 4096 and one image, forward and forward + backward, against its matrix
    products alone.
    """
    L = LONG
    model, x, c = (
        make_block(device),
        torch.randn(1, L // M, D, device=device),
        torch.randn(1, D, device=device),
    )
    shapes = (
        [(D, D)]
        + [(D, D)] * M
        + [(2 * D, 2 * D // M)] * M
        + [(D, 2 * D), (2 * D, 2 * D), (2 * D, D)]
    )
    weights = [torch.randn(o, i, device=device, dtype=dtype) * 0.02 for i, o in shapes]
    inputs = [torch.randn(L // M, i, device=device, dtype=dtype) for i, _ in shapes]
    outputs = [torch.randn(L // M, o, device=device, dtype=dtype) for _, o in shapes]
    casts = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    sampled = copy.deepcopy(model).eval()
    cast_products(sampled, dtype)  # as `sample` does

    def forward() -> None:
        with torch.no_grad(), casts:
            sampled(x, c)

    def products() -> None:
        for W, v in zip(weights, inputs):
            F.linear(v, W)

    def forward_backward() -> None:
        with casts:
            y = model(x.requires_grad_(), c).sum()
        y.backward()
        model.zero_grad()

    def products_backward() -> None:
        for W, v, dy in zip(weights, inputs, outputs):
            F.linear(v, W), dy @ W, dy.mT @ v

    return {
        "forward": in_turn({"block": forward, "products": products}, device, 9),
        "forward+backward": in_turn(
            {"block": forward_backward, "products": products_backward}, device, 5
        ),
    }


def block_bf16(device: torch.device) -> dict:
    """The same in bfloat16, by autocast, where there is hardware for it."""
    return block(device, torch.bfloat16)


KINDS = {  # of the operators that do work themselves; what is not named is elementwise
    "products": ("mm", "addmm", "bmm", "baddbmm", "mkldnn_linear", "linear"),
    "FFT": ("_fft_r2c", "_fft_c2r"),
    "copies": ("copy_", "fill_", "cat", "constant_pad_nd"),
}


def parts(device: torch.device) -> dict:
    """Shares of time in XL's block at L = 4096 and one image by kind of work, of which making the
    kernels is one.
    """
    x, c = torch.randn(1, LONG // M, D, device=device), torch.randn(1, D, device=device)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_block(device)

        def train(model=model, dtype=dtype) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = model(x.requires_grad_(), c).sum()
            y.backward()
            model.zero_grad()

        results[f"forward+backward {dtype}"] = _shares(train, device)
        sampled = copy.deepcopy(model).eval()
        cast_products(sampled, dtype)

        def forward(model=sampled, dtype=dtype) -> None:
            with (
                torch.no_grad(),
                torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            ):
                model(x, c)

        results[f"forward {dtype}"] = _shares(forward, device)
    return results


def _shares(call: Callable[[], object], device: torch.device) -> dict[str, float | str]:
    """Percent of the operators' own time by kind, of a few calls after others under the same
    profiler.
    """
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    def in_kernel(function: Callable) -> Callable:
        def recorded(*arguments):
            with record_function("kernels"):
                return function(*arguments)

        return recorded

    times: Counter[str] = Counter()

    def add_up(profiler: profile) -> None:
        for event in profiler.events():
            if event.name.startswith("aten::"):
                times[_kind(event)] += getattr(event, own_time)

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    own_time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    with (
        patch.object(S4D, "taps", in_kernel(S4D.taps)),
        patch.object(Modes, "backward", staticmethod(in_kernel(Modes.backward))),
        profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=5, active=3, repeat=1),
            on_trace_ready=add_up,
        ) as profiler,
    ):
        for _ in range(8):
            call()
            profiler.step()
    if not times.total():
        return {"left out": NO_DEVICE_TIMES}
    return {kind: round(100 * time / times.total(), 1) for kind, time in times.most_common()}


def _kind(event) -> str:
    above = event.cpu_parent
    while above is not None:
        if above.name == "kernels":
            return "kernels"
        above = above.cpu_parent
    name = event.name.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name in names), "elementwise")


def public(device: torch.device) -> dict:
    """The block with its S4D layer and with the textbook one, forward + backward at batch 4."""
    results = {}
    for L in (SHORT, LONG):
        ours, textbook = make_block(device), make_block(device)
        textbook.s4d = TextbookS4D(textbook.s4d)
        x, c = torch.randn(4, L // M, D, device=device), torch.randn(4, D, device=device)

        def train(model, x=x, c=c) -> None:
            model(x, c).square().mean().backward()
            model.zero_grad()

        calls = {"textbook": lambda m=textbook, f=train: f(m), "ours": lambda m=ours, f=train: f(m)}
        results[L] = in_turn(calls, device, 2)
    return results


def saved(device: torch.device) -> dict:
    """What autograd keeps for a block at batch 4, L = 1024: ours, also checkpointed, and with the
    textbook layer.
    """
    sizes_mib = {}
    x, c = (
        torch.randn(4, 512, D, device=device, requires_grad=True),
        torch.randn(4, D, device=device),
    )
    for name in ("ours", "checkpointed", "textbook"):
        model = make_block(device)
        if name == "textbook":
            model.s4d = TextbookS4D(model.s4d)
        weights, kept, sizes = {p.untyped_storage().data_ptr() for p in model.parameters()}, [], {}

        def pack(t: Tensor, weights=weights, kept=kept, sizes=sizes) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(t)  # so that no address is used twice
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            checkpoint(model, x, c, use_reentrant=False) if name == "checkpointed" else model(x, c)
        sizes_mib[f"{name}_mib"] = sum(sizes.values()) / 2**20
    return sizes_mib | {
        f"{name}_ratio": sizes_mib[f"{name}_mib"] / sizes_mib["textbook_mib"]
        for name in ("ours", "checkpointed")
    }


def length(device: torch.device) -> dict:
    """Time of two blocks of S against L, 1k to 64k tokens, and the exponent of the fit."""
    setting = timing.Setting(device, repeats=3)
    config = load_config("s-256", [*SMALLER, "model.depth=2"])
    model = timing.random_model(config, setting).eval()
    t, y = torch.tensor([500], device=device), torch.tensor([1], device=device)

    def forward(side: int) -> None:
        with torch.no_grad():
            model(torch.randn(1, 4, side, side, device=device), t, y)

    times = timing.take_turns([lambda side=side: forward(side) for side in SIDES], setting)
    medians = [statistics.median(taken) for taken in times]
    tokens = [side**2 for side in SIDES]
    return {"tokens": tokens, "ms": medians, "exponent": timing.exponent(tokens, medians)}


def beside_dit(device: torch.device) -> dict:
    """Milliseconds of a forward pass of one image, by resolution and model, of the first blocks
    scaled to all.

    A model with two blocks takes turns with the same model with one; the other blocks take as long
    as the second one. So models are timed that take minutes for a pass, or do not fit.
    """
    results = {}
    setting = timing.Setting(device, repeats=3)
    for resolution in RESOLUTIONS:
        configs = [named_model(name, resolution) for name in ("xl", "dit-xl/2", "dit-xl/1")]
        calls = []
        for config, blocks in itertools.product(configs, (1, 2)):
            few = config_from_dict(to_dict(config), "", [*SMALLER, f"model.depth={blocks}"])
            model = timing.random_model(few, setting)
            calls.append(timing.workload(model, few, timing.FORWARD, setting))
        medians = [statistics.median(times) for times in timing.take_turns(calls, setting)]
        results[resolution] = {
            display_name(config): one + (config.model.depth - 1) * (two - one)
            for config, one, two in zip(configs, medians[::2], medians[1::2])
        }
    return results


def memory(device: torch.device) -> dict:
    """Peak memory of a 2048 x 2048 image through XL without gradients: of four blocks, and the
    weights of all.

    At this length a block keeps nothing, so that more blocks take no more memory than their
    weights.
    """
    all_blocks, four = (
        load_config("xl-256", [*SMALLER, f"data.resolution={LARGE}", f"model.depth={n}"])
        for n in (29, 4)
    )
    setting = timing.Setting(device)
    call = timing.workload(timing.random_model(four, setting), four, timing.FORWARD, setting)
    return {"peak_gib": (_peak_mib(call) * 2**20 + 4 * cost(all_blocks).parameters) / 2**30}


def compiled(device: torch.device) -> dict:
    """Training steps by torch.compile against eager ones: `mnist-noise` at its batch, XL's block at
    4 x 1024 tokens.
    """
    calls = {
        name: _training(device, [f"train.compile={name == 'compiled'}"])[1]
        for name in ("compiled", "eager")
    }
    results = {"mnist": _first_call(calls["compiled"]) | in_turn(calls, device, 25)}
    results["mnist"] |= {
        f"{name}_images_a_second": 16e3 / results["mnist"][f"{name}_ms"] for name in calls
    }
    x, c = torch.randn(4, SHORT // M, D, device=device), torch.randn(4, D, device=device)
    for name in calls:
        model = make_block(device)
        if name == "compiled":
            model.compile()  # as `Backbone.compile_blocks` does

        def train(model=model) -> None:
            model(x, c).square().mean().backward()
            model.zero_grad()

        calls[name] = train
    return results | {"block": _first_call(calls["compiled"]) | in_turn(calls, device, 9)}


def _training(device: torch.device, overrides: Sequence[str]) -> tuple[Config, Callable[[], None]]:
    """The configuration of a changed `mnist-noise`, and its training step on one batch of noise."""
    config = load_config("mnist-noise", [f"train.device={device}", *SMALLER, *overrides])
    batch = make_batch(Noise(config), config, 0)
    step = Step(config, device)
    return config, lambda: step.update(batch)


def convolutions(device: torch.device) -> dict:
    """The convolution of XL at a batch of 32 in bfloat16, its kernels included: by chunks, by
    Triton where there is a GPU, and by FFT; forward and backward apart.

    Beside the milliseconds stand the relative errors of y, du and the gradient of C in a few
    channels, against float64. `first` is the seconds of the first call.
    """
    return _convolutions(device, ["chunk", *(["triton"] if device.type == "cuda" else [])])


def convolutions_compiled(device: torch.device) -> dict:
    """The same by compiled chunks and by FFT; the first call compiles, so that this row comes
    after the other.
    """
    return _convolutions(device, ["chunk_compiled"])


def _convolutions(device: torch.device, names: list[str]) -> dict:
    def by_fft(s4d: S4D, u: Tensor) -> Tensor:
        return Convolution.apply(u, KernelSpectra.apply(s4d.taps(u.shape[2] * u.shape[3])))

    def by_chunks(s4d: S4D, u: Tensor) -> Tensor:
        return chunk_convolution(u, s4d.chunked(u.shape[2] * u.shape[3]))

    def by_triton(s4d: S4D, u: Tensor) -> Tensor:
        from diffussm_cli.model.s4d.fused import fused_convolution  # not on every machine

        return fused_convolution(u, *s4d.kernel_parameters())

    results = {}
    for L in (SHORT, LONG):
        compiled = torch.compile(by_chunks, dynamic=False, backend=BACKEND)
        others = {"chunk": by_chunks, "chunk_compiled": compiled, "triton": by_triton}
        ways = {name: others[name] for name in names} | {"fft": by_fft}

        # The layouts of the block, and a gradient of y that is not one number expanded, which the
        # cache would hold.
        B, J = IMAGES, L // M
        s4d = S4D(D, N).to(device)
        u = torch.randn(M, D, B, J, device=device, dtype=torch.bfloat16)
        u = u.permute(2, 1, 3, 0).requires_grad_()
        dy = torch.randn(M, 2 * D, B, J, device=device, dtype=torch.bfloat16).permute(2, 1, 3, 0)

        calls, facts = {}, {}
        exact = _first_channels(by_fft, s4d.double(), u, dy, torch.float64)
        s4d.float()
        for name, convolution in ways.items():
            start = time.perf_counter()
            y = convolution(s4d, u)
            facts[f"{name}_first"] = time.perf_counter() - start
            inputs = (u, *s4d.parameters())
            calls[f"{name}_forward"] = lambda f=convolution, s4d=s4d, u=u: f(s4d, u)
            calls[f"{name}_backward"] = lambda y=y, inputs=inputs, dy=dy: torch.autograd.grad(
                y, inputs, dy, retain_graph=True
            )
            if name != "chunk_compiled":  # of few channels it would be another program
                ours = _first_channels(convolution, s4d, u, dy, torch.bfloat16)
                for what, value, reference in zip(("y", "du", "dC"), ours, exact):
                    error = (value - reference).norm() / reference.norm()
                    facts[f"{name}_{what}_error"] = error.item()
        results[L] = in_turn(calls, device, 5) | facts
    return results


def _first_channels(
    convolution: Callable, s4d: S4D, u: Tensor, dy: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """y, du and the gradient of C of the first channels in float64, computed from u and dy in
    `dtype`.
    """
    d = min(16, u.shape[1])
    narrow = S4D(d, N).to(s4d.C)
    narrow.load_state_dict({name: p[:, :d] for name, p in s4d.state_dict().items()})
    u = u.detach()[:, :d].to(dtype).requires_grad_()
    y = convolution(narrow, u)
    dy = dy.unflatten(1, (2, -1))[:, :, :d].flatten(1, 2).to(dtype)
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, (u, narrow.C), dy))]


def ceilings(device: torch.device) -> dict:
    """What the machine can do at best: gigabytes a second of a copy, and Tflops of a square
    product.
    """
    setting = timing.Setting(device, repeats=9)
    source = torch.randn(SIDE**2 * 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for dtype in (torch.bfloat16, torch.float32):
        factor = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
        calls[str(dtype).removeprefix("torch.")] = lambda x=factor: x @ x
    times = timing.take_turns(list(calls.values()), setting)
    seconds = {name: statistics.median(taken) / 1e3 for name, taken in zip(calls, times)}
    gigabytes = 2 * source.nbytes / 1e9
    rates = {"side": SIDE, "copy_gb_per_second": gigabytes / seconds.pop("copy")}
    return rates | {
        f"product_{name}_tflops": 2 * SIDE**3 / time / 1e12 for name, time in seconds.items()
    }


def top(device: torch.device) -> dict:
    """The kernels (operators on a CPU) that take most time of a training step of `xl-256` at a
    batch of 32.
    """
    from torch.profiler import ProfilerActivity, profile

    precision = "bf16" if device.type == "cuda" else "auto"
    settings = [
        f"train.device={device}",
        f"train.batch_size={IMAGES}",
        f"train.precision={precision}",
        *SMALLER,
    ]
    config = load_config("xl-256", settings)
    step = Step(config, device)
    batch = make_batch(Noise(config), config, 0)
    step.update(batch)
    step.update(batch)

    # The time of kernels on a GPU, where operators have none of their own.
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        step.update(batch)
        step.bad_steps.flush(step.number)  # waits for the device
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        if not on_gpu or event.device_type == DeviceType.CUDA:
            spent[event.key] += (
                event.self_device_time_total if on_gpu else event.self_cpu_time_total
            )
            calls[event.key] += event.count
    if not spent.total():
        return {"left out": NO_DEVICE_TIMES}
    return {
        "ms": spent.total() / 1e3,
        "top": [
            {
                "name": name[:120],
                "ms": time / 1e3,
                "percent": round(100 * time / spent.total(), 1),
                "calls": calls[name],
            }
            for name, time in spent.most_common(25)
        ],
    }


OPTIONS = {  # what may be changed in the recipe of `mnist-noise`, and itself at the end
    "velocity": ("diffusion.objective=velocity", "train.mse_weight_cap=1"),
    "flow": (
        "diffusion.objective=flow",
        "train.mse_weight_cap=1",
        "model.learn_sigma=false",
        "sample.sampler=heun",
    ),
    "two averages": ("train.ema=0.995,0.999",),
    "alternate": ("model.scan=alternate",),
    "four": ("model.scan=four",),
    "local": ("model.local=3",),
    "linear": ("model.mixer=linear", "model.heads=4"),
    "conv": ("model.mixer=conv",),
    "conv, grn": ("model.mixer=conv", "model.conv_gate=grn"),
    "conv, 7x7": ("model.mixer=conv", "model.kernel=7"),
    "conv, 7x7, grn": ("model.mixer=conv", "model.kernel=7", "model.conv_gate=grn"),
    "axial": ("model.mixer=axial", "model.d_state=16"),
    "attention": ("model.mixer=attention", "model.heads=4"),
    "mnist-noise": (),
}


def options(device: torch.device) -> dict:
    """A training step of `mnist-noise` with each option of the recipe, over that without; forward
    Gflops per image.
    """
    made = {name: _training(device, overrides) for name, overrides in OPTIONS.items()}
    times = in_turn({name: call for name, (_, call) in made.items()}, device, 15)
    return {
        name: {
            "ratio": times[f"{name}_ratio"],
            "ms": times[f"{name}_ms"],
            "gflops": cost(config).gflops,
        }
        for name, (config, _) in made.items()
    }


def axial(device: torch.device) -> dict:
    """The mixer axial by products over the same by FFTs, by tokens a side: a forward and backward
    pass.
    """
    ratios = {}
    for side, channels in AXIAL_SIDES.items():
        layer = Axial(channels, 16, grid=(side, side)).to(device)
        u = torch.randn(1, channels, side**2, 1, device=device, requires_grad=True)

        def pass_of(longest: int, layer=layer, u=u, side=side) -> None:
            with patch.object(axial_mixer, "LONGEST", longest):
                layer(u, (side, side)).square().sum().backward()

        calls = {"products": lambda: pass_of(side), "ffts": lambda: pass_of(0)}  # noqa: B023
        ratios[side] = in_turn(calls, device, 7)["products_ratio"]
    return {"products_over_ffts": ratios}


def _first_call(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of the first call, in which a model is compiled."""
    start = time.perf_counter()
    call()
    return {"first_call_s": time.perf_counter() - start}


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write; views and allocations move none."""

    moved = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if not operator.is_view and name not in (
            "empty",
            "new_empty",
            "empty_like",
            "detach",
            "_unsafe_view",
        ):
            inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            # they do not read what they write
            inputs = inputs[1:] if name in ("copy_", "fill_", "zero_") else inputs
            outputs = [v for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
            self.moved += sum(v.nbytes for v in inputs + outputs)
        return out


def traffic(device: torch.device) -> dict:
    """Numbers that the convolution and its gradient move, per image, channel and token (M = 2,
    batch 16).
    """
    M, B, L, width = 2, 16, SHORT, 64
    layer = S4D(width, 64).to(device)
    u = torch.randn(M, width, B, L // M, device=device).permute(2, 1, 3, 0).requires_grad_()
    K, unit = layer.taps(L).detach().requires_grad_(), 4 * B * width * L
    moved = {}
    for name, most in {"recomputed": 0, "kept": 1 << 40}.items():
        # one slice
        with patch.multiple(
            numerics, KEPT_NUMBERS=most, SLICE=dict.fromkeys((True, False), 1 << 40)
        ):
            with _Traffic() as forward:
                y = Convolution.apply(u, KernelSpectra.apply(K))
            dy = torch.ones_like(y)
            with _Traffic() as backward:
                torch.autograd.grad(y, (u, K), dy)
        moved[name] = {"forward": forward.moved / unit, "backward": backward.moved / unit}
    return moved


ROWS = {
    f.__name__: f
    for f in (
        kernel,
        step,
        block,
        block_bf16,
        parts,
        public,
        saved,
        traffic,
        ceilings,
        convolutions,
        convolutions_compiled,
        top,
        length,
        beside_dit,
        memory,
        options,
        axial,
        compiled,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes and no code generation, to see that rows run"
    )
    arguments = parser.parse_args()
    if arguments.toy:
        global D, SHORT, LONG, SIDES, RESOLUTIONS, LARGE, IMAGES, SIDE, SMALLER, BACKEND
        D, SHORT, LONG, SIDES, RESOLUTIONS, LARGE = 32, 64, 128, (8, 16), (64,), 64
        IMAGES, SIDE = 2, 64
        SMALLER = ["model.hidden_size=32", "model.depth=1"]
        # Graphs are traced; generating code for them takes minutes at any size.
        BACKEND = "aot_eager"
        nn.Module.compile = functools.partialmethod(nn.Module.compile, backend=BACKEND)
    keep_freed_memory()
    torch.manual_seed(0)
    for name in arguments.rows or ROWS:
        start = time.perf_counter()
        result = ROWS[name](torch.device(arguments.device))
        print(
            json.dumps({name: result, "seconds": math.ceil(time.perf_counter() - start)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
