"""The cost of a model, by formula and by measurement."""

from diffussm_cli.profiling.flops import Cost, cost
from diffussm_cli.profiling.paper import named_model

__all__ = ["Cost", "cost", "named_model"]
