"""Which part of a job this process takes, from what torchrun or a scheduler put in the environment; and how the
processes meet."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffussm_cli.errors import ConfigError, RunError

# What gloo, NCCL and the store say when another process ends or stops answering.
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
STEP = datetime.timedelta(minutes=10)  # for collectives within a step: a hung machine is noticed
PATIENCE = datetime.timedelta(days=7)  # for `gather`: one process may have much more to do than another


class World(NamedTuple):
    """The processes of a job: this is number `rank` of `size`, and takes every `size`-th piece of numbered work."""

    rank: int = 0
    size: int = 1


ALONE = World()
_patient: Any = None  # the group of `gather`, inside of `process_group`


def read_world() -> World:
    """The processes of this job by RANK and WORLD_SIZE, as torchrun sets them. Raises ConfigError."""
    rank, of = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and of.isdecimal() and int(rank) < int(of)):
        raise ConfigError(f"RANK {rank!r} and WORLD_SIZE {of!r} in the environment must be numbers, RANK the smaller")
    return World(int(rank), int(of))


def own_cores() -> int:
    """The number of cores for this process: those it may run on, shared by the processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(local))) if local.isdecimal() else cores


@contextlib.contextmanager
def process_group(world: World, cuda: bool = False) -> Iterator[None]:
    """Inside, the processes of a job can talk; alone there is nothing to do.

    Args:
        cuda: tensors on CUDA devices are to travel too (by NCCL); the rest goes by gloo.

    Raises:
        ConfigError: if they do not find each other.
        RunError: if one of them is gone.
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
        raise ConfigError(f"WORLD_SIZE: {world.size} processes cannot meet: {e}; start them by torchrun") from e
    try:
        with peer_errors():
            yield
    finally:
        _patient = None
        dist.destroy_process_group()


def gather(value: Any, world: World) -> list[Any]:
    """What every process has to say, in the order of their ranks; all get it, and none goes on before.

    The others may take days: where one process works alone, the rest wait here and not in a collective of a step.

    Raises:
        RunError: if one of them is gone.
    """
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world.size
    with peer_errors():
        dist.all_gather_object(found, value, group=_patient)
    return found


@contextlib.contextmanager
def first_works(world: World) -> Iterator[None]:
    """Around what the first process does alone: the others wait for it at the end. Raises RunError if it is gone."""
    yield
    gather(None, world)


def total(tensor, world: World):
    """The sum of a tensor over all processes, in place and without waiting for a CUDA device. Raises RunError."""
    return _reduced(tensor, world, "SUM")


def smallest(tensor, world: World):
    """The minimum of a tensor over all processes, in place. Raises RunError."""
    return _reduced(tensor, world, "MIN")


def _reduced(tensor, world: World, operation: str):
    if world.size > 1:
        import torch.distributed as dist

        with peer_errors():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def any_of(flag: bool, world: World) -> bool:
    """Whether one process at least says so; asked on the CPU, so that no device is waited for. Raises RunError."""
    if world.size == 1:
        return flag
    import torch

    return bool(total(torch.tensor(float(flag)), world))


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Where this process needs the others. Raises RunError if one of them is gone."""
    try:
        yield
    except RuntimeError as e:
        if not any(word in str(e) for word in PEER_LOST):
            raise
        cause = " ".join(str(e).split())[:300]
        line = "another process of this job has ended or does not answer; what was saved before is intact"
        raise RunError(f"{line} ({cause})") from e
