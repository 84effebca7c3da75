"""A pipeline for diffusers around a trained run. The files that `runs/publish.py` writes into
`final/` lead here.
"""

import copy
import dataclasses
import json
import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from diffussm_cli.data.images import check_finite, to_uint8
from diffussm_cli.data.vae import VAE, Decoding, facts_of, open_decoding
from diffussm_cli.diffusion.process import make_objective
from diffussm_cli.diffusion.schedulers import sample, set_steps
from diffussm_cli.machine.hub import fetch
from diffussm_cli.model.mixer import kept_kernels
from diffussm_cli.runs import (
    CONFIG,
    FILES_TO_SAMPLE,
    TrainedRun,
    fill_folder,
    find_run,
    load_model,
    pipeline_files,
)
from diffussm_cli.sampling.generate import begin, make_denoiser
from diffussm_cli.sampling.precision import autocast, cast_products
from diffussm_cli.sampling.sampler import PromptEncoder

OUTPUTS = ("pil", "np", "pt", "latent")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX = "model_index.json"


class Denoiser(ModelMixin, ConfigMixin):
    """The network of a trained run, with its configuration in `run`, as a component of the
    pipeline.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, run: TrainedRun):
        super().__init__()
        self.run, self.model = run, load_model(run)
        sizes = {"in_channels": self.model.in_channels, "sample_size": list(self.model.input_size)}
        self.register_to_config(**sizes, **dataclasses.asdict(run.config.model))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "Denoiser":  # type: ignore[override]
        """Load the run at `folder`, or the run whose `denoiser/` it is.

        diffusers fetches only files that it knows; here come the others.

        Raises:
            DiffussmError: if the run cannot be read or fetched.
        """
        root = Path(folder) if (Path(folder) / CONFIG).exists() else Path(folder).parent
        # of CACHE/models--OWNER--NAME
        if not (root / CONFIG).exists() and root.parent.name == "snapshots":
            repository = root.parents[1].name.removeprefix("models--").replace("--", "/")
            root = fetch(f"{repository}@{root.name}", "RUN", FILES_TO_SAMPLE, root.parents[2])
        denoiser = cls(find_run(root))
        return denoiser.to(options.get("torch_dtype") or options.get("dtype") or torch.float32)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *_: Any, variant: str | None = None, **__: Any
    ) -> None:
        """Write the weights and the configuration as those of a finished run; `from_pretrained`
        reads them back.

        The weights are always safetensors, so `safe_serialization` has no effect.

        Raises:
            ValueError: for a variant; the precision is chosen when a run is loaded.
            OSError: if the folder cannot be written.
        """
        if variant is not None:
            raise ValueError(
                f"variant: {variant!r} is not written; load the model with dtype= for another "
                "precision"
            )

        config, step = self.run.config, self.run.step
        weights = {name: tensor.float().cpu() for name, tensor in self.model.state_dict().items()}
        folder, finished = Path(save_directory), config.train.steps

        folder.mkdir(parents=True, exist_ok=True)
        fill_folder(
            folder,
            config,
            weights,
            finished if step is None else step,
            others=pipeline_files(config),
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        text: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """What the objective predicts, and the covariance's v if it is learned, in `sample` of the
        output.

        Args:
            sample: x_t, (B, C, H, W).
            timestep: one for all, or (B,).
            class_labels: (B,), for a model with classes.
            text: (B, 1 + K, E), for a model with text.
        """
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        output = self.model(sample, t, class_labels, text)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def to(self, *args: Any, **options: Any) -> "Denoiser":  # type: ignore[override]
        """Move the network; a dtype is that of matrix products, and the state space layers stay in
        float32.

        Raises:
            ValueError: for another dtype than float32, bfloat16 and float16.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **options)
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: {dtype} must be one of {', '.join(map(str, DTYPES))}")
        if device is not None:
            super().to(device, non_blocking=non_blocking)  # type: ignore[arg-type]
        if dtype == torch.float32:
            self.model.float()
        elif dtype is not None:
            cast_products(self.model, dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The precision of matrix products; the state space layers stay in float32."""
        return self.model.patch_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.patch_in.weight.device


class _Network:
    """A denoiser in the form that `make_denoiser` takes. It is called as a module, so that
    `compile` has an effect.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.null_class = denoiser, denoiser.model.null_class

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, text: Tensor | None) -> Tensor:
        return self.denoiser(x, t, y, text, return_dict=False)[0]


class _Request(NamedTuple):
    """What a call asks for; the lists have one entry per image."""

    generators: list[torch.Generator]
    labels: list[int] | None
    prompts: list[str]
    negatives: list[str] | None


class DiffuSSMPipeline(DiffusionPipeline):
    """Draws images of a trained run; with the scheduler that comes with it, those of `diffussm
    sample`.

    Schedulers that step along x_t can take its place, such as DDIM, DPM-Solver++ and UniPC. `vae`
    is that of the run, or None for pixels; another one of its kind can take its place.
    """

    denoiser: Denoiser
    scheduler: Any
    vae: Any
    model_cpu_offload_seq = "denoiser->vae"  # type: ignore[assignment]
    _optional_components: ClassVar[list[str]] = ["vae"]  # type: ignore[misc]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, denoiser: Denoiser, scheduler: Any, vae: Any = None):
        super().__init__()

        # Without a VAE, the one that the run names, or else a preview.
        preview = None
        if vae is None and denoiser.run.config.data.vae is not None:
            decoding = open_decoding(denoiser.run.config, torch.device("cpu"))
            vae = decoding.vae and decoding.vae.model
            preview = decoding if vae is None else None
            if decoding.warning and vae is not None:
                warnings.warn(decoding.warning, stacklevel=2)

        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        self._preview: Decoding | None = preview  # decodes if the VAE of the run cannot be used
        self._encode = PromptEncoder(denoiser.run.config)
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @property
    def guidance_scale(self) -> float:
        """The guidance of the call in progress; a callback may change `_guidance_scale` for the
        steps to come.
        """
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The number of the scheduler's timesteps in the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the call after the step in
        progress.
        """
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: Any = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw images.

        Args:
            prompt: for a model with text, one for all images, or a list with one per image; "" says
                nothing.
            negative_prompt: what guidance leads away from, one for all images or one per image.
            class_labels: one for all images, or a list, array or tensor with one per image; by
                default each is drawn with the generator.
            batch_size: number of images, if no list of prompts, labels, generators or latents gives
                it.
            num_inference_steps, guidance_scale: by default those of the run.
            num_images_per_prompt: number of images of each prompt or label.
            generator: on the CPU; one for all images or a list with one per image, as `diffussm
                sample` has.
            latents: x_T, (B, C, H, W), in place of noise from the generator.
            output_type: `pil`; `np`, float (B, H, W, C) in [0, 1]; `pt`, float (B, C, H, W) in [0,
                1]; or `latent`, x_0 in model space, (B, C, H, W).
            callback_on_step_end: is called as (pipeline, step, timestep, tensors) after each step;
                what it returns as `latents` takes the place of x.
            callback_on_step_end_tensor_inputs: the tensors that it gets; there is `latents`.

        Raises:
            ValueError: if an argument is not as above, the numbers of prompts, labels, latents and
                generators differ, or the scheduler does not fit; also as NotFiniteError for an
                image with NaN or infinite values.
            DiffussmError: if the text encoder of the run cannot be used.
        """
        model, config, device = self.denoiser.model, self.denoiser.run.config, self.denoiser.device

        # what is asked for
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: {output_type!r} must be one of {', '.join(OUTPUTS)}")
        unknown = [
            name
            for name in callback_on_step_end_tensor_inputs
            if name not in self._callback_tensor_inputs
        ]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs: {unknown[0]!r} must be latents")
        counts = batch_size, num_images_per_prompt
        request = self._request(prompt, negative_prompt, class_labels, generator, latents, *counts)
        self._guidance_scale = self._checked_guidance(guidance_scale)
        steps = self._checked_steps(num_inference_steps)
        text = self._encode(request.prompts, request.negatives)

        # the process
        objective = make_objective(config.diffusion, device)
        scheduler = set_steps(self._scheduler(), objective, steps)
        y, x = begin(model, device, request.generators, request.labels, latents)
        self._num_timesteps, self._interrupt = len(scheduler.timesteps), False
        network = _Network(self.denoiser)

        def denoise(x: Tensor, t: float) -> Tensor:
            sampling = dataclasses.replace(config.sample, guidance=self._guidance_scale)
            return make_denoiser(network, objective, sampling, y, text)(x, t)

        # the steps
        bar = self.progress_bar(total=self._num_timesteps)
        with bar, kept_kernels(model), autocast(device, self.denoiser.dtype):

            def after_step(i: int, t: Tensor, x: Tensor) -> Tensor | None:
                bar.update()
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                    changed = callback_on_step_end(self, i, t, tensors) or {}
                    x = changed.get("latents", x).to(x)
                return None if self._interrupt else x

            x = sample(denoise, scheduler, x, request.generators, after_step)

        # the images
        final = x.float().cpu()
        check_finite(final)
        images: Any = (
            final if output_type == "latent" else _as_output(self._decode(final), output_type)
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _request(
        self,
        prompt: str | Sequence[str] | None,
        negative: str | Sequence[str] | None,
        class_labels: Any,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        batch_size: int,
        times: int,
    ) -> _Request:
        """The arguments of a call with one entry per image.

        Raises ValueError if they do not agree.
        """
        self._check_prompt(prompt, negative)
        for name, count in (("batch_size", batch_size), ("num_images_per_prompt", times)):
            if not _is_whole(count) or count < 1:
                raise ValueError(f"{name}: {count!r} must be a whole number of at least 1")
        labels = _labels(class_labels, self.denoiser.model.num_classes)
        is_alone = isinstance(generator, torch.Generator) or generator is None
        generators: list[torch.Generator] = [] if is_alone else list(generator)  # type: ignore[arg-type]

        # the number of images
        kinds = (
            ("prompts or class_labels", prompt),
            ("prompts or class_labels", labels),
            ("negative prompts", negative),
        )
        counts = [
            (times * len(value), kind) for kind, value in kinds if isinstance(value, list | tuple)
        ]
        counts += [] if is_alone else [(len(generators), "generators")]
        counts += [] if latents is None else [(len(latents), "latents")]
        counts += [(times * batch_size, "of batch_size")] if batch_size > 1 or not counts else []
        n = counts[0][0]
        if any(count != n for count, _ in counts):
            described = " and ".join(f"{count} {kind}" for count, kind in counts)
            raise ValueError(f"{described} do not match; each image needs one")
        if not n or n % times:
            raise ValueError(f"{n} images cannot be {times} for each prompt or label")
        shape = (n, self.denoiser.model.in_channels, *self.denoiser.model.input_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents: {tuple(latents.shape)} must be {shape}")
        if latents is not None:
            check_finite(latents)

        def per_image(value: Any) -> list:
            each = value if isinstance(value, list | tuple) else [value] * (n // times)
            return [entry for entry in each for _ in range(times)]

        return _Request(
            [generator or torch.default_generator] * n if is_alone else generators,  # type: ignore[list-item]
            None if labels is None else per_image(labels),
            [] if prompt is None else per_image(prompt),
            None if negative is None else per_image(negative),
        )

    def _check_prompt(
        self, prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None
    ) -> None:
        for name, given in (("prompt", prompt), ("negative_prompt", negative)):
            texts = given if isinstance(given, list | tuple) else [] if given is None else [given]
            if not all(isinstance(each, str) for each in texts):
                raise ValueError(f"{name}: {given!r:.60} must be a text or a list of texts")
        with_text = self.denoiser.run.config.model.text_width > 0
        if not with_text and (prompt or negative):
            raise ValueError("prompt: this model was trained without text")
        if with_text and prompt is None:
            raise ValueError("prompt: this model draws what a text says; give one")

    def _checked_guidance(self, guidance: float | None) -> float:
        config = self.denoiser.run.config
        if guidance is None:
            return config.sample.guidance
        if not isinstance(guidance, numbers.Real) or not math.isfinite(guidance) or guidance < 0:
            raise ValueError(f"guidance_scale: {guidance!r} must be a number of at least 0")
        if guidance != 1 and not (config.model.num_classes or config.model.text_width):
            raise ValueError(
                f"guidance_scale: {guidance!r} needs a model of classes or text; leave it at 1"
            )
        return float(guidance)

    def _checked_steps(self, steps: int | None) -> int:
        config = self.denoiser.run.config
        if steps is None:
            return config.sample.steps
        most = config.diffusion.timesteps
        if not _is_whole(steps) or not 1 <= steps <= most:
            raise ValueError(
                f"num_inference_steps: {steps!r} must be a whole number from 1 to {most}"
            )
        return int(steps)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,  # noqa: ARG002
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Write a folder like `final/` of a run, with the current weights, scheduler and VAE.

        Weights of the denoiser are always safetensors. `push_to_hub` is a method of its own.

        Raises:
            ValueError: for a variant, or for options of diffusers that have no meaning here.
            OSError: if the folder cannot be written.
        """
        unused = [name for name, value in options.items() if value and name != "max_shard_size"]
        if unused:
            raise ValueError(f"{unused[0]}: save_pretrained has no such option here")

        root = Path(save_directory)
        self.denoiser.save_pretrained(root, variant=variant)

        # The components besides the denoiser, and where the index finds them.
        index = json.loads((root / INDEX).read_text(encoding="utf-8"))
        components = {"scheduler": self.scheduler, "vae": self.vae}
        for name, component in components.items():
            if component is not None:
                component.save_pretrained(root / name)
                index[name] = ["diffusers", type(component).__name__]
        (root / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _scheduler(self) -> Any:
        """A copy of the scheduler for one batch of images."""
        scheduler = copy.deepcopy(self.scheduler)
        if getattr(scheduler, "init_noise_sigma", 1) != 1:
            raise ValueError(
                f"scheduler: {type(scheduler).__name__} needs scaled inputs; "
                "use DPMSolverMultistepScheduler or UniPCMultistepScheduler"
            )
        if type(scheduler).__name__ != "DDPMScheduler":
            # copied from DDPM's, it would change the output's meaning
            scheduler.register_to_config(variance_type=None)
        return scheduler

    def _decode(self, latents: Tensor) -> Tensor:
        if self._preview is not None and self.vae is None:
            warnings.warn(str(self._preview.warning), stacklevel=3)
            return self._preview.decode(latents)
        if self.vae is None:
            return latents
        facts, d = facts_of(self.vae, "vae", option="vae"), self.denoiser.run.config.data
        if (facts.channels, facts.downsample) != (d.channels, d.downsample):
            has = f"{facts.channels} channels and downsampling {facts.downsample}"
            raise ValueError(f"vae: it has {has}, but the run has {d.channels} and {d.downsample}")
        weight = next(self.vae.parameters())
        return VAE(self.vae, facts, weight.device, weight.dtype).decode(latents)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _labels(given: Any, num_classes: int) -> int | list[int] | None:
    """One label for all images or a list of them, from numbers, arrays, tensors and nested lists.
    Raises ValueError.
    """
    if given is None:
        return None
    if not num_classes:
        raise ValueError(f"class_labels: {given!r:.60} given, but this model has no classes")

    array = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"class_labels: {given!r:.60} must be whole numbers in 0..{num_classes - 1}"
        )

    labels = array.reshape(-1).tolist()
    if not all(0 <= label < num_classes for label in labels):
        raise ValueError(f"class_labels: {labels} must lie in 0..{num_classes - 1}")
    return labels[0] if array.ndim == 0 else labels


def _as_output(images: Tensor, output_type: str) -> Any:
    """(B, C, H, W) in [-1, 1] in the form that was asked for. Raises NotFiniteError."""
    if output_type == "pil":
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
    check_finite(images)
    scaled = (images / 2 + 0.5).clamp(0, 1)
    return scaled.permute(0, 2, 3, 1).numpy() if output_type == "np" else scaled
