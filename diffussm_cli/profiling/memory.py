"""Peak memory of one kind of work, and how much memory is free.

On the CPU, peak memory is that of a fresh process; on CUDA, that of the allocator.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from diffussm_cli.config import Config
from diffussm_cli.machine.device import is_out_of_memory, keep_freed_memory
from diffussm_cli.model import build_model
from diffussm_cli.profiling.work import Setting, build, workload


def peak_bytes(config: Config, kind: str, setting: Setting) -> int | None:
    """Peak memory of one kind of work, including weights; None if the system does not report it.

    Raises:
        MemoryError: if it does not fit.
    """
    wanted = config.model.depth
    depth = min(setting.depth or wanted, wanted)
    peak = _peak_in_child(config, kind, setting, depth)
    if depth == wanted or peak is None:
        return peak
    less = depth // 2 or 2
    smaller = _peak_in_child(config, kind, setting, less)
    assert smaller is not None, "the system reported the first peak"
    per_block = (peak - smaller) / (depth - less)
    return int(peak + per_block * (wanted - depth))


def _peak_in_child(config: Config, kind: str, setting: Setting, depth: int) -> int | None:
    """Measure in a new process: on the CPU, peak memory is known only per process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_here, config, kind, setting, depth, available_bytes()).result()
        except BrokenProcessPool as e:
            raise MemoryError("the system killed the process") from e


def _peak_here(config: Config, kind: str, setting: Setting, depth: int, limit: int | None) -> int | None:
    with torch.device("meta"):
        build_model(config)  # torch loads parts of itself late; they must not count as the model's memory
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
    after = resident_peak()
    return None if before is None or after is None else after - before


def available_bytes(device: torch.device | None = None) -> int | None:
    """Free memory of a CUDA device, otherwise of the machine, if the system reports it (Linux)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def resident_peak() -> int | None:
    """Peak resident memory of this process in bytes, if the system reports it (Linux)."""
    return _kilobytes(Path("/proc/self/status"), "VmHWM")


def _kilobytes(path: Path, field: str) -> int | None:
    if not path.is_file():
        return None
    fields = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    return 1024 * int(fields[field].split()[0])


def _limit_memory(size: int) -> None:
    """Make allocations that do not fit fail in this process, before the system kills another one."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))
