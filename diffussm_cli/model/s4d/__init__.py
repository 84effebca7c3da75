"""S4D: start with `layer.py`."""

from diffussm_cli.model.s4d.layer import S4D

__all__ = ["S4D"]
