"""Training runs: the session, the training loop, and their files."""

from diffussm_cli.events import TrainingRecord
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.session import TrainingResult, train

__all__ = ["Trainer", "TrainingRecord", "TrainingResult", "train"]
