"""ADM's evaluation: image features, the metrics computed from them, and the references they are
compared with.
"""

from diffussm_cli.evaluation.session import EvaluationSession, evaluate, make_reference

__all__ = ["EvaluationSession", "evaluate", "make_reference"]
