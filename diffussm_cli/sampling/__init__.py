"""Drawing images from a trained model."""

from diffussm_cli.sampling.sampler import Sampler, open_sampler
from diffussm_cli.sampling.session import sample

__all__ = ["Sampler", "open_sampler", "sample"]
