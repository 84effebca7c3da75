"""What is done between two steps of training: measuring and drawing."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch

from diffussm_cli.config import Config
from diffussm_cli.data.decoding import open_decoding
from diffussm_cli.data.source import Source
from diffussm_cli.machine.processes import ALONE, World
from diffussm_cli.training.measure import Measures
from diffussm_cli.training.preview import Previews


class Between(NamedTuple):
    """Measurements and previews, as far as a configuration asks for them."""

    measures: Measures | None
    previews: Previews | None

    @property
    def warnings(self) -> list[str]:
        """What the user should know before training begins."""
        of_previews = self.previews.warnings if self.previews else []
        of_measures = self.measures.warnings if self.measures else []
        return of_previews + of_measures


def open_between(
    config: Config, source: Source, root: Path, device: torch.device, world: World = ALONE
) -> Between:
    """Open what measurements and previews need besides a model.

    Raises DiffussmError if a VAE, a reference, an extractor, a text encoder or held-out images
    cannot be used.
    """
    # Both share what decodes latents; it is opened once, if at all.
    decoding = functools.cache(functools.partial(open_decoding, config, device))
    e, measures, previews = config.eval, None, None
    if e.every or e.held_out_every:
        measures = Measures(config, source, root, decoding, device, world)
    if config.train.sample_every:
        previews = Previews(config, source, root, decoding)
    return Between(measures, previews)
