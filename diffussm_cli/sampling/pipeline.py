"""A pipeline for diffusers around a trained run. The files that `runs/publish.py` writes into
`final/` lead here.
"""

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

from diffussm_cli.data.decoding import Decoding, open_decoding
from diffussm_cli.data.images import check_finite, to_uint8
from diffussm_cli.data.vae import VAE
from diffussm_cli.data.vae_facts import facts_of
from diffussm_cli.diffusion.denoiser import keeping
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.diffusion.samplers import begin_at
from diffussm_cli.diffusion.schedulers import sample, set_steps
from diffussm_cli.model.mixer import kept_kernels
from diffussm_cli.sampling.beginning import unused_of_beginning
from diffussm_cli.sampling.generate import begin, make_denoiser
from diffussm_cli.sampling.pipeline_denoiser import Denoiser, Network
from diffussm_cli.sampling.pipeline_request import (
    checked_guidance,
    checked_steps,
    read_image,
    read_request,
)
from diffussm_cli.sampling.precision import autocast
from diffussm_cli.sampling.sampler import PromptEncoder

OUTPUTS = ("pil", "np", "pt", "latent")
INDEX = "model_index.json"


class DiffuSSMPipeline(DiffusionPipeline):
    """Draws images of a trained run; with the scheduler that comes with it, those of `diffussm
    sample`, unless the run draws with heun, euler or sde: diffusers has none of these, and the
    scheduler is DPM-Solver++.

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
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
    ) -> Any:
        """Draw images: of noise, from an image, or where a mask is white.

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
            latents: x_T, (B, C, H, W), in place of noise from the generator; with `image`, what
                the image is mixed with.
            output_type: `pil`; `np`, float (B, H, W, C) in [0, 1]; `pt`, float (B, C, H, W) in [0,
                1]; or `latent`, x_0 in model space, (B, C, H, W).
            callback_on_step_end: is called as (pipeline, step, timestep, tensors) after each step;
                what it returns as `latents` takes the place of x.
            callback_on_step_end_tensor_inputs: the tensors that it gets; there is `latents`.
            image: what all images begin with in place of noise, of the size of the run's: an image
                of Pillow, an array (H, W, C), or a tensor (C, H, W); of floats, in [0, 1].
            mask_image: of the same kinds; `image` is drawn anew where it is white, and kept where
                it is black.
            strength: the share of the steps that is taken, from 0, which returns the image, to 1;
                by default 0.8, and 1 with a mask.

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
        request = read_request(
            self.denoiser,
            prompt,
            negative_prompt,
            class_labels,
            generator,
            latents,
            batch_size,
            times=num_images_per_prompt,
        )
        self._guidance_scale = checked_guidance(guidance_scale, config)
        steps = checked_steps(num_inference_steps, config)
        beginning = read_image(config, self._decoding(), image, mask_image, strength)
        if line := unused_of_beginning(beginning, dataclasses.replace(config.sample, steps=steps)):
            warnings.warn(line, stacklevel=2)
        is_led_away = self._guidance_scale != 1 or callback_on_step_end is not None
        if any(request.negatives or ()) and not is_led_away:
            warnings.warn(
                "negative_prompt: not used, because guidance_scale is 1; give 3, for example",
                stacklevel=2,
            )
        text = self._encode(request.prompts, request.negatives)

        # the process
        objective = make_objective(config.diffusion, device)
        scheduler = set_steps(self._scheduler(), objective, steps)
        y, x = begin(model, device, request.generators, request.labels, latents)
        network = Network(self.denoiser)

        def denoise(x: Tensor, t: float) -> Tensor:
            sampling = dataclasses.replace(config.sample, guidance=self._guidance_scale)
            return make_denoiser(network, objective, sampling, y, text)(x, t)

        # what the images begin with
        x_0 = beginning.x_0
        kept: Callable[[Tensor, float], Tensor] = denoise
        if x_0 is not None:
            x_0 = x_0.to(x).expand_as(x)
            if beginning.redrawn is not None:
                kept = keeping(denoise, objective, x_0, x, beginning.redrawn.to(device))
        grid = scheduler.timesteps.tolist()
        x, start = begin_at(x_0, beginning.strength, objective, x, grid)
        self._num_timesteps, self._interrupt = len(grid) - start, False

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

            if start < len(grid):
                x = sample(kept, scheduler, x, request.generators, after_step, start)

        # the images
        final = beginning.keep(x).float().cpu()
        check_finite(final)
        images: Any = final
        if output_type != "latent":
            images = _as_output(beginning.paste(self._decode(final)), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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
        decoding = self._decoding()
        if decoding.warning:
            warnings.warn(decoding.warning, stacklevel=3)
        return decoding.decode(latents)

    def _decoding(self) -> Decoding:
        """How latents become images: by the VAE of the pipeline, as a preview, or not at all."""
        if self.vae is None:
            return self._preview or Decoding(lambda x: x, {})

        facts = facts_of(self.vae, "vae", option="vae")
        d = self.denoiser.run.config.data
        if (facts.channels, facts.downsample) != (d.channels, d.downsample):
            has = f"{facts.channels} channels and downsampling {facts.downsample}"
            raise ValueError(f"vae: it has {has}, but the run has {d.channels} and {d.downsample}")

        weight = next(self.vae.parameters())
        vae = VAE(self.vae, facts, weight.device, weight.dtype).in_space_of(d)
        return Decoding(vae.decode, {}, vae=vae)


def _as_output(images: Tensor, output_type: str) -> Any:
    """(B, C, H, W) in [-1, 1] in the form that was asked for. Raises NotFiniteError."""
    if output_type == "pil":
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
    check_finite(images)
    scaled = (images / 2 + 0.5).clamp(0, 1)
    return scaled.permute(0, 2, 3, 1).numpy() if output_type == "np" else scaled
