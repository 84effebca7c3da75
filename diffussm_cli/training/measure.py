"""What is measured of averaged weights: held-out loss every `eval.held_out_every` steps, and with
scores of drawn images every `eval.every`.

n images   Q = 4 quarters of the timesteps   B = nQ, each image once per quarter
C channels   H x W grid
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm_cli import runs
from diffussm_cli.config import MANY, Config
from diffussm_cli.data.decoding import Decoding
from diffussm_cli.data.opening import open_held_out
from diffussm_cli.data.source import Source, captions_of
from diffussm_cli.errors import ConfigError, DataError, DiffussmError, RunError
from diffussm_cli.evaluation.comparison import USUAL, check_images
from diffussm_cli.evaluation.evaluator import Evaluator
from diffussm_cli.evaluation.extractors import doubts
from diffussm_cli.evaluation.sets import DrawnImages
from diffussm_cli.events import finish
from diffussm_cli.machine.processes import ALONE, World, gather
from diffussm_cli.model import Backbone
from diffussm_cli.model.mixer import kept_kernels
from diffussm_cli.sampling.sampler import Sampler
from diffussm_cli.training.batches import Batch, image_seeds
from diffussm_cli.training.record import QUARTERS
from diffussm_cli.training.step import Step

AT_ONCE = 16  # images per batch
HELD_OUT = "data.held_out:"  # how an error about these images begins
GOLDEN = 0.618033988749895  # golden ratio: k * GOLDEN mod 1 is a low-discrepancy sequence


class Measures:
    """The held-out loss and the scores of every average, as far as a configuration asks for them.

    Args:
        decoding: opens what turns latents into images; called only if images are drawn.

    Raises:
        DiffussmError: now and not at the first measurement, if images, a reference or an extractor
            are missing.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        root: Path,
        decoding: Callable[[], Decoding],
        device: torch.device,
        world: World = ALONE,
    ):
        self.source = source
        images = open_held_out(config, source)
        self.held_out = HeldOut(images, config, device, world) if images else None
        scores = config.eval.every > 0
        if scores and not config.eval.images and not images:
            raise ConfigError(
                "eval.images: 0 needs held-out images; set data.held_out, or eval.images to at "
                "least 16"
            )

        # Without a reference there are no scores; an error if there is no held-out loss either.
        self.scoring = None
        if scores and config.eval.images and (config.reference or not images):
            self.scoring = Scoring(config, source, root, decoding(), device, world)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before training begins."""
        of_scoring = self.scoring.warnings if self.scoring else []
        left_out = self.held_out.source.left_out if self.held_out else ""
        is_news = left_out not in ("", self.source.left_out, *of_scoring)
        return [*of_scoring, left_out] if is_news else of_scoring

    def measure(self, step: Step, scores: bool = True) -> dict[str, Any]:
        """Held-out loss and metrics by name; names end in @DECAY except for the first average.

        Every process must call this.

        Args:
            step: whose averages are measured.
            scores: whether images are drawn, not only the loss computed.
        """
        values: dict[str, Any] = {}
        for ema in step.averages:
            model = step.averaged(ema)
            is_first = ema is step.ema

            of_average: dict[str, float] = {}
            with kept_kernels(model):
                if self.held_out:
                    of_average |= self.held_out.measure(functools.partial(step.losses, model=model))
                if self.scoring and scores:
                    of_average |= self.scoring.score(step, model, keep=is_first)

            for name, value in of_average.items():
                values[name if is_first else f"{name}@{ema.decay}"] = value
        return values


class HeldOut:
    """Up to `eval.held_out_images` images, evenly spread over a source.

    Timesteps and noise are the same at every evaluation, so that the loss shows progress. They
    depend only on the seed of the run and the place of an image among these; batches do not depend
    on the number of processes, so that the result is the same number.

    Raises:
        DataError: for an unreadable image, before training begins.
    """

    def __init__(self, source: Source, config: Config, device: torch.device, world: World = ALONE):
        self.source = source
        self.config = config
        self.device = device
        self.world = world

        n = min(len(source), config.eval.held_out_images)
        self.indices = [i * len(source) // n for i in range(n)]
        self.seeds = image_seeds(
            config.train.seed, MANY, n
        )  # no training step has this number, so no seed is used twice
        batches = [range(n)[i : i + AT_ONCE] for i in range(0, n, AT_ONCE)]
        self.parts = batches[world.rank :: world.size]
        for places in self.parts:
            self.batch(places)  # fail now, not at the first measurement

    @torch.no_grad()
    def measure(self, losses: Callable[[Batch], dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss as `held_out`, by quarter as `held_out/q1` (least noisy) to `q4`.

        Every process must call this.
        """
        values = torch.zeros(len(self.indices), QUARTERS, dtype=torch.float64)
        for places in self.parts:
            batch = self.batch(places).part(0, len(places) * QUARTERS, self.device)
            loss = losses(batch)["loss"].double().cpu()
            values[places.start : places.stop] = loss.view(-1, QUARTERS)

        values = sum(gather(values, self.world))
        quarters = {f"held_out/q{i + 1}": value for i, value in enumerate(values.mean(0).tolist())}
        return {"held_out": values.mean().item(), **quarters}

    def batch(self, places: range) -> Batch:
        """The images at some places, Q times each. Raises DataError for an unreadable one."""
        indices = [self.indices[k] for k in places]
        generators = [torch.Generator().manual_seed(self.seeds[k]) for k in places]
        with of_held_out(self.config):
            x_0, labels = self.source.read(indices, generators)
        noise = torch.cat([torch.randn(QUARTERS, *x_0.shape[1:], generator=g) for g in generators])

        # One timestep in each quarter, which the images together cover evenly.
        within = (self.seeds[0] / 2**63 + GOLDEN * np.array(places)) % 1  # (n,)
        share = (np.arange(QUARTERS) + within[:, None]) / QUARTERS  # (n, Q), of all timesteps
        t = torch.from_numpy((share * self.config.diffusion.timesteps).astype(np.int64)).flatten()

        y = labels.repeat_interleave(QUARTERS) if self.config.model.num_classes else None
        text = None
        if self.config.model.text_width:
            text = self.source.text(indices, generators).repeat_interleave(QUARTERS, 0)
        return Batch(x_0.repeat_interleave(QUARTERS, 0), t, noise, y, text)


@contextlib.contextmanager
def of_held_out(config: Config) -> Iterator[None]:
    """Say that an image which cannot be read is one of a folder in `data.held_out`, and what helps.

    Raises DataError.
    """
    try:
        yield
    except DataError as e:
        folder = config.data.held_out
        if not isinstance(folder, str) or not folder:
            raise
        raise DataError(
            f"{HELD_OUT} {str(e).removeprefix('data.path: ')}; restore the image in {folder!r}, or "
            "remove it from there"
        ) from e


@contextlib.contextmanager
def naming_fields() -> Iterator[None]:
    """Let errors that name a parameter of `evaluate` name the field of the section `eval`."""
    try:
        yield
    except DiffussmError as e:
        if str(e).startswith(("reference:", "extractor:")):
            e.args = (f"eval.{e}", *e.args[1:])
        raise


class Scoring:
    """Metrics of images that averaged weights draw, against `eval.reference`; keeps the best.

    A run with text draws captions from `source`. `warnings` are for the user.

    Raises:
        DiffussmError: if there is no reference, or the extractor cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        root: Path,
        decoding: Decoding,
        device: torch.device,
        world: World = ALONE,
    ):
        path = config.reference
        if decoding.warning:
            raise DataError(f"eval.every: {decoding.warning}")
        if path is None:
            raise ConfigError(
                "eval.every: needs eval.reference, an .npz or a folder of real images, or "
                "data.held_out"
            )
        self.config = config
        self.source = source
        self.root = root
        self.decoding = decoding

        with naming_fields():
            self.evaluator = Evaluator(config.eval.extractor, device=str(device), world=world)
            self.evaluator.choose(config.data.size, config.data.is_grey)
            self.reference = self.evaluator.reference(path, None, config.data.size)
            check_images(("fid",), None, self.reference)
        self.warnings = doubts(self.evaluator.requested, self.evaluator.name, path)
        if self.reference.images is not None and self.reference.images.left_out:
            self.warnings.append(self.reference.images.left_out)

    def score(self, step: Step, model: Backbone, keep: bool = True) -> dict[str, float]:
        """Metrics of a model in eval mode by name, such as `eval/fid`; empty on other ranks than 0.

        If `keep`, the weights with the best FID go to RUN/best. They are the best of those that
        were measured in the same way: after a change of the settings, the next ones go there.

        Raises:
            DataError, ConfigError: if reference and extractor do not match.
            RunError: if RUN/best cannot be written.
        """
        config = self.config
        steps = min(config.sample.steps, config.eval.steps)
        sampling = dataclasses.replace(config.sample, steps=steps)
        sampler = Sampler(model, config, sampling, self.decoding, dtype=step.dtype)

        # The same seeds, labels and captions every time.
        seeds = range(config.eval.images)
        text = captions_of(self.source, len(seeds)) if config.model.text_width else None
        channels = self.evaluator.extractor.channels
        images = DrawnImages(
            sampler, seeds, sampler.labels(seeds), channels, "averaged weights", text=text
        )

        metrics, _ = finish(self.evaluator.compare(images, self.reference, USUAL, lenient=True))
        values = {f"eval/{name}": value for name, value in metrics.items()}
        if keep and "eval/fid" in values:
            self._keep_if_best(step.number, model, values)
        return values

    def _keep_if_best(self, number: int, model: Backbone, values: dict[str, float]) -> None:
        if not math.isfinite(values["eval/fid"]):  # no other would ever be better
            return
        best = self.root / runs.BEST
        before = runs.read_metrics(best).get("eval/fid", float("inf"))
        is_better = values["eval/fid"] < before
        if is_better or difference_of_best(self.root, self.config):
            runs.write_weights(
                best, self.config, model.state_dict(), number, {"step": number, **values}
            )


def difference_of_best(root: Path, config: Config) -> str:
    """How the FID of RUN/best was measured otherwise than a configuration says, so that the two
    cannot be compared; empty if they can, or if there is none.
    """
    best = root / runs.BEST
    if "eval/fid" not in runs.read_metrics(best):
        return ""
    try:
        before = _measurement(runs.read_config(best))
    except RunError as e:
        return str(e)
    now = _measurement(config)
    return ", ".join(
        f"{name} was {before[name]!r} and is now {value!r}"
        for name, value in now.items()
        if value != before[name]
    )


def _measurement(config: Config) -> dict[str, Any]:
    """All settings on which a score depends, besides the weights, by name."""
    e, s = config.eval, config.sample
    values = {
        "eval.images": e.images,
        "eval.steps": min(e.steps, s.steps),
        "eval.reference": config.reference,
        "eval.extractor": e.extractor,
    }
    others = {"steps", "prompts", "guide"}  # counted above, of previews alone, and of no run
    drawing = {f"sample.{f.name}": getattr(s, f.name) for f in dataclasses.fields(s)}
    return values | {k: v for k, v in drawing.items() if k.partition(".")[2] not in others}
