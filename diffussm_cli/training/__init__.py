"""Training runs: the session, the training loop, and their files."""

from diffussm_cli.events import TrainingRecord
from diffussm_cli.runs.report import write_report
from diffussm_cli.training.session import TrainingResult, train
from diffussm_cli.training.trainer import Trainer

__all__ = ["Trainer", "TrainingRecord", "TrainingResult", "train", "write_report"]
