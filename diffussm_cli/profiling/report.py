"""The cost of models in one report: by formula, by a trace, measured here, and estimated for a training run."""

import dataclasses
import itertools
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from diffussm_cli.config import Config, load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.events import Event, Message, Stage
from diffussm_cli.machine.device import (
    check_compiler,
    facts_of_machine,
    has_bf16,
    keep_freed_memory,
    pick_device,
    pick_dtype,
)
from diffussm_cli.machine.processes import read_world
from diffussm_cli.profiling import timing
from diffussm_cli.profiling.count import count
from diffussm_cli.profiling.figures import figure_3
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.memory import available_bytes
from diffussm_cli.profiling.models import display_name, named_model, swept
from diffussm_cli.profiling.work import Setting

CONVENTION = "Gflops are 1e9 multiply-adds of one forward pass for one image"


def profile(
    models: Sequence[tuple[str, Config]],
    *,
    counting: bool = True,
    work: Sequence[str] = (),
    setting: Setting | None = None,
    estimate: bool = False,
) -> Generator[Event, None, dict[str, Any]]:
    """Report the cost of models as nested plain values.

    Args:
        models: names and configurations, as `choose_models` gives them.
        counting: also count the multiply-adds from a trace of each model.
        work: kinds of work, from `work.KINDS`, whose time and memory are measured on this machine.
        setting: how they are measured.
        estimate: also measure one optimiser step of each configuration and estimate its training time.

    Yields:
        events.

    Returns:
        The report.
    """
    result: dict[str, Any] = {"convention": CONVENTION, "models": []}
    for name, config in models:
        entry = cost_entry(config, name)
        if counting:
            yield Stage(f"counting {name}")
            entry["counted"] = count(config)
        result["models"].append(entry)
    configs = [config for _, config in models]
    if work:
        assert setting is not None, "work is measured in a setting"
        yield from _add_latency(result, configs, work, setting)
    if estimate:
        from diffussm_cli.profiling.plan import plan  # it needs the trainer, which takes seconds to import

        for entry, config in zip(result["models"], configs):
            yield Stage(f"measuring a step of {entry['name']}")
            entry["training"] = plan(config, available_bytes(pick_device(config.train.device)))._asdict()
    return result


def choose_models(
    models: str, resolutions: str, presets: Sequence[str], overrides: Sequence[str], sweep: Sequence[str]
) -> list[tuple[str, Config]]:
    """The requested names and configurations, resolution by resolution. Raises ConfigError."""
    if presets:
        bases = [(config.preset, config) for config in (load_config(name, overrides) for name in presets)]
    else:
        if overrides:
            raise ConfigError(f"--set: {overrides[0]!r} changes presets; name them with --preset")
        asked = itertools.product(resolutions.split(","), models.split(","))
        configs = [named_model(name.strip(), resolution.strip()) for resolution, name in asked]
        bases = [(display_name(config), config) for config in configs]
    return [named for name, base in bases for named in swept(name, base, sweep).items()]


def make_setting(
    precision: str, device: str, batch_size: int, repeats: int, depth: int | None, compiled: bool = False
) -> tuple[Setting, list[str]]:
    """How time and memory are measured, and what the user should know about it. Raises ConfigError."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler prints to stderr
    keep_freed_memory()
    where, warnings = pick_device(device), []
    if compiled:
        check_compiler(where)
    if precision == "bf16" and not has_bf16(where):
        warnings = ["bf16 has no hardware support here; its times say nothing about a machine that has it"]
        dtype = torch.bfloat16
    else:
        dtype = pick_dtype(precision, where)
    return Setting(where, dtype, batch_size, repeats, depth, compiled), warnings


def cost_entry(config: Config, name: str | None = None) -> dict[str, Any]:
    """The cost of a configuration by formula, as plain values."""
    c = cost(config, name, processes=read_world().size)
    return dataclasses.asdict(c) | {"gflops": c.gflops, "flops": 2e9 * c.gflops, "training_gflops": c.training_gflops}


def _add_latency(
    result: dict[str, Any], configs: Sequence[Config], kinds: Sequence[str], setting: Setting
) -> Iterator[Event]:
    """Add time and memory to the result, resolution by resolution, and the exponents of time against L."""
    asked = [((config.data.size, kind), i) for kind in kinds for i, config in enumerate(configs)]
    for (size, kind), group in itertools.groupby(asked, key=lambda item: item[0]):
        places = [i for _, i in group]
        yield Stage(f"measuring {kind} at {size[0]}x{size[1]}")
        found = timing.measure([configs[i] for i in places], kind, setting)
        for i, measured in zip(places, found):
            entry = result["models"][i]
            if measured is None:
                yield Message(f"{entry['name']} at {size[0]}x{size[1]}: {kind} does not fit into memory, skipped")
            else:
                entry.setdefault("measured", {})[kind] = measured
    result["setting"] = {
        "device": str(setting.device),
        "precision": str(setting.dtype).removeprefix("torch."),
        "batch_size": setting.batch_size,
        "repeats": setting.repeats,
        "compiled": setting.compiled,
        **facts_of_machine(setting.device),
    }
    result["exponents"] = _exponents(result["models"])


def _exponents(models: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The exponent of time against L by model and kind of work, if at least two lengths were measured."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    for m in models:
        for kind, found in m.get("measured", {}).items():
            points.setdefault((m["name"], kind), {})[m["tokens"]] = found["median_ms"]
    fitted: dict[str, dict[str, float]] = {}
    for (name, kind), times in points.items():
        if len(times) > 1:
            fitted.setdefault(name, {})[kind] = timing.exponent(list(times), list(times.values()))
    return fitted


def panels(result: dict, configs: Sequence[Config]) -> dict:
    """The panels that `--figure` draws: figure 3, and time and memory if several resolutions were measured."""
    found: dict[str, Any] = {"Gflops of a forward pass": figure_3()}
    for m, config in zip(result["models"], configs):
        side = (config.data.size[0] * config.data.size[1]) ** 0.5
        for kind, values in m.get("measured", {}).items():
            for title, value in (
                (f"{kind} (seconds)", values["median_ms"] / 1e3),
                (f"peak memory of {kind} (GiB)", (values["peak_bytes"] or 0) / 2**30),
            ):
                x, y = found.setdefault(title, {}).setdefault(m["name"], ([], []))
                x.append(round(side))
                y.append(value)
    return {
        title: curves for title, curves in found.items() if all(len(set(x)) > 1 and all(y) for x, y in curves.values())
    }
