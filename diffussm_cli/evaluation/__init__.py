"""ADM's evaluation: image features, the metrics computed from them, and the references they are
compared with.
"""

from diffussm_cli.evaluation.evaluator import Evaluator
from diffussm_cli.evaluation.session import evaluate, make_reference

__all__ = ["Evaluator", "evaluate", "make_reference"]
