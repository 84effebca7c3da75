"""A pipeline for diffusers around a trained run. The files that `runs/publish.py` writes into `final/` lead here."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from diffussm_cli.data.images import to_uint8
from diffussm_cli.data.vae import Decoding, open_decoding
from diffussm_cli.diffusion.process import make_objective
from diffussm_cli.diffusion.sampling import set_steps
from diffussm_cli.machine.hub import fetch
from diffussm_cli.model.mixer import kept_kernels
from diffussm_cli.runs import CONFIG, FILES_TO_SAMPLE, TrainedRun, find_run, load_model
from diffussm_cli.sampling.generate import draw
from diffussm_cli.sampling.precision import cast_products
from diffussm_cli.sampling.sampler import PromptEncoder


class Denoiser(nn.Module):
    """The network of a trained run, with its configuration in `run`, as a component of the pipeline."""

    def __init__(self, run: TrainedRun):
        super().__init__()
        self.run, self.model = run, load_model(run)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "Denoiser":
        """Load the run whose `denoiser/` is `folder`. diffusers fetches only files that it knows; here come the others.

        Raises:
            DiffussmError: if the run cannot be read or fetched.
        """
        root = Path(folder).parent
        if not (root / CONFIG).exists() and root.parent.name == "snapshots":  # of CACHE/models--OWNER--NAME
            repository = root.parents[1].name.removeprefix("models--").replace("--", "/")
            root = fetch(f"{repository}@{root.name}", "RUN", FILES_TO_SAMPLE, root.parents[2])
        denoiser = cls(find_run(root))
        cast_products(denoiser.model, options.get("torch_dtype") or options.get("dtype") or torch.float32)
        return denoiser

    @property
    def dtype(self) -> torch.dtype:
        """The precision of matrix products; the state space layers stay in float32."""
        return self.model.patch_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.patch_in.weight.device


class DiffuSSMPipeline(DiffusionPipeline):
    """Draws images of a trained run; with the scheduler that comes with it, those of `diffussm sample`.

    Schedulers that step along x_t can take its place, such as DDIM, DPM-Solver++ and UniPC.
    """

    denoiser: Denoiser
    scheduler: Any

    def __init__(self, denoiser: Denoiser, scheduler: Any):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self._decoding: dict[torch.device, Decoding] = {}
        self._encode = PromptEncoder(denoiser.run.config)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        class_labels: int | Sequence[int] | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw images.

        Args:
            prompt: for a model with text, one for all images, or one per image.
            negative_prompt: what guidance leads away from.
            class_labels: one per image; by default each is drawn with the generator.
            batch_size: number of images, if no list of prompts, labels or generators gives it.
            num_inference_steps, guidance_scale: by default those of the run.
            generator: on the CPU; one for all images or a list with one per image, as `diffussm sample` has.
            output_type: `pil`; `np`, float (B, H, W, C) in [0, 1]; or `pt`, float (B, C, H, W) in [0, 1].

        Raises:
            ValueError: if the numbers of prompts, labels and generators differ, the prompt does not fit the model, or
                the scheduler needs scaled inputs.
        """
        model, config, device = self.denoiser.model, self.denoiser.run.config, self.denoiser.device
        labels = [class_labels] if isinstance(class_labels, int) else class_labels
        listed = [list(given) for given in (None if isinstance(prompt, str) else prompt, labels) if given]
        if generator is None or isinstance(generator, torch.Generator):
            generators = [generator or torch.default_generator] * len(listed[0] if listed else range(batch_size))
        else:
            generators = list(generator)
        if any(len(given) != len(generators) for given in listed):
            counts = " and ".join(str(len(given)) for given in listed)
            raise ValueError(f"{counts} prompts or class_labels and {len(generators)} generators do not match")
        if labels and not all(0 <= label < model.num_classes for label in labels):
            raise ValueError(f"class_labels: {list(labels)} must lie in 0..{model.num_classes - 1}")
        steps = config.sample.steps if num_inference_steps is None else num_inference_steps
        guidance = config.sample.guidance if guidance_scale is None else guidance_scale
        sampling = dataclasses.replace(config.sample, steps=steps, guidance=guidance)
        objective = make_objective(config.diffusion, device)
        scheduler = set_steps(self._scheduler(), objective, steps)
        self._check_prompt(prompt, negative_prompt)
        said = [prompt] * len(generators) if isinstance(prompt, str) else prompt or ()
        text = self._encode(said, negative_prompt)
        with kept_kernels(model):
            _, latents = draw(model, objective, sampling, generators, labels, self.denoiser.dtype, scheduler, text)
        images = _as_output(self._decode(latents, device), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_prompt(self, prompt: str | Sequence[str] | None, negative: str | None) -> None:
        with_text = self.denoiser.run.config.model.text_width > 0
        if not with_text and (prompt or negative):
            raise ValueError("prompt: this model was trained without text")
        if with_text and not prompt:
            raise ValueError("prompt: this model draws what a text says; give one")

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"copy the folder {self.denoiser.run.weights.parent}; it holds all that is needed")

    def _scheduler(self) -> Any:
        """A copy of the scheduler for one batch of images."""
        scheduler = copy.deepcopy(self.scheduler)
        if getattr(scheduler, "init_noise_sigma", 1) != 1:
            raise ValueError(f"{type(scheduler).__name__} needs scaled inputs; use DDIM, DPM-Solver++ or UniPC")
        if type(scheduler).__name__ != "DDPMScheduler":
            scheduler.register_to_config(variance_type=None)  # copied from DDPM's, it would change the output's meaning
        return scheduler

    def _decode(self, latents: Tensor, device: torch.device) -> Tensor:
        if device not in self._decoding:
            self._decoding[device] = open_decoding(self.denoiser.run.config, device)
        decoding = self._decoding[device]
        if decoding.warning:
            warnings.warn(decoding.warning, stacklevel=3)
        return decoding.decode(latents)


def _as_output(images: Tensor, output_type: str) -> Any:
    """(B, C, H, W) in [-1, 1] in the form that was asked for."""
    if output_type == "pil":
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
    scaled = (images / 2 + 0.5).clamp(0, 1)
    return scaled.permute(0, 2, 3, 1).numpy() if output_type == "np" else scaled
