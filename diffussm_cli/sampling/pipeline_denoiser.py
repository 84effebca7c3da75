"""The network of a trained run as a component of a pipeline of diffusers."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from diffussm_cli.machine.hub import fetch
from diffussm_cli.runs import (
    CONFIG,
    FILES_TO_SAMPLE,
    TrainedRun,
    find_run,
    load_model,
    pipeline_files,
    write_weights,
)
from diffussm_cli.sampling.precision import cast_products

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Denoiser(ModelMixin, ConfigMixin):
    """The network of a trained run, with its configuration in `run`, as a component of the
    pipeline.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, run: TrainedRun):
        super().__init__()
        self.run = run
        self.model = load_model(run)
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
            ValueError: for a variant, as the precision is chosen when a run is loaded; and for a
                SiT.
            OSError: if the folder cannot be written.
        """
        if variant is not None:
            raise ValueError(
                f"variant: {variant!r} is not written; load the model with dtype= for another "
                "precision"
            )

        self.model.check_saveable()
        config = self.run.config
        step = self.run.step
        weights = {name: tensor.float().cpu() for name, tensor in self.model.state_dict().items()}
        folder = Path(save_directory)
        finished = config.train.steps

        folder.mkdir(parents=True, exist_ok=True)
        write_weights(
            folder,
            config,
            weights,
            finished if step is None else step,
            others=pipeline_files(config),
            beside=True,
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


class Network:
    """A denoiser in the form that `make_denoiser` takes. It is called as a module, so that
    `compile` has an effect.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.null_class = denoiser, denoiser.model.null_class

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, text: Tensor | None) -> Tensor:
        return self.denoiser(x, t, y, text, return_dict=False)[0]
