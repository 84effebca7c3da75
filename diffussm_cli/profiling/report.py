"""The cost of models in one report: by formula, by a trace, as measured, and of a training run."""

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from diffussm_cli.config import (
    Config,
    config_from_dict,
    load_config,
    preset_names,
    preset_title,
    to_dict,
    unused_fields,
)
from diffussm_cli.errors import ConfigError
from diffussm_cli.events import Event, Message, Stage, Warned
from diffussm_cli.machine.device import (
    facts_of_machine,
    has_bf16,
    keep_freed_memory,
    pick_device,
    pick_dtype,
)
from diffussm_cli.machine.processes import read_world
from diffussm_cli.profiling import timing
from diffussm_cli.profiling.count import count
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.paper import display_name, named_model
from diffussm_cli.profiling.roofline import predict

CONVENTION = "Gflops are 1e9 multiply-adds of one forward pass for one image"
LETTERS = {
    "M": "compression",
    "P": "patch_size",
    "D": "hidden_size",
    "N": "d_state",
    "depth": "depth",
}


def profile(
    models: Sequence[tuple[str, Config]],
    *,
    counting: bool = True,
    work: Sequence[str] = (),
    setting: timing.Setting | None = None,
    estimate: bool = False,
    gpu: str | None = None,
) -> Generator[Event, None, dict[str, Any]]:
    """Report the cost of models as nested plain values.

    Args:
        models: names and configurations, as `choose_models` gives them.
        counting: also count the multiply-adds from a trace of each model.
        work: kinds of work, from `timing.KINDS`, whose time is measured on this machine.
        setting: how they are measured.
        estimate: also measure one optimiser step of each configuration, for its training time.
        gpu: with `estimate`, a name of `roofline.GPUS`: predict the step there, and measure
            nothing.

    Yields:
        events.

    Returns:
        The report.
    """
    result: dict[str, Any] = {"convention": CONVENTION, "models": []}
    for name, config in models:
        if line := unused_fields(config, read_world().size):
            yield Warned(f"{name}: {line}")
        entry = cost_entry(config, name, torch.bfloat16 if gpu else None)
        if counting:
            yield Stage(f"counting {name}")
            entry["counted"] = count(config)
        result["models"].append(entry)
    configs = [config for _, config in models]

    if work:
        assert setting is not None, "work is measured in a setting"
        yield from _measure(result["models"], configs, work, setting)
        result["setting"] = _plain(setting)
        result["exponents"] = _exponents(result["models"])

    if estimate and gpu:
        for entry, config in zip(result["models"], configs):
            yield Stage(f"predicting a step of {entry['name']}")
            entry["training"] = predict(config, gpu)
    elif estimate:
        from diffussm_cli.profiling.plan import plan  # it needs the trainer: seconds to import

        for entry, config in zip(result["models"], configs):
            yield Stage(f"measuring a step of {entry['name']}")
            free = timing.available_bytes(pick_device(config.train.device))
            entry["training"] = plan(config, free)._asdict()
    return result


def cost_entry(
    config: Config, name: str | None = None, auto: torch.dtype | None = None
) -> dict[str, Any]:
    """The cost of a configuration by formula, as plain values, from the arguments of `cost`."""
    c = cost(config, name, read_world().size, auto)
    return {
        **dataclasses.asdict(c),
        "gflops": c.gflops,
        "flops": 2e9 * c.gflops,
        "training_gflops": c.training_gflops,
    }


# --------------------------------------------------------------------------- which models, and how
def choose_models(
    models: str,
    resolutions: str,
    presets: Sequence[str],
    overrides: Sequence[str],
    sweep: Sequence[str],
) -> list[tuple[str, Config]]:
    """The requested names and configurations, resolution by resolution.

    Args:
        models: names for `named_model`, separated by commas; not used if there are presets.
        resolutions: their resolutions, separated by commas.
        presets: names of presets, or YAML files.
        overrides: `section.field=value`, for the presets.
        sweep: texts such as `M=1,2,4`; every combination is applied to every model.

    Raises:
        ConfigError: for a name or a value that the message names.
    """
    if overrides and not presets:
        raise ConfigError(f"--set: {overrides[0]!r} changes presets; name them with --preset")

    chosen = []
    for preset in presets:
        config = load_config(preset, overrides)
        chosen.append((config.preset, config))
    if not presets:
        for resolution, name in itertools.product(resolutions.split(","), models.split(",")):
            config = named_model(name.strip(), resolution.strip())
            chosen.append((display_name(config), config))
    return [pair for name, config in chosen for pair in swept(name, config, sweep).items()]


def swept(name: str, config: Config, sweep: Sequence[str]) -> dict[str, Config]:
    """A configuration with every combination of values in texts like `M=1,2,4`, by distinct names.

    Raises:
        ConfigError: for a wrong text or value, which the message names.
    """
    configs = {}
    for pairs in itertools.product(*map(_axis, sweep)):
        fields = {f"model.{LETTERS[letter]}": value for letter, value in pairs}
        words = [name, *(f"{letter}={value}" for letter, value in pairs)]
        configs[" ".join(words)] = config_from_dict(to_dict(config), config.preset, fields=fields)
    return configs


def _axis(text: str) -> list[tuple[str, str]]:
    """`M=1,2` as M with each of its values."""
    letter, _, values = text.partition("=")
    if letter not in LETTERS or not values:
        letters = ", ".join(LETTERS)
        raise ConfigError(
            f"--sweep: {text!r} must read LETTER=VALUES, such as M=1,2,4; letters: {letters}"
        )
    return [(letter, value) for value in values.split(",")]


def make_setting(
    precision: str,
    device: str,
    batch_size: int,
    repeats: int,
    compiled: bool = False,
) -> tuple[timing.Setting, list[str]]:
    """How time and memory are measured, and warnings for the user. Raises ConfigError."""
    keep_freed_memory()
    chosen = pick_device(device)
    if precision == "bf16" and not has_bf16(chosen):
        warnings = [
            "bf16 has no hardware support here; its times say nothing about a machine that has it"
        ]
        dtype = torch.bfloat16
    else:
        warnings = []
        dtype = pick_dtype(precision, chosen)
    return timing.Setting(chosen, dtype, batch_size, repeats, compiled), warnings


# ------------------------------------------------------------------------------- what was measured
def _measure(
    entries: Sequence[dict[str, Any]],
    configs: Sequence[Config],
    kinds: Sequence[str],
    setting: timing.Setting,
) -> Iterator[Event]:
    """Add time and memory to the entries: the models of one resolution take turns."""
    jobs = [(kind, config.data.size, i) for kind in kinds for i, config in enumerate(configs)]
    for (kind, (height, width)), group in itertools.groupby(jobs, key=lambda job: job[:2]):
        places = [i for _, _, i in group]
        yield Stage(f"measuring {kind} at {height}x{width}")
        results = timing.measure([configs[i] for i in places], kind, setting)

        for i, measured in zip(places, results):
            if measured is not None:
                entries[i].setdefault("measured", {})[kind] = measured
                continue
            model = f"{entries[i]['name']} at {height}x{width}"
            yield Message(f"{model}: {kind} does not fit into memory, skipped")


def _plain(setting: timing.Setting) -> dict[str, Any]:
    """A setting, and the machine, as plain values."""
    return {
        "device": str(setting.device),
        "precision": str(setting.dtype).removeprefix("torch."),
        "batch_size": setting.batch_size,
        "repeats": setting.repeats,
        "compiled": setting.compiled,
        **facts_of_machine(setting.device),
    }


def _exponents(entries: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The exponent of time against L by model and kind of work, where two lengths were measured."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    for entry in entries:
        for kind, measured in entry.get("measured", {}).items():
            by_length = times.setdefault((entry["name"], kind), {})
            by_length[entry["tokens"]] = measured["median_ms"]

    exponents: dict[str, dict[str, float]] = {}
    for (name, kind), by_length in times.items():
        if len(by_length) > 1:
            slope = timing.exponent(list(by_length), list(by_length.values()))
            exponents.setdefault(name, {})[kind] = slope
    return exponents


# ---------------------------------------------------------------------------------- list of presets
class PresetRow(NamedTuple):
    """One preset, and what its file says of it in its first line."""

    name: str
    parameters: int
    title: str


def preset_rows() -> list[PresetRow]:
    """Every preset, ordered by the cost of its training."""
    rows = []
    for name in preset_names():
        c = cost(load_config(name))
        rows.append((c.training_gflops, PresetRow(name, c.parameters, preset_title(name))))
    return [row for _, row in sorted(rows)]
