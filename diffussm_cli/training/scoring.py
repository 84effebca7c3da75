"""Evaluate the averaged weights during training, and keep the best ones."""

import dataclasses
from pathlib import Path

import torch

from diffussm_cli import runs
from diffussm_cli.config import Config
from diffussm_cli.data.source import Source
from diffussm_cli.data.vae import Decoding
from diffussm_cli.errors import ConfigError, DataError
from diffussm_cli.evaluation.comparison import USUAL
from diffussm_cli.evaluation.drawn import DrawnImages
from diffussm_cli.evaluation.features import doubts
from diffussm_cli.evaluation.session import EvaluationSession
from diffussm_cli.events import finish
from diffussm_cli.machine.processes import ALONE, World
from diffussm_cli.model import Backbone
from diffussm_cli.sampling.sampler import Sampler
from diffussm_cli.training.batches import captions_of


class Scoring:
    """The evaluation session and the reference of `config.eval`, ready to use; `warnings` are for the user.

    A run with text draws captions from `source`.

    Raises:
        DiffussmError: if there is no reference, or the extractor cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        root: Path,
        device: torch.device,
        decoding: Decoding,
        dtype: torch.dtype,
        world: World = ALONE,
    ):
        if decoding.warning:
            raise DataError(f"eval.every: {decoding.warning}")
        path = config.reference
        if path is None:
            raise ConfigError("eval.every: needs eval.reference, an .npz or a folder of real images, or data.held_out")
        self.config, self.source, self.root, self.decoding = config, source, root, decoding
        self.dtype, self.world = dtype, world
        self.session = EvaluationSession(config.eval.extractor, device=str(device), world=world)
        self.session.choose(config.data.size, config.data.is_grey)
        self.warnings = doubts(self.session.asked, self.session.name, path)
        self.reference = self.session.reference(path, None, config.data.size)
        if self.reference.images is not None and self.reference.images.left_out:
            self.warnings.append(self.reference.images.left_out)

    def score(self, model: Backbone, step: int, keep: bool = True) -> dict[str, float]:
        """Metrics of a model in eval mode by name, as `eval/fid`; empty on all processes but the first.

        If `keep`, the weights with the best FID go to RUN/best.

        Raises:
            DataError, ConfigError: if reference and extractor do not match.
            RunError: if RUN/best cannot be written.
        """
        config = self.config
        steps = min(config.sample.steps, config.eval.steps)
        sampling = dataclasses.replace(config.sample, steps=steps)
        sampler = Sampler(model, config, sampling, self.decoding, dtype=self.dtype)
        seeds = range(config.eval.images)
        text = captions_of(self.source, len(seeds)) if config.model.text_width else None
        channels, labels = self.session.extractor.channels, sampler.labels(seeds)
        images = DrawnImages(sampler, seeds, labels, channels, "averaged weights", text=text)
        measured, _ = finish(self.session.compare(images, self.reference, USUAL, lenient=True))
        values = {f"eval/{name}": value for name, value in measured.items()}
        best = self.root / runs.BEST
        if keep and values and values["eval/fid"] < runs.read_metrics(best).get("eval/fid", float("inf")):
            runs.write_weights(best, config, model.state_dict(), step, {"step": step, **values})
        return values
