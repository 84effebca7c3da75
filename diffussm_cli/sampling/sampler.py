"""The sampler: from seeds to decoded 8-bit images. `sample`, previews and evaluation all use it."""

import functools
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffussm_cli.config import Config, SampleConfig
from diffussm_cli.data.decoding import Decoding, open_decoding
from diffussm_cli.data.images import to_uint8
from diffussm_cli.data.text import Text, Texts, open_texts
from diffussm_cli.diffusion.integrators import AfterStep
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.errors import RunError
from diffussm_cli.machine.device import is_out_of_memory, keep_freed_memory, pick_device, pick_dtype
from diffussm_cli.model import Backbone
from diffussm_cli.runs import TrainedRun, find_run, load_model, named_by
from diffussm_cli.sampling.beginning import Beginning
from diffussm_cli.sampling.generate import generate, labels_of, name_of
from diffussm_cli.sampling.precision import cast_products


class PromptEncoder:
    """Prompts as vectors, for a model with text. Loads the run's encoder on first use."""

    def __init__(self, config: Config):
        self.config = config

    @functools.cached_property
    def texts(self) -> Texts:
        return open_texts(self.config)

    def __call__(
        self, prompts: Sequence[str], negative: str | Sequence[str] | None = None
    ) -> Text | None:
        """The vectors, or None for a model without text; `negative` is one text for all prompts, or
        one for each.

        Raises:
            DataError: without the run's encoder.
        """
        if not self.config.model.text_width:
            return None
        negatives = [negative] if isinstance(negative, str) else negative
        return Text(self.texts(prompts), None if negatives is None else self.texts(negatives))


# What must agree in a run and its guide: always; if both have recorded it, which earlier versions
# did not; and if the process has a schedule.
AGREE: tuple[str, ...] = ("data.size", "data.channels", "data.downsample", "data.text")
AGREE += ("data.normalize", "data.latents_mean", "data.latents_std")
AGREE += ("model.num_classes", "model.text_width", "model.text_tokens")
AGREE += ("diffusion.objective", "diffusion.predicts", "diffusion.timesteps")
RECORDED = ("data.vae_sha256", "data.text_sha256", "data.class_names")
SCHEDULE = ("diffusion.beta_start", "diffusion.beta_end", "diffusion.zero_terminal_snr")


class Guide(NamedTuple):
    """A weaker model that guidance leads away from, and which one it is, for meta.json."""

    model: Backbone
    record: dict[str, Any]


class Sampler:
    """Draws images by seed.

    Args:
        model: the network, in eval mode, on the device to compute on.
        config: configuration of the run that the model belongs to.
        sampling: sampler, steps and guidance.
        decoding: how latents become images.
        batch_size: number of images per batch.
        dtype: autocast dtype; float32 means no autocast.
        beginning: what images begin with, `encoded`; by default the noise of their seeds.
        guide: the model of `sampling.guide`.
    """

    def __init__(
        self,
        model: Backbone,
        config: Config,
        sampling: SampleConfig,
        decoding: Decoding,
        batch_size: int = 64,
        dtype: torch.dtype = torch.float32,
        beginning: Beginning | None = None,
        guide: Guide | None = None,
    ):
        self.model, self.config, self.sampling, self.decoding = model, config, sampling, decoding
        self.batch_size, self.dtype = batch_size, dtype
        self.beginning = beginning or Beginning()
        self.guide = guide
        self.text = PromptEncoder(config)
        self.device = next(model.parameters()).device
        self.objective = make_objective(config.diffusion, self.device)

    def labels(self, seeds: range, classes: Sequence[int] = ()) -> list[int] | None:
        """The label of each seed: `classes` in turn, or drawn with the seed; None for an
        unconditional model. Images between two seeds have the label of the first of these.
        """
        n = self.config.model.num_classes
        if not n:
            return None
        if classes:
            return [classes[i % len(classes)] for i in range(len(seeds))]
        if self.beginning.ends:
            return labels_of(self.beginning.ends[:1], n) * len(seeds)
        return labels_of(seeds, n)

    def generate(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        text: Text | None = None,
        batch_size: int | None = None,
        after_step: AfterStep | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield seeds and their images in model space, as `generate.generate` does."""
        return generate(
            self.model,
            self.objective,
            self.sampling,
            seeds,
            labels,
            batch_size=batch_size or self.batch_size,
            dtype=self.dtype,
            text=text,
            beginning=self.beginning,
            after_step=after_step,
            guide=self.guide and self.guide.model,
        )

    def draw(
        self,
        seeds: Sequence[int],
        labels: Sequence[int] | None,
        text: Text | None = None,
        after_step: AfterStep | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield seeds and their images, uint8 (B, C, H, W), batch by batch; a model with text needs
        its captions.

        Raises:
            NotFiniteError: if an image holds NaN or infinite values, before its batch is handed
                out.
            RunError: if the images do not fit into memory.
        """
        try:
            for batch, latents in self.generate(seeds, labels, text, after_step=after_step):
                images = self.decoding.decode(latents)
                pixels = to_uint8(images, [name_of(seed) for seed in batch])
                yield batch, self.beginning.paste(pixels)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            raise RunError(
                f"--batch-size: {self.batch_size} images do not fit into memory; use fewer"
            ) from e


def open_sampler(
    trained: TrainedRun,
    sampling: SampleConfig | None = None,
    batch_size: int = 64,
    precision: str = "auto",
    device: str = "auto",
    beginning: Beginning | None = None,
) -> Sampler:
    """The sampler of a trained run, with the run's own sampling settings by default.

    Args:
        beginning: from `read_beginning`.

    Raises:
        DiffussmError: if the weights cannot be read, the device is not available, `sampling.guide`
            does not fit, or there is an image to begin with but no VAE to encode it.
    """
    keep_freed_memory()
    where = pick_device(device)
    dtype = pick_dtype(precision, where)
    sampling = sampling or trained.config.sample

    # The networks: a guide is read only if it has an effect.
    guide = None
    if sampling.guide and sampling.guidance != 1:
        guide = open_guide(sampling.guide, trained.config, where, dtype)
    model = load_model(trained).to(where)
    cast_products(model, dtype)

    # From latents to images, and back for an image to begin with.
    decoding = open_decoding(trained.config, where)
    beginning = beginning and beginning.encoded(decoding, trained.config.data.downsample)
    return Sampler(model, trained.config, sampling, decoding, batch_size, dtype, beginning, guide)


def open_guide(name: str, config: Config, device: torch.device, dtype: torch.dtype) -> Guide:
    """The model that guides a run with this configuration: an earlier checkpoint of it, or another
    run of the same data.

    Raises:
        DiffussmError: if it cannot be read, or draws something else than the run.
    """
    with named_by("sample.guide", name):
        trained = find_run(Path(name))

    # Fields that must agree; of those that not every run has recorded, if both have.
    is_flow = config.diffusion.objective == "flow"
    for field in (*AGREE, *RECORDED, *(() if is_flow else SCHEDULE)):
        ours, theirs = (operator.attrgetter(field)(each) for each in (config, trained.config))
        if ours != theirs and not (field in RECORDED and not (ours and theirs)):
            raise RunError(
                f"sample.guide: {field} of {name!r} is {theirs!r:.80}, but the run has "
                f"{ours!r:.80}; both must be trained alike"
            )

    with named_by("sample.guide", name):
        model = load_model(trained).to(device)
    cast_products(model, dtype)
    return Guide(model, {"guide": name, "guide_sha256": trained.weights_sha256})
