"""Which fields fit together. Whether one value is valid is checked when it is read."""

import math
import re

from diffussm_cli.config.fields import (
    BUILTIN,
    SAMPLERS,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
)
from diffussm_cli.config.mixers import MIXER_FACTS, mixers_with
from diffussm_cli.config.values import named_columns
from diffussm_cli.errors import ConfigError

MAX_SIDE = 2**14  # pixels
MAX_PARAMETERS = 10**11
MAX_VALUES = 2**31  # in one tensor of one image
MIN_SIGNAL = -87.0  # log of the signal left at the last timestep; a weaker signal is 0 in float32


def check(config: Config) -> None:
    """Raises ConfigError for fields that do not fit together; single fields were checked when they
    were read.
    """
    # images and the network
    _check_resolution(config.data)
    _check_tokens(config.model, config.data)
    _check_mixers(config.model)
    _check_size(config)

    # data and training
    _check_training(config.train)
    _check_data(config.data)
    _check_text(config)
    if 0 < config.eval.images < 16:
        raise ConfigError(f"eval.images: {config.eval.images} must be 0 or at least 16")

    # noise and sampling
    _check_schedule(config.diffusion)
    _check_objective(config)
    check_sampling(config.sample, config)


def _check_resolution(d: DataConfig) -> None:
    """Raises ConfigError for a size of images that is none, or does not fit the VAE."""
    if not isinstance(d.resolution, int) and not re.fullmatch(
        r"[1-9]\d{0,4}x[1-9]\d{0,4}", d.resolution
    ):
        raise ConfigError(
            f"data.resolution: {d.resolution!r} must be a number of pixels or HxW, "
            "like 256 or 256x384"
        )
    if not 1 <= min(d.size) <= max(d.size) <= MAX_SIDE:
        raise ConfigError(f"data.resolution: {d.resolution} must be from 1 to {MAX_SIDE}")
    if any(side % d.downsample for side in d.size):
        raise ConfigError(
            f"data.resolution: {d.resolution} must be a multiple of data.downsample {d.downsample}"
        )
    if d.vae is None and d.downsample != 1:
        raise ConfigError(
            f"data.downsample: {d.downsample} needs data.vae; pixels have downsample 1"
        )


def _check_tokens(m: ModelConfig, d: DataConfig) -> None:
    """Raises ConfigError for patches, positions or channels that do not come out even."""
    H, W = d.grid
    if H % m.patch_size or W % m.patch_size:
        raise ConfigError(
            f"model.patch_size: {m.patch_size} must divide the {H}x{W} grid of data.resolution"
        )
    if (W // m.patch_size) % m.compression:
        raise ConfigError(
            f"model.compression: {m.compression} must divide "
            f"the {W // m.patch_size} tokens of a row"
        )

    # Channels.
    if m.hidden_size % 4:
        raise ConfigError(f"model.hidden_size: {m.hidden_size} must be a multiple of 4")
    wide = m.hidden_size if m.backbone == "dit" else 2 * m.hidden_size
    if wide % m.compression:
        raise ConfigError(
            f"model.compression: {m.compression} must divide the {wide} channels that the "
            "hourglass contracts"
        )


def _check_mixers(m: ModelConfig) -> None:
    """Raises ConfigError for an unknown mixer, and for sizes that the mixers cannot divide."""
    wrong = [name for name in m.mixers if name not in MIXER_FACTS]
    if wrong:
        valid = ", ".join(MIXER_FACTS)
        raise ConfigError(f"model.mixer: {wrong[0]!r} is not a choice; valid: {valid}")

    def is_made_from(field: str) -> bool:
        return m.backbone == "dit" or bool(set(mixers_with(field)) & set(m.mixers))

    # Heads, and what only attention has.
    if is_made_from("heads") and m.hidden_size % m.heads:
        raise ConfigError(f"model.heads: {m.heads} must divide model.hidden_size {m.hidden_size}")
    for option in ("qk_norm", "rope"):
        if getattr(m, option) and not is_made_from(option):
            mixers = " or ".join(f"model.mixer={name}" for name in mixers_with(option))
            raise ConfigError(
                f"model.{option}: true needs softmax attention: model.backbone=dit or "
                f"{mixers}, and model.mixer is {m.mixer}"
            )
    if m.rope and m.hidden_size // m.heads < 4:
        raise ConfigError(
            f"model.rope: true needs heads of at least 4 channels; model.hidden_size "
            f"{m.hidden_size} with model.heads {m.heads} has {m.hidden_size // m.heads}"
        )

    if m.d_state % 2:
        raise ConfigError(f"model.d_state: {m.d_state} must be even")


def _check_training(t: TrainConfig) -> None:
    """Raises ConfigError for a recipe that contradicts itself."""
    if t.optimizer == "muon" and t.parallel == "fsdp":
        raise ConfigError(
            "train.optimizer: muon needs whole matrices, which train.parallel=fsdp splits; take ddp"
        )
    if t.batch_size % t.accumulate:
        raise ConfigError(
            f"train.accumulate: {t.accumulate} must divide train.batch_size {t.batch_size}"
        )
    if not t.ema or len(set(t.ema)) < len(t.ema):
        raise ConfigError(
            f"train.ema: {','.join(map(str, t.ema))!r} must be one or more different numbers"
        )


def _check_data(d: DataConfig) -> None:
    """Raises ConfigError for held-out images or columns that the data cannot have."""
    if (
        isinstance(d.held_out, str)
        and d.held_out
        and (d.held_out == d.path or d.held_out.startswith(BUILTIN))
    ):
        raise ConfigError(
            f"data.held_out: {d.held_out!r} must be a share or a folder of other images than "
            "data.path"
        )
    if named_columns(d.columns, "data.columns") and (
        d.vae is not None or d.path.startswith(BUILTIN)
    ):
        raise ConfigError(
            f"data.columns: {d.columns[0]!r} given, but {d.path} is no folder of parquet shards"
        )
    if d.path.startswith(BUILTIN) and d.vae is not None:
        raise ConfigError(f"data.vae: {d.vae!r} given, but {d.path} holds pixels; leave it out")
    _check_statistics(d)


def _check_statistics(d: DataConfig) -> None:
    """Raises ConfigError for statistics of latents without a use, or of another number of
    channels.
    """
    if d.normalize == "measured" and d.vae is None:
        raise ConfigError("data.normalize: measured needs latents (data.vae); these are pixels")

    for name in ("latents_mean", "latents_std"):
        n = len(getattr(d, name))
        if n and d.normalize != "measured":
            raise ConfigError(f"data.{name}: needs data.normalize=measured")
        if n not in (0, d.channels) or n != len(d.latents_mean):
            raise ConfigError(
                f"data.{name}: {n} numbers given; data.latents_mean and data.latents_std need one "
                f"for each of the {d.channels} channels, or none"
            )


def _check_size(config: Config) -> None:
    """Raises ConfigError, before anything is built, for sizes that are valid one by one but absurd
    together.
    """
    m, d = config.model, config.data
    D = m.hidden_size
    taps = max(d.channels, m.stem) * m.patch_size**2
    tokens = math.prod(d.grid) // m.patch_size**2
    block = (16 + m.compression) * D**2 + 8 * D * m.d_state
    parameters = (
        m.depth * block
        + m.depth // 2 * m.skips * D**2
        + m.num_classes * D
        + 3 * m.compression * taps * D
    )  # to a few percent

    if parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"model.hidden_size: {D} with model.depth {m.depth} makes about {parameters:.1e} "
            f"parameters; at most {MAX_PARAMETERS:.0e} are allowed"
        )
    if tokens * max(D, taps) > MAX_VALUES:
        raise ConfigError(
            f"data.resolution: {d.resolution} makes {tokens:,} tokens of {max(D, taps):,} values; "
            "take a larger model.patch_size or data.downsample"
        )


def _check_text(config: Config) -> None:
    """Raises ConfigError for a text encoder without a width, a width without an encoder, or layers
    without text.
    """
    m, d = config.model, config.data
    if d.text is None and m.text_width:
        raise ConfigError(
            f"model.text_width: {m.text_width} needs a text encoder, such as data.text=wordllama"
        )
    if d.text is not None and not m.text_width:
        raise ConfigError(
            f"data.text: {d.text!r} needs model.text_width, the width of its vectors "
            "(wordllama: 256)"
        )

    if m.text_tokens and not m.text_width:
        raise ConfigError(
            f"model.text_tokens: {m.text_tokens} needs model.text_width and data.text"
        )
    mixers = [] if m.backbone == "dit" else m.mixers
    reads_image = bool(m.local) or any(MIXER_FACTS[name].needs_image for name in mixers)
    if m.text_tokens and reads_image:
        field = f"model.local={m.local}" if m.local else f"model.mixer={m.mixer}"
        raise ConfigError(
            f"model.text_tokens: {m.text_tokens} given, but {field} reads an image, "
            "and text tokens have no place in one; set text_tokens to 0"
        )


def _check_schedule(d: DiffusionConfig) -> None:
    """Raises ConfigError for a process whose last signal level underflows in float32."""
    names = "diffusion.timesteps", "diffusion.beta_start", "diffusion.beta_end"
    wrong = wrong_variances(d.timesteps, d.beta_start, d.beta_end, names)
    if wrong:
        raise ConfigError(wrong)


def wrong_variances(
    T: int,
    beta_start: float,
    beta_end: float,
    names: tuple[str, str, str] = ("T", "beta_start", "beta_end"),
) -> str:
    """Why T variances between these make no process, in one line; empty if they make one.

    Args:
        names: what the line calls the three.
    """
    if beta_end < beta_start:
        return f"{names[2]}: {beta_end} must be at least {names[1]} {beta_start}"

    # The logarithm of the signal that they leave of an image.
    step = (beta_end - beta_start) / max(T - 1, 1)
    log_signal = sum(math.log1p(-(beta_start + i * step)) for i in range(T))
    if log_signal < MIN_SIGNAL:
        return (
            f"{names[0]}: {T} with variances up to {beta_end} leave nothing of the image; "
            f"lower {names[2]}"
        )
    return ""


def _check_objective(config: Config) -> None:
    """Raises ConfigError for options that make no sense with the objective, or with each other."""
    d, t = config.diffusion, config.train
    flow = d.objective == "flow"
    min_snr = t.loss_weight == "min_snr"

    if d.predicts != "velocity" and not flow:
        raise ConfigError(
            f"diffusion.predicts: {d.predicts} needs diffusion.objective=flow; "
            f"{d.objective} says what the model predicts"
        )
    if d.in_one_step and not t.init:
        raise ConfigError(
            "diffusion.predicts: mean_velocity is learned from a trained flow; name it by --init"
        )
    if flow and config.model.learn_sigma:
        raise ConfigError(
            "model.learn_sigma: true given, but a flow has no covariance to learn; set it to false"
        )

    if d.zero_terminal_snr and d.objective != "velocity":
        why = (
            "a flow ends in pure noise anyway"
            if flow
            else "a model that predicts pure noise learns no image from it"
        )
        raise ConfigError(
            f"diffusion.zero_terminal_snr: true needs diffusion.objective=velocity; {why}"
        )

    if t.mse_weight_cap > 1 and (min_snr or d.objective != "noise"):
        other = "train.loss_weight=min_snr" if min_snr else f"diffusion.objective={d.objective}"
        cap = f"train.mse_weight_cap: {t.mse_weight_cap:g}"
        raise ConfigError(
            f"{cap} turns the MSE of the noise into that of the velocity; "
            f"leave it at 1 with {other}"
        )

    if min_snr and (flow or d.zero_terminal_snr):
        why = "is for discrete timesteps; weight a flow by diffusion.timesteps_drawn"
        if not flow:
            why = (
                "gives the first step of sampling the weight 0; "
                "leave it out with diffusion.zero_terminal_snr"
            )
        raise ConfigError(f"train.loss_weight: min_snr {why}")


def check_sampling(s: SampleConfig, config: Config) -> None:
    """Raises ConfigError for a sampling request that the model does not support."""
    objective = config.diffusion.objective
    if s.sampler not in SAMPLERS[objective]:
        of = "flow" if s.sampler in SAMPLERS["flow"] else "discrete process"
        fitting = ", ".join(SAMPLERS[objective])
        raise ConfigError(
            f"sample.sampler: {s.sampler} is for a {of}; with objective {objective}, "
            f"choose {fitting}"
        )
    if s.sampler == "ddim" and config.diffusion.zero_terminal_snr:
        raise ConfigError(
            "sample.sampler: ddim does not begin at pure noise, as zero_terminal_snr needs; "
            "choose euler"
        )

    if config.diffusion.in_one_step:
        wanted = {"sampler": "euler", "steps": 1, "guidance": 1.0}
        for name, value in wanted.items():
            if getattr(s, name) != value:
                raise ConfigError(
                    f"sample.{name}: {getattr(s, name)} does not fit a model of the mean velocity: "
                    "it draws in one step, and its guidance is in the weights; choose "
                    "sample.sampler=euler, sample.steps=1 and sample.guidance=1"
                )

    if s.clip and config.data.vae is not None:
        latents = f"the latents of {config.data.vae!r} go beyond that"
        raise ConfigError(
            f"sample.clip: true clamps pixels to [-1, 1], and {latents}; leave it at false"
        )

    if s.steps > config.diffusion.timesteps:
        raise ConfigError(
            f"sample.steps: {s.steps} must be at most diffusion.timesteps "
            f"{config.diffusion.timesteps}"
        )
    if s.guidance != 1 and not (config.model.is_conditional or s.guide):
        raise ConfigError(
            f"sample.guidance: {s.guidance:g} needs a model of classes or text, or sample.guide; "
            "leave it at 1"
        )
    if s.prompts and not config.model.text_width:
        raise ConfigError(
            f"sample.prompts: {s.prompts[0]!r:.60} given, but the model takes no text; "
            "see data.text"
        )

    interval = s.guidance_interval
    if interval and (len(interval) != 2 or not 0 <= interval[0] <= interval[1]):
        text = ",".join(map(str, interval))
        raise ConfigError(f"sample.guidance_interval: {text!r} must be LO,HI with 0 <= LO <= HI")
