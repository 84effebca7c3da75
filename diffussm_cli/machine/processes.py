"""Which part of a job this process takes, from what torchrun or a scheduler put in the environment; and how the
processes meet."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffussm_cli.errors import ConfigError, RunError

# What gloo, NCCL and the store say when another process ends or stops answering.
GONE = (
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


class Share(NamedTuple):
    """Which part of numbered work this process takes: `rank`, `rank` + `of`, ..."""

    rank: int = 0
    of: int = 1


ALONE = Share()
_patient: Any = None  # the group of `gather`, inside of `meeting`


def read_share() -> Share:
    """This process's share by RANK and WORLD_SIZE, as torchrun sets them. Raises ConfigError."""
    rank, of = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and of.isdecimal() and int(rank) < int(of)):
        raise ConfigError(f"RANK {rank!r} and WORLD_SIZE {of!r} in the environment must be numbers, RANK the smaller")
    return Share(int(rank), int(of))


def own_cores() -> int:
    """The number of cores for this process: those it may run on, shared by the processes that torchrun started here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(local))) if local.isdecimal() else cores


@contextlib.contextmanager
def meeting(share: Share, cuda: bool = False) -> Iterator[None]:
    """Inside, the processes of a job can talk; alone there is nothing to do.

    Args:
        cuda: tensors on CUDA devices are to travel too (by NCCL); the rest goes by gloo.

    Raises:
        ConfigError: if they do not find each other.
        RunError: if one of them is gone.
    """
    global _patient
    if share.of == 1:
        yield
        return
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, rank=share.rank, world_size=share.of, timeout=STEP)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"WORLD_SIZE: {share.of} processes cannot meet: {e}; start them by torchrun") from e
    try:
        with others():
            yield
    finally:
        _patient = None
        dist.destroy_process_group()


def gather(value: Any, share: Share) -> list[Any]:
    """What every process has to say, in the order of their ranks; all get it, and none goes on before.

    The others may take days: where one process works alone, the rest wait here and not in a collective of a step.

    Raises:
        RunError: if one of them is gone.
    """
    if share.of == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * share.of
    with others():
        dist.all_gather_object(found, value, group=_patient)
    return found


@contextlib.contextmanager
def first_works(share: Share) -> Iterator[None]:
    """Around what the first process does alone: the others wait for it at the end. Raises RunError if it is gone."""
    yield
    gather(None, share)


def total(tensor, share: Share):
    """The sum of a tensor over all processes, in place and without waiting for a CUDA device. Raises RunError."""
    return _reduced(tensor, share, "SUM")


def smallest(tensor, share: Share):
    """The minimum of a tensor over all processes, in place. Raises RunError."""
    return _reduced(tensor, share, "MIN")


def _reduced(tensor, share: Share, operation: str):
    if share.of > 1:
        import torch.distributed as dist

        with others():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor


def any_of(flag: bool, share: Share) -> bool:
    """Whether one process at least says so; asked on the CPU, so that no device is waited for. Raises RunError."""
    if share.of == 1:
        return flag
    import torch

    return bool(total(torch.tensor(float(flag)), share))


@contextlib.contextmanager
def others() -> Iterator[None]:
    """Where this process needs the others. Raises RunError if one of them is gone."""
    try:
        yield
    except RuntimeError as e:
        if not any(word in str(e) for word in GONE):
            raise
        cause = " ".join(str(e).split())[:300]
        line = "another process of this job has ended or does not answer; what was saved before is intact"
        raise RunError(f"{line} ({cause})") from e
