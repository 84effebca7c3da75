"""The fields of a configuration: frozen dataclasses with the default, the help and the bounds of
each. A value is read by reading.py, and checked beside the others by checks.py.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from diffussm_cli.config.mixers import MIXER_FACTS, MIXER_FIELDS, mixer_names, mixers_with

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
HUB = "hub:"  # prefix for a data set of the hub by name
PYTHON = "python:"  # prefix for a data set that was an object; the name of its class follows
BUILTIN = "builtin:"  # prefix of `data.path` for a data set that a Python package ships

# The bounds of the fields are generous: a value outside them is a typo or comes from a hostile
# file.
MANY = 10**8  # steps
MAX_SEED = 2**62
MAX_BATCH = 2**16
MAX_CLASSES = 10**6

# Widths of the averages of which snapshots are made: those of EDM2, arXiv 2312.02696.
WIDTHS = (0.05, 0.1)
SamplerName = Literal["ddpm", "ddim", "dpmpp", "unipc", "euler", "heun", "sde"]
# The samplers that fit each objective; the first one draws the previews during training.
SAMPLERS: dict[str, tuple[SamplerName, ...]] = {
    "noise": ("ddim", "ddpm", "dpmpp", "unipc", "euler", "heun"),
    "velocity": ("euler", "ddim", "ddpm", "dpmpp", "unipc", "heun"),
    "flow": ("euler", "heun", "sde", "dpmpp", "unipc"),
}


def _option(default: Any, help: str, commas: bool = True, **bounds: float) -> Any:
    """A field with its help and bounds: `least`, `above`, `most`, `below`; `commas`: whether they
    separate values.
    """
    return field(default=default, metadata={"help": help, "commas": commas, **bounds})


def _listed(names: Iterable[str], word: str = "and") -> str:
    """Names in a sentence: `a, b and c`."""
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last


@dataclass(frozen=True)
class ModelConfig:
    """The backbone and its sizes, in the paper's letters (arXiv 2311.18257)."""

    backbone: Literal["diffussm", "dit"] = _option("diffussm", "DiffuSSM, or the DiT baseline")
    hidden_size: int = _option(1152, "D, a multiple of 4", least=4, most=2**14)
    depth: int = _option(29, "number of blocks", least=1, most=1000)
    patch_size: int = _option(1, "P; 1 makes every latent or pixel a token", least=1, most=256)
    compression: int = _option(2, "M, hourglass ratio: tokens per position", least=1, most=256)
    d_state: int = _option(
        64,
        f"N, state size of {_listed(mixers_with('d_state'))}, even (16 is enough for axial)",
        least=2,
        most=4096,
    )
    heads: int = _option(
        16,
        f"heads of DiT and of the mixers {_listed(mixers_with('heads'))}",
        least=1,
        most=256,
    )
    mixer: str = _option(
        "s4d",
        f"layer that mixes tokens: {_listed(MIXER_FACTS, 'or')}; "
        "a list such as conv,axial repeats along the blocks; not used by DiT",
    )
    kernel: Literal[3, 5, 7] = _option(3, "side of the convolution of the mixer conv, in tokens")
    conv_gate: Literal["attention", "grn"] = _option(
        "attention",
        "how the mixer conv weighs channels: channel attention, or global response normalisation",
    )
    scan: Literal["raster", "alternate", "four"] = _option(
        "raster", "orders of tokens by block; not used by DiT"
    )
    local: Literal[0, 3] = _option(
        0, "3: a depthwise 3x3 convolution before each mixer, or before each attention of a DiT"
    )
    qk_norm: bool = _option(
        False, "queries and keys divided by their root mean squares; DiT and mixer attention"
    )
    rope: bool = _option(
        False, "queries and keys turned by row and column; DiT and mixer attention"
    )
    stem: int = _option(
        0,
        "channels of two 3x3 convolutions before the patches; 0: none",
        least=0,
        most=2**10,
    )
    skips: bool = _option(
        False, "add each block of the first half to its mirror image, by layers that start at zero"
    )
    num_classes: int = _option(
        1000, "number of classes; 0: unconditional", least=0, most=MAX_CLASSES
    )
    learn_sigma: bool = _option(True, "also learn the covariance")
    label_std: float = _option(
        0.02, "initial standard deviation of the label table", above=0, most=100
    )
    text_width: int = _option(
        0, "E, width of the text encoder's vectors; 0: no text", least=0, most=2**14
    )
    text_tokens: int = _option(
        0, "K, positions for tokens of a caption; 0: its pooled vector only", least=0, most=1024
    )

    @property
    def is_conditional(self) -> bool:
        """Whether the model is told classes or text, so that it can be guided."""
        return bool(self.num_classes or self.text_width)

    @property
    def mixers(self) -> list[str]:
        """The mixers of the blocks, in turn."""
        return mixer_names(self.mixer)


# Fields of `model` that a DiT does not have: all of mixers, but for those of its own attention.
NOT_OF_DIT = (
    "mixer",
    *(name for name in MIXER_FIELDS if name not in MIXER_FACTS["attention"].fields),
    "scan",
)


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on. Resolution is in pixels; the grid is resolution /
    downsample.
    """

    path: str = _option(
        "", "builtin:mnist, :digits or :emoji, images or latents in files, or hub:OWNER/NAME"
    )
    resolution: int | str = _option(256, "N or HxW, in pixels")
    channels: int = _option(4, "C: 1 or 3 for pixels, the VAE's for latents", least=1, most=1024)
    downsample: int = _option(8, "f: 1 for pixels, the VAE's for latents", least=1, most=256)
    vae: str | None = _option(
        None, "hub name or folder of the VAE that made the latents; null for pixels"
    )
    vae_sha256: str = _option(
        "", "hash of the VAE's weights, found in the latents and recorded with the run"
    )
    normalize: Literal["vae", "measured"] = _option(
        "vae",
        "scale of latents: the VAE's, or the mean and deviation of each channel in the encoded set",
    )
    latents_mean: tuple[float, ...] = _option(
        (), "measured means by channel, found in the latents and recorded with the run"
    )
    latents_std: tuple[float, ...] = _option(
        (), "measured deviations by channel, as latents_mean", least=1e-6
    )
    flip: bool = _option(False, "random horizontal flips")
    skip_unreadable: bool = _option(
        False, "leave out images that cannot be read at the start of a run"
    )
    held_out: float | str = _option(
        "",
        "held-out images: a fraction of data.path, or a folder; empty: the built-in set's own",
        least=0,
        below=1,
    )
    class_names: tuple[str, ...] = _option(
        (), "class names, found in the data and recorded with the run"
    )
    columns: tuple[str, ...] = _option(
        (),
        "columns of parquet shards, or arrays of .npz files, such as image=photo,label=breed; "
        "those not given are found by name",
    )
    text: str | None = _option(
        None, "text encoder: wordllama, a folder or a hub name; null: captions are not used"
    )
    text_sha256: str = _option(
        "", "hash of the text encoder's weights, found and recorded with the run"
    )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.resolution, int):
            return self.resolution, self.resolution
        height, width = self.resolution.split("x")
        return int(height), int(width)

    @property
    def is_grey(self) -> bool:
        """Whether the images have one channel."""
        return self.vae is None and self.channels == 1

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the model's input."""
        height, width = self.size
        return height // self.downsample, width // self.downsample


@dataclass(frozen=True)
class DiffusionConfig:
    """What the model predicts, and how images are noised: by ADM's linear variances, or by a flow's
    straight lines.
    """

    objective: Literal["noise", "velocity", "flow"] = _option(
        "noise", "what the model predicts; flow: also its path"
    )
    predicts: Literal["velocity", "image", "mean_velocity"] = _option(
        "velocity",
        "what the model of a flow predicts; mean_velocity: of the whole path, learned from "
        "train.init, so that one step draws",
    )
    teacher_guidance: float = _option(
        1.0,
        "mean_velocity: guidance of train.init that the weights learn",
        least=0,
        most=1000,
    )
    timesteps: int = _option(
        1000, "T, number of timesteps; of a flow, the scale of its times", least=2, most=10_000
    )
    beta_start: float = _option(1e-4, "first variance; not used by flow", above=0, most=0.999)
    beta_end: float = _option(0.02, "last variance; not used by flow", above=0, most=0.999)
    zero_terminal_snr: bool = _option(
        False, "rescale the variances so that x_T is pure noise; for velocity"
    )
    timesteps_drawn: Literal["uniform", "logit_normal", "shifted"] = _option(
        "uniform", "timesteps in training"
    )
    logit_mean: float = _option(
        0.0, "logit_normal: mean of log(t / (1 - t)), t in (0, 1)", least=-100, most=100
    )
    logit_std: float = _option(1.0, "logit_normal: its standard deviation", above=0, most=100)
    shift: float = _option(
        3.0, "shifted: alpha in alpha t / (1 + (alpha - 1) t), t uniform", above=0, most=1000
    )

    @property
    def in_one_step(self) -> bool:
        """Whether the model learns the mean velocity of a teacher's paths, so that it draws in one
        step.
        """
        return self.predicts == "mean_velocity"


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe. Defaults are the paper's."""

    steps: int = _option(400_000, "number of optimiser steps", least=1, most=MANY)
    batch_size: int = _option(
        256, "images per optimiser step, over all accumulated parts", least=1, most=MAX_BATCH
    )
    accumulate: int = _option(
        1, "number of parts that the batch is computed in", least=1, most=MAX_BATCH
    )
    init: str = _option(
        "",
        "begin with the weights of another model, as far as they fit: a run, a model of the "
        "package, OWNER/NAME on the hub, a published DiT's or SiT's .pt file; empty: random "
        "weights",
    )
    lr: float = _option(1e-4, "learning rate", above=0, most=10)
    optimizer: Literal["adamw", "muon"] = _option(
        "adamw", "muon: for the matrices of the blocks, adamw for all others"
    )
    adamw_lr: float = _option(
        0.0, "muon: learning rate of what it leaves to adamw; 0: train.lr", least=0, most=10
    )
    ssm_lr: float = _option(
        1e-3, "cap on the learning rate of the SSM's parameters", above=0, most=10
    )
    warmup_steps: int = _option(0, "steps of linear warm-up", least=0, most=MANY)
    lr_decay: Literal["constant", "linear", "cosine"] = _option(
        "constant", "learning rate schedule after warm-up"
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay, on matrices only", least=0, most=100)
    beta2: float = _option(0.999, "AdamW's decay of the second moment", above=0, below=1)
    grad_clip: float = _option(0.0, "maximum gradient norm; 0: no clipping", least=0, most=1e6)
    ema: tuple[float, ...] = _option(
        (0.9999,),
        "decays of the averaged weights; previews, best/ and sampling use the first",
        least=0,
        below=1,
    )
    snapshot_every: int = _option(
        0,
        "steps between snapshots of two more averages, from which sample --ema-width makes one of "
        "any width; 0: none",
        least=0,
        most=MANY,
    )
    mse_weight_cap: float = _option(
        1.0,
        "cap on the weight 1 + 1/SNR(t) of the noise MSE; 1: the paper's loss",
        least=1,
        most=1e6,
    )
    loss_weight: Literal["none", "min_snr"] = _option(
        "none", "min_snr: weight the MSE of x_0 by min(SNR(t), gamma)"
    )
    min_snr_gamma: float = _option(5.0, "gamma of min_snr", above=0, most=1e6)
    label_dropout: float = _option(
        0.1, "share of labels replaced by the null class, and of captions by none", least=0, most=1
    )
    seed: int = _option(0, "seed of all random numbers", least=0, most=MAX_SEED)
    precision: Literal["auto", "fp32", "bf16"] = _option(
        "auto", "auto: bf16 where the hardware supports it"
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, mps")
    compile: bool = _option(False, "torch.compile the model")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass")
    checkpoint_every: int = _option(5000, "steps between checkpoints", least=1, most=MANY)
    keep_checkpoints: int = _option(2, "number of newest checkpoints to keep", least=1, most=MANY)
    keep_every: int = _option(
        0, "steps between checkpoints that are never deleted; 0: none", least=0, most=MANY
    )
    async_checkpoint: bool = _option(
        True, "write checkpoints in the background, from a copy in memory"
    )
    max_bad_steps: int = _option(
        10, "non-finite steps in a row after which training ends", least=1, most=MANY
    )
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp", "several processes; ddp: replicate the model, fsdp: shard it"
    )
    sample_every: int = _option(5000, "steps between preview grids; 0: none", least=0, most=MANY)
    sample_images: int = _option(40, "number of images in a preview grid", least=1, most=10_000)
    sample_steps: int = _option(
        25, "steps of all previews but the last (DDIM; Euler for velocities)", least=1, most=10_000
    )
    log_every: int = _option(100, "steps between log records", least=1, most=MANY)
    logger: Literal["tensorboard", "wandb", "trackio"] = _option(
        "tensorboard",
        "wandb, trackio: send the log there too; TensorBoard's files are always written",
    )

    @property
    def averages(self) -> int:
        """How many averages of the weights are in memory."""
        return len(self.ema) + (len(WIDTHS) if self.snapshot_every else 0)


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn: defaults for `diffussm sample` and for the last grid of a training
    run.
    """

    sampler: SamplerName = _option(  # noqa: RUF009 (a field)
        "ddpm", "sampling method, one that fits diffusion.objective"
    )
    steps: int = _option(
        250, "denoising steps; a step of heun computes the model twice", least=1, most=10_000
    )
    guidance: float = _option(1.0, "classifier-free guidance scale; 1: none", least=0, most=1000)
    guidance_channels: Literal["all", "3"] = _option(
        "all", "guide all channels, or the first three as in DiT"
    )
    guidance_interval: tuple[int, ...] = _option((), "LO,HI: guide only at timesteps LO <= t <= HI")
    guide: str = _option(
        "", "a weaker model that guidance leads away from, in place of the null class; not in a run"
    )
    clip: bool = _option(False, "clamp the predicted image to [-1, 1]; for pixels")
    prompts: tuple[str, ...] = _option(
        (),
        "prompts of the grids of a run with text, such as [red heart, sun]; "
        "empty: captions of its data",
        commas=False,
    )


@dataclass(frozen=True)
class EvalConfig:
    """How a run is measured, by `diffussm eval RUN` and during training."""

    every: int = _option(
        0, "training steps between evaluations of the averaged weights; 0: none", least=0, most=MANY
    )
    held_out_every: int = _option(
        0,
        "training steps between held-out losses, also without drawn images; 0: only with "
        "eval.every",
        least=0,
        most=MANY,
    )
    held_out_images: int = _option(
        2000, "maximum held-out images for the held-out loss", least=1, most=10**6
    )
    images: int = _option(
        5000,
        "images drawn for each evaluation, at least 16; 0: only the held-out loss",
        least=0,
        most=10**6,
    )
    steps: int = _option(
        50, "maximum denoising steps for these, with the run's sampler", least=1, most=10_000
    )
    reference: str = _option("", "an .npz or images; empty: the run's own built-in data set")
    extractor: Literal["auto", "inception", "digits", "efficientnet", "dinov2"] = _option(
        "auto", "features that scores compare; auto: digits for grey 28x28, else inception"
    )


@dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    preset: str = ""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def reference(self) -> str | None:
        """What samples are compared with by default: `eval.reference`, or the built-in data set
        that is trained on.
        """
        return self.eval.reference or (
            self.data.path if self.data.path.startswith(BUILTIN) else None
        )


SECTIONS: dict[str, Any] = {
    f.name: f.type for f in dataclasses.fields(Config) if f.name != "preset"
}


def field_names() -> list[str]:
    """Every field that `--set` takes, as section.field."""
    return [f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]
