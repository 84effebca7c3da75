"""What somebody has set although nothing uses it: fields of a configuration, and parts of a request
for images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diffussm_cli.config.fields import (
    BUILTIN,
    NOT_OF_DIT,
    PYTHON,
    Config,
    ModelConfig,
    SampleConfig,
)
from diffussm_cli.config.mixers import MIXER_FACTS, MIXER_FIELDS, mixers_with
from diffussm_cli.config.presets import load_config, preset_names
from diffussm_cli.config.values import named_columns

ORDERS = {"raster": 1, "alternate": 2, "four": 4}  # of which the blocks take one in turn
GUIDED = ("guidance_channels", "guidance_interval", "guide")


def unused_fields(config: Config, processes: int = 1) -> str:
    """One line about the fields that nothing uses, with the reasons; empty if there are none.

    A field counts if it asks for something, and has another value than by default and than in the
    preset of the package that the configuration is named after.
    """
    reasons = {
        **_of_model(config.model),
        **_of_data(config),
        **_of_training(config, processes),
        **_of_measuring(config),
        **_of_sampling(config),
    }
    usual = [Config()]
    if config.preset in preset_names():
        usual.append(load_config(config.preset))

    parts = []
    for name, why in reasons.items():
        value = _value(config, name)
        if value and value not in [_value(other, name) for other in usual]:
            parts.append((f"{name}={_text(value)}", why))
    return _line(parts + _mixers_beyond_depth(config) + _columns(config))


def unused_arguments(backbone: str, arguments: Mapping[str, Any]) -> str:
    """One line about the arguments of a network that it does not use, with the reasons; empty if
    there are none.

    As with fields, an argument counts if it asks for something, and has another value than by
    default.

    Args:
        backbone: as in ModelConfig.
        arguments: values by name; those that are no field of ModelConfig are not looked at.
    """
    usual = ModelConfig()
    values = {f.name: arguments[f.name] for f in dataclasses.fields(usual) if f.name in arguments}
    parts = []
    asked = dataclasses.replace(usual, **{**values, "backbone": backbone})
    for field, why in _of_model(asked).items():
        name = field.removeprefix("model.")
        if values.get(name) and values[name] != getattr(usual, name):
            parts.append((f"{name}={values[name]!r}", why))
    return _line(parts)


def unused_of_request(
    config: Config,
    sampling: SampleConfig,
    num: int,
    classes: Sequence[int] = (),
    prompts: Sequence[str] = (),
) -> str:
    """One line about the parts of a request for `num` images that nothing uses; empty if there are
    none.

    Args:
        sampling: how they are drawn; `config` is that of the run.
        classes, prompts: used in turn, as they were asked for.
    """
    request = dataclasses.replace(config, sample=sampling)
    reasons = _of_sampling(request)
    if sampling.guidance == 1:
        reasons |= dict.fromkeys((f"sample.{name}" for name in GUIDED), "guidance is 1")

    parts = [
        (f"{name}={_text(_value(request, name))}", why)
        for name, why in reasons.items()
        if _value(request, name) != _value(Config(), name)
    ]
    for kind, values in {"classes": classes, "prompts": prompts}.items():
        if len(values) > num:
            parts.append((f"{len(values) - num:,} of {len(values):,} {kind}", f"num is {num:,}"))
    return _line(parts)


def _line(parts: Sequence[tuple[str, str]]) -> str:
    texts = ", ".join(f"{what} ({why})" for what, why in parts)
    return f"not used: {texts}" if texts else ""


def _value(config: Config, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _all_of(why: str, section: str, *fields: str) -> dict[str, str]:
    """The same reason for several fields."""
    return {f"{section}.{field}": why for field in fields}


# ------------------------------------------------------------------------------- fields, by section
def _of_model(m: ModelConfig) -> Mapping[str, str]:
    """Fields of `model` without a use, with the reasons."""
    reasons: dict[str, str] = {}
    in_turn = [m.mixers[i % len(m.mixers)] for i in range(m.depth)]

    # The mixers.
    if m.backbone == "dit":
        reasons |= _all_of("a DiT has no mixers", "model", *NOT_OF_DIT)
        reasons |= _all_of("a DiT has no states", "model", "d_state")
    else:
        for field in MIXER_FIELDS:
            mixers = mixers_with(field)
            if not set(mixers) & set(in_turn):
                reasons |= _all_of(f"no mixer is {' or '.join(mixers)}", "model", field)

        turned = [mixer for i, mixer in enumerate(in_turn) if i % ORDERS[m.scan]]
        if not any(MIXER_FACTS[mixer].reads_in_order for mixer in turned):
            why = "no block whose mixer reads a sequence has another order than raster"
            reasons |= _all_of(why, "model", "scan")

    # Skips and labels.
    if m.depth == 1:
        reasons |= _all_of("one block has no mirror image", "model", "skips")
    if not m.num_classes:
        reasons |= _all_of("there are no classes", "model", "label_std")
    return reasons


def _of_data(config: Config) -> Mapping[str, str]:
    """Fields of `data` without a use, with the reasons."""
    d = config.data
    reasons: dict[str, str] = {}
    if d.vae is not None:
        reasons |= _all_of("latents are not decoded", "data", "skip_unreadable")
    elif d.path.startswith(BUILTIN):
        reasons |= _all_of("built-in data can be read", "data", "skip_unreadable")
    elif d.path.startswith(PYTHON):
        reasons |= _all_of("the data are a Dataset", "data", "skip_unreadable", "columns")

    is_folder = isinstance(d.held_out, str) and bool(d.held_out)
    is_for_eval = config.model.text_width > 0 and d.vae is None  # of runs with text
    measures = config.eval.every or config.eval.held_out_every
    if is_folder and not measures and not is_for_eval:
        reasons |= _all_of("eval.every is 0", "data", "held_out")
    return reasons


def _of_training(config: Config, processes: int) -> Mapping[str, str]:
    """Fields of `diffusion` and `train` without a use, with the reasons."""
    m, f, t = config.model, config.diffusion, config.train
    reasons: dict[str, str] = {}

    # The process.
    if f.objective == "flow":
        reasons |= _all_of("a flow has no variances", "diffusion", "beta_start", "beta_end")
    if not f.in_one_step:
        predicts = f"diffusion.predicts is {f.predicts}"
        reasons |= _all_of(predicts, "diffusion", "teacher_guidance")
    elif not m.is_conditional:
        why = "the model has neither classes nor text"
        reasons |= _all_of(why, "diffusion", "teacher_guidance")
    drawn = f"diffusion.timesteps_drawn is {f.timesteps_drawn}"
    if f.timesteps_drawn != "logit_normal":
        reasons |= _all_of(drawn, "diffusion", "logit_mean", "logit_std")
    if f.timesteps_drawn != "shifted":
        reasons |= _all_of(drawn, "diffusion", "shift")

    # The recipe.
    state_spaces = [name for name, row in MIXER_FACTS.items() if row.is_state_space]
    if m.backbone == "dit" or not set(state_spaces) & set(m.mixers[: m.depth]):
        reasons |= _all_of(f"no mixer is {' or '.join(state_spaces)}", "train", "ssm_lr")
    if t.optimizer != "muon":
        reasons |= _all_of(f"train.optimizer is {t.optimizer}", "train", "adamw_lr")
    if t.loss_weight != "min_snr":
        reasons |= _all_of(f"train.loss_weight is {t.loss_weight}", "train", "min_snr_gamma")
    if not m.is_conditional:
        reasons |= _all_of("there are neither classes nor text", "train", "label_dropout")
    if processes == 1:
        reasons |= _all_of("there is one process", "train", "parallel")
    if not t.sample_every:
        reasons |= _all_of("train.sample_every is 0", "train", "sample_images", "sample_steps")
    if f.in_one_step:
        reasons |= _all_of("one step draws", "train", "sample_steps")
    return reasons


def _of_measuring(config: Config) -> Mapping[str, str]:
    """Fields of `eval` without a use, with the reasons."""
    e = config.eval
    reasons: dict[str, str] = {}

    # The loss on held-out images.
    held_out = config.data.held_out
    has_images = bool(held_out) or (held_out == "" and config.data.path.startswith(BUILTIN))
    if not has_images:
        reasons |= _all_of("there are no held-out images", "eval", "held_out_every")

    # The metrics of images that are drawn.
    if not e.every:
        reasons |= _all_of("eval.every is 0", "eval", "images", "steps")
        if not e.held_out_every:
            reasons |= _all_of("eval.every is 0", "eval", "held_out_images")
    elif not config.reference and e.images:
        reasons |= _all_of("there is no eval.reference", "eval", "images", "steps")
    elif not e.images:
        reasons |= _all_of("eval.images is 0", "eval", "steps")
    return reasons


def _of_sampling(config: Config) -> dict[str, str]:
    """Fields of `sample` without a use, with the reasons."""
    m, d, s = config.model, config.data, config.sample
    if not m.is_conditional and not s.guide:
        return _all_of("the model has neither classes nor text", "sample", *GUIDED)

    reasons: dict[str, str] = {}
    if d.channels <= 3:
        all_of_them = f"{d.channels} channel{'s' if d.channels > 1 else ''}"
        reasons |= _all_of(f"images have {all_of_them}", "sample", "guidance_channels")
    if s.guidance_interval and s.guidance_interval[0] > config.diffusion.timesteps:
        last = f"the last timestep is {config.diffusion.timesteps}"
        reasons |= _all_of(last, "sample", "guidance_interval")
    return reasons


# ---------------------------------------------------------------------------------- parts of fields
def _mixers_beyond_depth(config: Config) -> list[tuple[str, str]]:
    """Mixers of a list for which there is no block."""
    m = config.model
    beyond = m.mixers[m.depth :]
    if m.backbone == "dit" or not beyond:
        return []
    return [(f"{','.join(beyond)} of model.mixer={m.mixer}", f"model.depth is {m.depth}")]


def _columns(config: Config) -> list[tuple[str, str]]:
    """Columns of parquet shards that are named and not read."""
    columns = named_columns(config.data.columns, "data.columns")
    reasons = {
        "text": "data.text is null" if config.data.text is None else "",
        "label": "" if config.model.num_classes else "there are no classes",
    }
    return [
        (f"data.columns {kind}={columns[kind]}", why)
        for kind, why in reasons.items()
        if kind in columns and why
    ]
