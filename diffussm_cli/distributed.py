"""Which part of a job this process takes, from what torchrun or a scheduler put in the environment."""

import os
from typing import NamedTuple

from diffussm_cli.errors import ConfigError


class Share(NamedTuple):
    """Which part of numbered work this process takes: `rank`, `rank` + `of`, ..."""

    rank: int = 0
    of: int = 1


def read_share() -> Share:
    """This process's share by RANK and WORLD_SIZE, as torchrun sets them. Raises ConfigError."""
    rank, of = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and of.isdecimal() and int(rank) < int(of)):
        raise ConfigError(f"RANK {rank!r} and WORLD_SIZE {of!r} in the environment must be numbers, RANK the smaller")
    return Share(int(rank), int(of))
