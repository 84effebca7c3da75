"""The device and the precision to compute with, chosen by name."""

import contextlib
import ctypes
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from diffussm_cli import __version__
from diffussm_cli.errors import ConfigError

A = TypeVar("A")
B = TypeVar("B")
PRECISIONS = ("auto", "fp32", "bf16")
VARIABLE = "DIFFUSSM_DEVICE"  # names the device that `auto` is


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU, unless the environment variable
    DIFFUSSM_DEVICE names another.

    Each process of a machine takes its own CUDA device.

    A CUDA device becomes the current device, which NCCL and FSDP use.

    Raises:
        ConfigError: if the device is not available, or several processes of this machine would
            share it.
    """
    # What names the device, and what an error advises.
    named_by, remedy = "device", "use auto or cpu"
    if name == "auto":
        best = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
        name = os.environ.get(VARIABLE) or best
        if os.environ.get(VARIABLE):
            named_by, remedy = VARIABLE, "unset the variable, or set it to cpu"
    chosen = name
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ConfigError(f"{named_by}: {name!r} is not available here; {remedy}") from e

    if device.type == "cuda":
        _check_not_shared(chosen)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _check_not_shared(chosen: str) -> None:
    """Raises ConfigError if all processes that were started on this machine would compute on one
    GPU.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")
    if processes in ("0", "1"):
        return

    if chosen != "cuda":
        raise ConfigError(
            f"device: {chosen!r} would be shared by {processes} processes; use cuda, a GPU for each"
        )
    if "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        raise ConfigError(
            f"device: {chosen!r} would be shared by {processes} processes, "
            "because LOCAL_RANK is not set; start them with torchrun"
        )


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast dtype of `auto`, `fp32` or `bf16`. Raises ConfigError for any other, and for
    bf16 without hardware for it.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision: {precision!r:.80} is not a choice; valid: {', '.join(PRECISIONS)}"
        )
    fast = has_bf16(device)
    if precision == "bf16" and not fast:
        raise ConfigError(
            f"precision: bf16 has no hardware support on this {device.type} and would be slow; "
            "use fp32"
        )
    return (
        torch.bfloat16 if precision == "bf16" or (precision == "auto" and fast) else torch.float32
    )


def has_bf16(device: torch.device) -> bool:
    """Whether the device has hardware support for bfloat16 matrix products."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def processor_name(device: torch.device) -> str:
    """The model of a GPU, or of this machine's processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(
            (line.partition(": ")[2].strip() for line in file if line.startswith("model name")),
            "unknown",
        )
    return platform.processor() or "unknown"


def facts_of_machine(device: torch.device) -> dict[str, str]:
    """The processor, the platform and the versions of programs, which belong to every
    measurement.
    """
    versions = {
        "diffussm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return {
        "processor": processor_name(device),
        "platform": platform.platform(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def facts_of_program() -> dict[str, str]:
    """The command as it was typed, and the commit of the code if it lies in a git checkout of its
    own; `-dirty` behind it stands for changes.
    """
    program, *arguments = sys.argv
    if Path(program).name in ("diffussm", "__main__.py"):
        program = "diffussm"
    facts = {"command": shlex.join([program, *arguments])}

    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():  # and not only in a project whose environment holds this one
        describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = subprocess.run(  # noqa: S603 (a fixed command)
                ["git", "-C", str(checkout), *describe],  # noqa: S607 (the user's git)
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
            facts["commit"] = git.stdout.strip()
    return facts


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that torch has had on a CUDA device, or that this process has had
    elsewhere; 0 if the system does not say it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute products and convolutions of float32 tensors with all 24 bits, whatever the global
    settings allow.

    By default torch computes float32 convolutions in TensorFloat-32 (11 bits) on NVIDIA GPUs.
    """
    b: Any = torch.backends
    with contextlib.ExitStack() as stack:
        # since torch 2.9, which warns or fails if the older switches are read as well
        if hasattr(b, "fp32_precision"):
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
    """Whether torch ran out of memory; on the CPU only the message of the error says so."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def helpers(count: int = 1) -> ThreadPoolExecutor:
    """Threads for background work, in each of which torch runs on one core, without OpenMP workers.

    Once the OpenMP workers of all threads outnumber the cores, they sleep, and waking them costs
    the main thread a tenth of a millisecond per operator: `mnist` trained half as fast on two
    cores.
    """
    torch.get_num_threads()  # otherwise this thread would take the number that another one set last
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


class Helpers:
    """`helpers` that start at first use in each process, so that an owner of them may be pickled or
    forked.
    """

    def __init__(self, count: int):
        self.count = count
        self._process = 0
        self._threads: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[A], B], values: Iterable[A]) -> Iterator[B]:
        """As ThreadPoolExecutor.map."""
        if self._threads is None or self._process != os.getpid():  # threads do not survive a fork
            self._threads = helpers(self.count)
            self._process = os.getpid()
        return self._threads.map(function, values)

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_process": 0, "_threads": None}


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: new ones cause page faults in every forward pass on
    Linux CPUs.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 1 << 30)
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
