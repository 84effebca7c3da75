"""Training runs: the session, the training loop, and their files.

The names of this package are imported when they are first used (PEP 562), because an optimiser or
an average, which are in modules of their own, need no trainer: it takes a second to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffussm_cli.events import TrainingRecord as TrainingRecord
    from diffussm_cli.training.loop import Trainer as Trainer
    from diffussm_cli.training.session import TrainingResult as TrainingResult
    from diffussm_cli.training.session import train as train

MODULES = {
    "Trainer": "diffussm_cli.training.loop",
    "TrainingRecord": "diffussm_cli.events",
    "TrainingResult": "diffussm_cli.training.session",
    "train": "diffussm_cli.training.session",
}
__all__ = ["Trainer", "TrainingRecord", "TrainingResult", "train"]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name]), name)
