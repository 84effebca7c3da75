"""What a model costs, before and after it is run."""

from diffussm_cli.profiling.flops import Cost, cost
from diffussm_cli.profiling.models import named_model

__all__ = ["Cost", "cost", "named_model"]
