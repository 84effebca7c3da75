"""`diffussm profile`."""

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffussm_cli.config import Config, load_config
from diffussm_cli.errors import ConfigError

DEFAULT_MODELS = "xl,dit-xl/2,dit-xl/1"
WORK = "forward,forward+backward,guided step"
NAMES_WIDTH, MODEL_WIDTH = 32, 16  # of a table's columns, in characters


def profile(
    grid: Annotated[list[str] | None, typer.Argument(metavar="[LETTER=VALUES]...", help="More of --sweep.")] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"As {DEFAULT_MODELS} (the default), s/2, xl/1-m1, dit-xl/1-m2."),
    ] = None,
    resolution: Annotated[str, typer.Option(metavar="LIST", help="Of --models: 256,512 or HxW, in pixels.")] = "256",
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="LETTER=VALUES", help="Every combination, as --sweep M=1,2,4 P=1,2.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="A preset or YAML file in place of --models. Repeatable.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the presets.")
    ] = None,
    count: Annotated[bool, typer.Option("--count/--no-count", help="Count by a trace of each model too.")] = True,
    latency: Annotated[bool, typer.Option("--latency", help="Measure time and memory here.")] = False,
    work: Annotated[str, typer.Option(metavar="LIST", help="What --latency measures.")] = WORK,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time in --latency.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each model has its turn.")] = 5,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Measure that many blocks and scale to all; the result says so.")
    ] = None,
    precision: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of --latency.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure an optimiser step of each preset; reckon memory and days.")
    ] = False,
    paper: Annotated[bool, typer.Option("--paper", help="Published figures beside ours, and stop.")] = False,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the paper's figure 3, and --latency, as png, svg or pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What models cost: parameters, Gflops by part, training compute, time and memory, DiffuSSM beside DiT."""
    if estimate and not preset:
        raise ConfigError("--estimate: name what is to be trained by --preset")
    if models and preset:
        raise ConfigError("--models: not together with --preset")
    everything = [*(sweep or []), *(grid or [])]
    chosen = choose(models or DEFAULT_MODELS, resolution, preset or [], overrides or [], everything)
    configs, kinds = [config for _, config in chosen], parse_work(work)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks on stderr

    from rich.console import Console

    console = Console(stderr=True)
    if figure:
        from diffussm_cli.profiling import figures

        figures.check_path(figure)
    if paper:
        show_paper(as_json)
        return
    result = costs(console, chosen, count)
    if latency:
        setting = make_setting(console, precision, device, batch_size, repeats, depth)
        add_latency(console, result, configs, kinds, setting)
    if estimate:
        add_estimates(console, result, configs)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        show(result)
    if figure:
        figures.draw(panels(result, configs), figure)
        console.print(f"figure in {figure}", soft_wrap=True, markup=False)


def choose(
    models: str, resolutions: str, presets: Sequence[str], overrides: Sequence[str], sweep: Sequence[str]
) -> list[tuple[str, Config]]:
    """Names and configurations asked for, resolution by resolution. Raises ConfigError."""
    from diffussm_cli.profiling.models import display_name, named_model, swept

    if presets:
        bases = [(config.preset, config) for config in (load_config(name, overrides) for name in presets)]
    else:
        if overrides:
            raise ConfigError(f"--set: {overrides[0]!r} changes presets; name them by --preset")
        asked = itertools.product(resolutions.split(","), models.split(","))
        configs = [named_model(name.strip(), resolution.strip()) for resolution, name in asked]
        bases = [(display_name(config), config) for config in configs]
    return [named for name, base in bases for named in swept(name, base, sweep).items()]


def parse_work(text: str) -> list[str]:
    """Kinds of work between commas. Raises ConfigError."""
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in WORK.split(","):
            raise ConfigError(f"--work: {kind!r} must be one of {WORK.replace(',', ', ')}")
    return kinds


# ------------------------------------------------------------------------------------------------- what is known
def costs(console, chosen: Sequence[tuple[str, Config]], counting: bool) -> dict[str, Any]:
    """The result so far, as plain values: a list `models`, in the order of `chosen`."""
    from diffussm_cli.profiling.flops import cost

    models = []
    for name, config in chosen:
        entry = to_dict(cost(config, name))
        if counting:
            from diffussm_cli.profiling.count import count

            with console.status(f"counting {entry['name']}"):
                entry["counted"] = count(config)
        models.append(entry)
    return {"convention": "Gflops are 1e9 multiply-adds of one forward pass of one image", "models": models}


def to_dict(c) -> dict[str, Any]:
    """A cost as plain values."""
    return dataclasses.asdict(c) | {"gflops": c.gflops, "flops": 2e9 * c.gflops, "training_gflops": c.training_gflops}


# ---------------------------------------------------------------------------------------------- what is measured
def make_setting(console, precision: str, device: str, batch_size: int, repeats: int, depth: int | None):
    """How `--latency` measures. Raises ConfigError."""
    import torch

    from diffussm_cli.device import has_bf16, keep_freed_memory, pick_device, pick_dtype
    from diffussm_cli.profiling.work import Setting

    keep_freed_memory()
    where = pick_device(device)
    if precision == "bf16" and not has_bf16(where):
        console.print("warning: bf16 has no hardware support here; its times say nothing of a machine that has it")
        dtype = torch.bfloat16
    else:
        dtype = pick_dtype(precision, where)
    return Setting(where, dtype, batch_size, repeats, depth)


def add_latency(console, result: dict, configs: Sequence[Config], kinds: Sequence[str], setting) -> None:
    """Put time and memory into the result, resolution by resolution, and the exponents of time against L."""
    from diffussm_cli.profiling import timing

    for (size, kind), group in itertools.groupby(
        [((c.data.size, k), i) for k in kinds for i, c in enumerate(configs)], key=lambda item: item[0]
    ):
        places = [i for _, i in group]
        with console.status(f"measuring {kind} at {size[0]}x{size[1]}"):
            found = timing.measure([configs[i] for i in places], kind, setting)
        for i, measured in zip(places, found):
            entry = result["models"][i]
            if measured is None:
                console.print(f"{entry['name']} at {size[0]}x{size[1]}: {kind} does not fit into memory, skipped")
            else:
                entry.setdefault("measured", {})[kind] = describe(measured, configs[i])
    result["setting"] = {
        "device": str(setting.device),
        "precision": str(setting.dtype).removeprefix("torch."),
        "batch_size": setting.batch_size,
        "repeats": setting.repeats,
    }
    result["exponents"] = exponents(result["models"])


def describe(measured, config: Config) -> dict[str, Any]:
    """A measurement as plain values; times in milliseconds of a batch."""
    return {
        "median_ms": measured.time.median,
        "low_ms": measured.time.low,
        "high_ms": measured.time.high,
        "images_per_second": measured.images_per_second,
        "of_product_rate": measured.rate,
        "peak_bytes": measured.peak_bytes,
        "shares": measured.shares,
        "blocks_measured": measured.blocks,
        "scaled": measured.blocks < config.model.depth,
    }


def exponents(models: Sequence[dict]) -> dict[str, dict[str, float]]:
    """The exponent of forward time against L by model, where two lengths or more were measured."""
    from diffussm_cli.profiling.timing import exponent

    points: dict[tuple[str, str], dict[int, float]] = {}
    for m in models:
        for kind, found in m.get("measured", {}).items():
            points.setdefault((m["name"], kind), {})[m["tokens"]] = found["median_ms"]
    fitted: dict[str, dict[str, float]] = {}
    for (name, kind), times in points.items():
        if len(times) > 1:
            fitted.setdefault(name, {})[kind] = exponent(list(times), list(times.values()))
    return fitted


def add_estimates(console, result: dict, configs: Sequence[Config]) -> None:
    """Put what training would take into the result."""
    from diffussm_cli.device import pick_device
    from diffussm_cli.profiling.memory import available_bytes
    from diffussm_cli.training.plan import plan

    for entry, config in zip(result["models"], configs):
        with console.status(f"one step of {entry['name']}"):
            entry["training"] = plan(config, available_bytes(pick_device(config.train.device)))._asdict()


# ------------------------------------------------------------------------------------------------------ showing
def show(result: dict) -> None:
    """Tables on stdout."""
    from rich.console import Console

    console = Console()
    wide = MODEL_WIDTH + (16 if "setting" in result else 0)
    columns = max(1, (console.width - NAMES_WIDTH) // wide)
    for _, group in itertools.groupby(result["models"], key=lambda m: m["resolution"]):
        models = list(group)
        for start in range(0, len(models), columns):
            console.print(table(models[start : start + columns], result.get("setting")))
    for name, fits in result.get("exponents", {}).items():
        for kind, slope in fits.items():
            console.print(f"{name}: {kind} grows with L to the power of {slope:.2f}", highlight=False)


def table(models: Sequence[dict], setting: dict | None = None, memory: bool = False):
    """Models of one resolution side by side; `memory` for the estimate of what training takes."""
    from rich.table import Table

    height, width = models[0]["resolution"]
    title = f"one image of {height}x{width}; Gflops are 1e9 multiply-adds (FLOPs: twice that)"
    grid = Table(title=title, title_justify="left")
    grid.add_column()
    for m in models:
        grid.add_column(m["name"], justify="right")

    def row(name: str, cell) -> None:
        cells = [cell(m) for m in models]
        if any(cells):
            grid.add_row(name, *cells)

    row("parameters", lambda m: f"{m['parameters']:,}")
    row("tokens L", lambda m: f"{m['tokens']:,}")
    row("positions J", lambda m: f"{m['positions']:,}")
    row("Gflops", lambda m: f"{m['gflops']:.4g}")
    for part in dict.fromkeys(part for m in models for part in m["parts"]):
        row(f"  {part}", lambda m, part=part: f"{m['parts'][part]:.4g}" if part in m["parts"] else "")
    row("Gflops counted by a trace", _counted)
    row("SSM kernels, once an update", lambda m: f"{m['kernel_gflops']:.4g}" if m["kernel_gflops"] else "")
    row("images to train on", lambda m: f"{m['training_images'] / 1e6:,.4g} M")
    row("Gflops to train", lambda m: f"{m['training_gflops']:.3g}")
    for kind in dict.fromkeys(kind for m in models for kind in m.get("measured", {})):
        _measured_rows(row, kind, setting)
    row("one step of the batch", lambda m: f"{m['training']['step_seconds']:.3g} s" if "training" in m else "")
    row("to train", lambda m: f"{m['training']['seconds'] / 86400:,.3g} days" if "training" in m else "")
    of = f"memory of each of {models[0]['processes']} processes" if models[0]["processes"] > 1 else "memory to train"
    row(f"{of}, by formula", lambda m: _gib(m["training_bytes"]) if memory or "training" in m else "")
    return grid


def _counted(m: dict) -> str:
    if "counted" not in m:
        return ""
    return f"{sum(v for kind, v in m['counted'].items() if kind != 'kernels'):.4g}"


def _measured_rows(row, kind: str, setting: dict) -> None:
    def cell(form):
        return lambda m: form(m["measured"][kind]) if kind in m.get("measured", {}) else ""

    row(f"{kind}, {setting['precision']}, batch {setting['batch_size']}", cell(_time))
    row("  images a second", cell(lambda v: f"{v['images_per_second']:.3g}"))
    row("  of a large product's rate", cell(lambda v: f"{v['of_product_rate']:.0%}"))
    row("  peak memory", cell(lambda v: _gib(v["peak_bytes"]) if v["peak_bytes"] is not None else "unknown"))
    for share in ("products", "attention", "SSM", "rest"):
        row(f"  time in {share}", cell(lambda v, s=share: f"{v['shares'][s]:.0%}" if v["shares"].get(s) else ""))


def _time(v: dict) -> str:
    scaled = f", {v['blocks_measured']} blocks scaled" if v["scaled"] else ""
    return f"{v['median_ms']:.4g} ms ({v['low_ms']:.4g} to {v['high_ms']:.4g}{scaled})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def show_paper(as_json: bool) -> None:
    """Published figures beside ours."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from diffussm_cli.profiling import paper

    dit, training = list(paper.dit_rows()), list(paper.training_rows())
    if as_json:
        rows = {
            "dit": [r._asdict() | {"difference": r.difference} for r in dit],
            "training": [r._asdict() | {"ours": r.ours, "difference": r.difference} for r in training],
        }
        typer.echo(json.dumps(rows | {"sentence": paper.sentence()}, indent=1))
        return
    console = Console()
    grid = Table(
        "", "published", "ours", "difference", box=SIMPLE_HEAD, title="Gflops of DiT (arXiv 2212.09748, table 4)"
    )
    for r in dit:
        grid.add_row(r.name, f"{r.published:.2f}", f"{r.ours:.3f}", f"{r.difference:+.2%}")
    console.print(grid)
    grid = Table(box=SIMPLE_HEAD, title="total training Gflops (arXiv 2311.18257): images x forward")
    grid.add_column(no_wrap=True)
    for name in ("images", "printed", "ours", "differ by", "a forward, implied", "a forward, ours"):
        grid.add_column(name, justify="right")
    for r in training:
        cells = (f"{r.images / 1e6:.0f} M", f"{r.printed:.3g}", f"{r.ours:.3g}", f"{r.difference:+.1%}")
        grid.add_row(r.name, *cells, f"{r.implied:.1f}", f"{r.forward:.1f}")
    console.print(grid)
    console.print(paper.sentence(), highlight=False)


def panels(result: dict, configs: Sequence[Config]) -> dict:
    """What `--figure` draws: figure 3, and time and memory where several resolutions were measured."""
    from diffussm_cli.profiling.figures import figure_3

    found: dict[str, dict] = {"Gflops of a forward pass": figure_3()}
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
    return {title: curves for title, curves in found.items() if all(len(x) > 1 and all(y) for x, y in curves.values())}
