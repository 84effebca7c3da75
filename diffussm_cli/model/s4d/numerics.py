"""How the formulas of this package are computed: in slices that fit into the cache, and in full
float32.
"""

import contextlib
import math
import os
from importlib.util import find_spec

import torch

from diffussm_cli.errors import ConfigError
from diffussm_cli.machine.device import full_float32

SLICE = {True: 1 << 19, False: 1 << 28}  # elements in a slice of u: {is_cpu: count}
KEPT_NUMBERS = 1 << 21  # 16 MiB
CONVOLUTION = "DIFFUSSM_CONVOLUTION"  # the environment variable: fft, chunk or triton


def slices_of(count: int, numbers: int, device: torch.device) -> list[slice]:
    """Slices of `count` items of `numbers` numbers each; a single slice when compiled, as sizes
    must not vary.

    On a GPU they are about equal: a small last one would launch as many kernels as the others.
    """
    size = (
        count
        if torch.compiler.is_compiling()
        else max(1, SLICE[device.type == "cpu"] // max(1, numbers))
    )
    if device.type != "cpu" and count > size:
        size = math.ceil(count / math.ceil(count / size))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def worth_keeping(numbers: int) -> bool:
    """Whether to keep so many complex numbers for the backward pass, or to compute them again."""
    return numbers <= KEPT_NUMBERS and not torch.compiler.is_compiling()


def in_forward_mode() -> bool:
    """Whether derivatives are being taken in forward mode, as by `torch.func.jvp`.

    Our own Functions have rules for the backward pass only, so plain operators must take their
    place. A Function with a rule for both could not be compiled.
    """
    return torch.autograd.forward_ad._current_level >= 0


def chosen_convolution() -> str:
    """How training convolves, which the user chooses; by default by FFT."""
    choice = os.environ.get(CONVOLUTION, "fft")
    if choice not in ("fft", "chunk", "triton"):
        raise ConfigError(f"{CONVOLUTION}: {choice!r} must be fft, chunk or triton")
    if choice == "triton" and find_spec("triton") is None:
        raise ConfigError(f"{CONVOLUTION}: triton is not installed; pip install triton")
    return choice


def full_float32_products() -> contextlib.AbstractContextManager:
    """For the kernel's products. In compiled code the user's setting holds: it cannot change global
    switches.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else full_float32()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if device.type == "meta":
        # It has no autocast. `profiling/roofline.py` uses a mode of its own instead, which this
        # switches off.
        return torch._C.DisableTorchFunction()
    return torch.autocast(device.type, enabled=False)
