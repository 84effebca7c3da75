"""Measures images against references: an extractor, a cache of features, and the comparison."""

import math
from collections.abc import Generator, Sequence
from pathlib import Path

from diffussm_cli.config import BUILTIN, Config
from diffussm_cli.errors import DataError
from diffussm_cli.evaluation.comparison import (
    USUAL,
    check_images,
    evaluate_features,
    needs_images,
    possible,
)
from diffussm_cli.evaluation.extractors import AUTO, Extractor, load_extractor
from diffussm_cli.evaluation.features import Gathered, gather_features
from diffussm_cli.evaluation.reference import Reference, check_extractor, open_reference
from diffussm_cli.evaluation.sets import HELD_OUT, ImageSet, open_images
from diffussm_cli.evaluation.text import Clip, names_of, retrieval
from diffussm_cli.events import Event, Message, Stage, Warned
from diffussm_cli.machine.device import keep_freed_memory, pick_device
from diffussm_cli.machine.processes import ALONE, World

Size = tuple[int, int]  # height, width in pixels


def held_out_of_text(config: Config) -> str | None:
    """Where the held-out images of a run with text are; None if there is no separate set of them,
    or only latents.
    """
    data = config.data
    path = f"{data.path}{HELD_OUT}" if data.path.startswith(BUILTIN) else data.held_out
    if not config.model.text_width or data.vae is not None or not isinstance(path, str):
        return None
    return path or None


class Evaluator:
    """An extractor, a cache of features, and the comparison of image sets with references.

    Args:
        extractor: a name for `load_extractor`, or `auto` to choose by the first images that are
            opened.
        weights: a file with the weights of `inception`, instead of a download.
        cache: the folder for cached features; None disables the cache.
    """

    def __init__(
        self,
        extractor: str = AUTO,
        weights: Path | str | None = None,
        device: str = "auto",
        batch_size: int = 64,
        cache: Path | str | None = None,
        world: World = ALONE,
    ):
        keep_freed_memory()

        self.requested = extractor
        self.name = extractor
        self.weights = None if weights is None else Path(weights)
        self.device = pick_device(device)
        self.batch_size = batch_size
        self.cache = None if cache is None else Path(cache)
        self.world = world
        self._extractor: Extractor | None = None

    @property
    def extractor(self) -> Extractor:
        """The extractor, loaded at first use. Raises DiffussmError."""
        if self._extractor is None:
            self._extractor = load_extractor(self.name, self.weights, self.device)
        return self._extractor

    def choose(self, size: Size, grey: bool) -> None:
        """Replace `auto` by digits for grey images of 28x28, and by inception for others."""
        if self.name == AUTO:
            self.name = "digits" if tuple(size) == (28, 28) and grey else "inception"

    def open(self, path: str, size: Size | None = None, name: str = "samples") -> ImageSet:
        """Open a set of images for the extractor, cropped to `size` if given; `name` is what errors
        call the path.

        Raises:
            DiffussmError: if it cannot be read, or does not fit the extractor.
        """
        if self.name == AUTO:
            images = open_images(path, 3, None, name)
            self.choose(size or images.size, images.grey)
        return open_images(path, self.extractor.channels, size, name)

    def reference(self, path: str, size: Size | None, size_of_run: Size | None = None) -> Reference:
        """Open a reference. Its images are cropped to `size`, or to the size of the run unless they
        are in an .npz.

        Raises:
            DiffussmError: if it cannot be read or was made with another extractor.
        """
        is_folder = not path.endswith(".npz") and not path.startswith(BUILTIN)
        return open_reference(path, self.extractor, size or (size_of_run if is_folder else None))

    def held_out(self, config: Config) -> ImageSet | None:
        """The held-out images of a run with text; None if there is no separate held-out set, or
        only latents.
        """
        path = held_out_of_text(config)
        if path is None:
            return None
        size = None if path.startswith(BUILTIN) else config.data.size
        return self.open(path, size, "data.held_out")

    def features(self, images: ImageSet, unit: str) -> Generator[Event, None, Gathered]:
        """Compute the features of a set, or load them from the cache. A Message tells what of the
        set is not used.
        """
        if images.left_out:
            yield Message(images.left_out)
        yield Stage("loading the extractor")
        return (
            yield from gather_features(
                images, self.extractor, self.batch_size, self.cache, self.world, unit
            )
        )

    def compare(
        self,
        images: ImageSet,
        reference: Reference,
        metrics: Sequence[str] = USUAL,
        lenient: bool = False,
    ) -> Generator[Event, None, tuple[dict[str, float], Gathered]]:
        """The metrics of a set, and its features. On processes other than the first, metrics are
        empty.

        Args:
            lenient: leave out metrics that the extractor or the reference does not support, and
                allow values that are not finite, instead of raising.

        Raises:
            DataError, ConfigError: if the reference does not fit the extractor, or a metric cannot
                be computed or, unless `lenient`, is not a finite number.
        """
        if not lenient:
            check_images(metrics, images, reference)

        # The features of both sets.
        if (
            reference.images is not None
            and reference.gathered is None
            and needs_images(metrics, reference)
        ):
            reference.complete((yield from self.features(reference.images, "reference")))
        samples = yield from self.features(images, "samples")
        check_extractor(reference, samples.pool.shape[1], self.extractor)

        # Their metrics, on one process.
        values: dict[str, float] = {}
        if self.world.rank:
            return values, samples
        yield Stage("metrics")
        names = possible(metrics, samples, reference) if lenient else metrics
        for name, value in evaluate_features(samples, reference, names):
            if not lenient and not math.isfinite(value):
                raise DataError(
                    f"metrics: {name} of {images.name} against {reference.name} is {value}"
                )
            values[name] = value
            yield Stage(f"metrics: {', '.join(values)}")
        return values, samples

    def prompted(
        self, samples: Gathered, prompts: Sequence[str], real: ImageSet | None
    ) -> Generator[Event, None, dict[str, float]]:
        """How well images with these features show what their prompts say; empty on processes other
        than the first.

        `clip_score`, if the extractor is CLIP. If every prompt is a caption of the `real` images:
        the shares of images whose nearest real image has the right name or class
        (`evaluation/text.py`). A Warned tells if none is.
        """
        values: dict[str, float] = {}
        network = getattr(self.extractor, "network", None)
        if isinstance(network, Clip) and self.world.rank == 0:
            values["clip_score"] = network.score(samples.pool, prompts)

        right_names = names_of(prompts, real.captions) if real else None
        if real is None or right_names is None:
            yield Warned(
                "retrieval is left out: the prompts are not captions of the held-out or reference "
                "images"
            )
            return values

        pool = (yield from self.features(real, "captioned images")).pool
        if self.world.rank == 0:
            captioned = [i for i, captions in enumerate(real.captions) if captions]
            names = [real.captions[i][0] for i in captioned]
            labels = real.labels and [real.labels[i] for i in captioned]
            shares = retrieval(samples.pool, right_names, pool[captioned], names, labels)
            values |= {f"retrieval_{name}": share for name, share in shares.items()}
        return values
