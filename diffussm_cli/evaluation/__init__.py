"""The ADM evaluation: features of images, metrics of features, references to compare with."""

from diffussm_cli.evaluation.session import EvaluationSession, evaluate, make_reference

__all__ = ["EvaluationSession", "evaluate", "make_reference"]
