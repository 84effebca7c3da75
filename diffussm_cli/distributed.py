"""Which part of a job this process takes, from what torchrun or a scheduler put in the environment; and how the
processes meet. They talk by gloo on the CPU here: what they have to say is small."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from diffussm_cli.errors import ConfigError, RunError

PATIENCE = datetime.timedelta(days=7)  # one process may have much more to do than another


class Share(NamedTuple):
    """Which part of numbered work this process takes: `rank`, `rank` + `of`, ..."""

    rank: int = 0
    of: int = 1


ALONE = Share()


def read_share() -> Share:
    """This process's share by RANK and WORLD_SIZE, as torchrun sets them. Raises ConfigError."""
    rank, of = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and of.isdecimal() and int(rank) < int(of)):
        raise ConfigError(f"RANK {rank!r} and WORLD_SIZE {of!r} in the environment must be numbers, RANK the smaller")
    return Share(int(rank), int(of))


@contextlib.contextmanager
def meeting(share: Share) -> Iterator[None]:
    """Inside, the processes of a job can `gather`; alone there is nothing to do.

    Raises:
        ConfigError: if they do not find each other.
    """
    if share.of == 1:
        yield
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", rank=share.rank, world_size=share.of, timeout=PATIENCE)
    except (ValueError, RuntimeError) as e:
        raise ConfigError(f"WORLD_SIZE: {share.of} processes cannot meet: {e}; start them by torchrun") from e
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(value: Any, share: Share) -> list[Any]:
    """What every process has to say, in the order of their ranks; all get it, and none goes on before.

    Raises:
        RunError: if one of them is gone.
    """
    if share.of == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * share.of
    try:
        dist.all_gather_object(found, value)
    except RuntimeError as e:
        raise RunError(f"another process of this job has ended: {str(e).splitlines()[0]}") from e
    return found
