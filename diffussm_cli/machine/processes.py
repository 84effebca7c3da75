"""The processes of a job: rank and size, from the environment that torchrun sets, and communication
between them.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffussm_cli.errors import ConfigError, RunError

# What gloo, NCCL and the store report when another process ends or stops responding.
PEER_LOST = (
    "closed by peer",
    "reset by peer",
    "Connection refused",
    "Broken pipe",
    "closed the connection",
    "Connection was likely closed",
    "Timed out waiting",
    "timeout caused pair closure",
    "remote process exiting prematurely",
)
# timeout of collectives within a step, so that a hung machine is noticed
STEP = datetime.timedelta(minutes=10)
# timeout of `gather`: one process may have much more to do than another
PATIENCE = datetime.timedelta(days=7)


class World(NamedTuple):
    """The processes of a job: this one is number `rank` of `size`, and does a part of the work."""

    rank: int = 0
    size: int = 1

    def share(self, n: int) -> range:
        """The contiguous part of 0..n-1 that belongs to this process."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)


ALONE = World()
_patient: Any = None  # the group that `gather` uses, inside `process_group`


def read_world() -> World:
    """The processes of this job, from RANK and WORLD_SIZE, which torchrun sets. Raises
    ConfigError.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(
            f"RANK {rank!r} and WORLD_SIZE {size!r} in the environment must be numbers, "
            "RANK the smaller"
        )
    return World(int(rank), int(size))


def own_cores() -> int:
    """The number of cores for this process: those it may use, shared with the processes that
    torchrun started here.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(local))) if local.isdecimal() else cores


@contextlib.contextmanager
def process_group(world: World, cuda: bool = False) -> Iterator[None]:
    """Connect the processes of a job; with a single process this does nothing.

    Args:
        cuda: also connect CUDA devices, by NCCL; everything else uses gloo.

    Raises:
        ConfigError: if they cannot connect.
        RunError: if one of them is lost.
    """
    global _patient
    if world.size == 1:
        yield
        return

    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=STEP)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(
            f"WORLD_SIZE: {world.size} processes cannot connect: {e}; start them with torchrun"
        ) from e

    try:
        with peer_errors():
            yield
    except BaseException:
        if cuda:
            _abort_nccl()
        raise
    finally:
        _patient = None
        dist.destroy_process_group()


def _abort_nccl() -> None:
    """Let NCCL drop its unfinished work: otherwise its end waits for kernels that wait for a lost
    process.
    """
    import torch
    import torch.distributed as dist

    group = dist.group.WORLD
    if group is None:
        return
    with contextlib.suppress(RuntimeError):  # nothing was sent by NCCL yet
        group._get_backend(torch.device("cuda")).abort()


def gather(value: Any, world: World) -> list[Any]:
    """Gather the values of all processes on every process, in the order of their ranks; also a
    barrier.

    This waits for days if needed: while one process works alone, the rest wait here, not in a
    collective of a step.

    Raises:
        RunError: if one of them is lost.
    """
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world.size
    with peer_errors():
        dist.all_gather_object(values, value, group=_patient)
    return values


@contextlib.contextmanager
def first_works(world: World) -> Iterator[None]:
    """Wrap work that the first process does alone: at the end the others wait for it. Raises
    RunError if it is lost.
    """
    yield
    gather(None, world)


def reduced(tensor, world: World, operation: str = "SUM"):
    """The sum or "MIN" of a tensor over all processes, in place, without waiting for a CUDA device.
    Raises RunError.
    """
    if world.size > 1:
        import torch.distributed as dist

        with peer_errors():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def any_of(flag: bool, world: World) -> bool:
    """Whether `flag` is true in any process; reduced on the CPU, so that it waits for no device.
    Raises RunError.
    """
    if world.size == 1:
        return flag
    import torch

    return bool(reduced(torch.tensor(float(flag)), world))


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Wrap communication with the other processes. Raises RunError if one of them is lost."""
    try:
        yield
    except RuntimeError as e:
        if not any(word in str(e) for word in PEER_LOST):
            raise
        cause = " ".join(str(e).split())[:300]
        line = (
            "another process of this job has ended or does not respond; "
            "what was saved before is intact"
        )
        raise RunError(f"{line} ({cause})") from e
