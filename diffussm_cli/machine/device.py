"""Where and in what precision to compute, chosen from names."""

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from diffussm_cli.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU, unless the environment variable DIFFUSSM_DEVICE names another.

    Of several processes on a machine each takes its own CUDA device.

    A CUDA device becomes the current one, which is what NCCL and FSDP use.

    Raises:
        ConfigError: for a device that is not there.
    """
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = os.environ.get("DIFFUSSM_DEVICE") or found
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ConfigError(f"device: {name!r} is not available here; use auto or cpu") from e
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of `auto`, `fp32` or `bf16`. Raises ConfigError for bf16 without hardware for it."""
    fast = has_bf16(device)
    if precision == "bf16" and not fast:
        raise ConfigError(f"precision: bf16 has no hardware support on this {device.type} and would crawl; use fp32")
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast) else torch.float32


def has_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 run on hardware made for them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile has no compiler to call: of C for a GPU's launchers, of C++ for a CPU."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        language, variable, usual = "C++", "CXX", "g++"
        with contextlib.suppress(RuntimeError):  # InvalidCxxCompiler is one
            get_cpp_compiler()
            return
    else:
        language, variable, usual = "C", "CC", "gcc"
        if os.environ.get(variable) or shutil.which("gcc") or shutil.which("clang"):
            return
    raise ConfigError(
        f"train.compile: torch.compile needs a {language} compiler and finds none; install {usual}, "
        f"name yours in the environment variable {variable}, or set train.compile=false"
    )


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Inside, products and convolutions of float32 tensors keep all 24 bits, whatever is allowed for the rest.

    By default torch computes float32 convolutions in TensorFloat-32 (11 bits) on NVIDIA GPUs.
    """
    b = torch.backends
    with contextlib.ExitStack() as stack:
        if hasattr(b, "fp32_precision"):  # since torch 2.9, which warns or fails if the older switches are read as well
            for switch in (b.cuda.matmul, b.cudnn.conv, b.mkldnn.matmul, b.mkldnn.conv):
                stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            stack.callback(setattr, b.cudnn, "allow_tf32", b.cudnn.allow_tf32)
            torch.set_float32_matmul_precision("highest")
            b.cudnn.allow_tf32 = False
        yield


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch failed to get memory; on the CPU it says so only in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def helpers(count: int = 1) -> ThreadPoolExecutor:
    """Threads beside the one that computes, in each of which torch works by itself, without workers of its own.

    As soon as OpenMP's workers of all threads outnumber the cores, they sleep, and to wake one takes a tenth
    of a millisecond at every operator of the thread that computes: `mnist` trained half as fast on two cores.
    """
    torch.get_num_threads()  # a thread that never asked would take the number that another set last
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: fresh ones page-fault at every forward on Linux CPUs."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 1 << 30)
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
