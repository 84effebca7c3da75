"""Tables that the commands print on stdout."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from diffussm_cli.commands.console import duration, make_console, print_json

NAMES_WIDTH, MODEL_WIDTH = 32, 16  # column widths of a cost table, in characters


def metrics_table(result: dict[str, Any]) -> None:
    """The metrics of an evaluation, one per row."""
    from rich.table import Table

    table = Table("metric", "value")
    metrics = result["metrics"]
    for name, value in metrics.items():
        if name.removesuffix("_error") in metrics and name.endswith("_error"):
            continue  # it stands behind its metric
        error = metrics.get(f"{name}_error")
        table.add_row(name, f"{value:.6g}" + ("" if error is None else f" ± {error:.2g}"))
    stdout = make_console(stderr=False)
    stdout.print(f"{result['num']:,} samples against {result['reference']}", soft_wrap=True)
    stdout.print(table)


def runs_table(names: Sequence[str], facts: Sequence[tuple[str, Sequence[float | None]]]) -> None:
    """What runs have cost and reached, side by side."""
    from rich.table import Table

    from diffussm_cli.pages import number

    table = Table("", *names)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in facts:
        table.add_row(name, *("" if value is None else number(value) for value in values))
    make_console(stderr=False).print(table)


def presets_table(rows: Sequence) -> None:
    """Print the presets, one per row, and on stderr how to learn more."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("preset", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("what it is")
    for row in rows:
        table.add_row(row.name, f"{row.parameters / 1e6:,.1f} M", row.title)
    make_console(stderr=False).print(table)
    make_console().print(
        "memory and time on this machine: diffussm train --preset NAME --dry-run\n"
        "all fields: diffussm train --preset NAME --yaml\n"
        "time of long steps, or on a GPU: diffussm profile --preset NAME --estimate"
    )


def forecast_lines(ahead, steps: int, elsewhere: str) -> Iterator[str]:
    """The memory and the time that a `profiling.plan.Forecast` tells, a line each.

    Args:
        elsewhere: how to predict the time for a GPU, if it was not measured here.
    """
    memory = f"memory: {_gib(ahead.needed)} by formula"
    if ahead.free is not None:
        lack = ", which is too little" if ahead.needed > ahead.free else ""
        memory += f"; {_gib(ahead.free)} free here ({ahead.device}){lack}"
    yield memory

    if ahead.seconds is None:
        yield f"time: {ahead.unmeasured}; to predict it for a GPU: {elsewhere}"
    else:
        yield (
            f"time: about {duration(ahead.seconds)} on {ahead.device} for {steps:,} steps, "
            "and more for previews, checkpoints and evaluation"
        )


def show_costs(result: dict[str, Any]) -> None:
    """Print the cost tables on stdout."""
    console = make_console(stderr=False)
    wide = MODEL_WIDTH + (16 if "setting" in result else 0)
    columns = max(1, (console.width - NAMES_WIDTH) // wide)

    # As many models beside each other as fit, all of one resolution.
    for _, group in itertools.groupby(result["models"], key=lambda m: m["resolution"]):
        models = list(group)
        for start in range(0, len(models), columns):
            console.print(cost_table(models[start : start + columns], result.get("setting")))

    # What holds for all of them.
    for name, fits in result.get("exponents", {}).items():
        for kind, slope in fits.items():
            console.print(f"{name}: {kind} grows with L to the power of {slope:.2f}")
    assumptions = {m.get("training", {}).get("assumptions", "") for m in result["models"]}
    for text in filter(None, assumptions):
        console.print(text[0].upper() + text[1:], soft_wrap=True)


def cost_table(models: Sequence[dict], setting: dict | None = None, memory: bool = False):
    """Models of one resolution side by side; `memory` adds the estimated memory of training."""
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

    # Sizes, and Gflops by part.
    row("parameters", lambda m: f"{m['parameters']:,}")
    row("tokens L", lambda m: f"{m['tokens']:,}")
    row("positions J", lambda m: f"{m['positions']:,}")
    row("Gflops", lambda m: f"{m['gflops']:.4g}")
    for part in dict.fromkeys(part for m in models for part in m["parts"]):
        row(
            f"  {part}",
            lambda m, part=part: f"{m['parts'][part]:.4g}" if part in m["parts"] else "",
        )
    row("Gflops counted by a trace", _counted)
    row(
        "SSM kernels, once per update",
        lambda m: f"{m['kernel_gflops']:.4g}" if m["kernel_gflops"] else "",
    )

    # Training.
    row("images to train on", lambda m: f"{m['training_images'] / 1e6:,.4g} M")
    row("Gflops to train", lambda m: f"{m['training_gflops']:.3g}")
    for kind in dict.fromkeys(kind for m in models for kind in m.get("measured", {})):
        _measured_rows(row, kind, setting)
    _training_rows(row)

    # Memory.
    label = (
        f"memory of each of {models[0]['processes']} processes"
        if models[0]["processes"] > 1
        else "memory to train"
    )
    row(
        f"{label}, by formula",
        lambda m: _needed(m) if memory or "training" in m else "",
    )
    return grid


def _training_rows(row) -> None:
    """How long training takes, measured on this machine or predicted for a GPU."""

    def cell(form, key: str = "step_seconds"):
        return lambda m: form(m["training"]) if key in m.get("training", {}) else ""

    row("predicted for", cell(lambda v: v["gpu"], "gpu"))
    row("one step on the batch", cell(lambda v: f"{v['step_seconds']:.3g} s"))
    row(
        "  images per second",
        cell(lambda v: f"{v['images_per_second']:.3g}", "images_per_second"),
    )
    row("to train", cell(lambda v: duration(v["seconds"])))
    row("  hours of the GPU", cell(lambda v: f"{v['seconds'] / 3600:,.1f}", "gpu"))
    row("memory of the GPU", cell(lambda v: _gib(v["memory_bytes"]), "gpu"))


def _counted(m: dict) -> str:
    if "counted" not in m:
        return ""
    return f"{sum(v for kind, v in m['counted'].items() if kind != 'kernels'):.4g}"


def _measured_rows(row, kind: str, setting: dict | None) -> None:
    assert setting is not None, "what was measured was measured in a setting"

    def cell(form):
        return lambda m: form(m["measured"][kind]) if kind in m.get("measured", {}) else ""

    row(f"{kind}, {setting['precision']}, batch {setting['batch_size']}", cell(_time))
    row("  images per second", cell(lambda v: f"{v['images_per_second']:.3g}"))
    row("  share of a large product's rate", cell(lambda v: f"{v['of_product_rate']:.0%}"))
    row("  peak memory", cell(lambda v: _gib(v["peak_bytes"]) if v["peak_bytes"] else ""))


def _needed(m: dict) -> str:
    """The memory of training, and whether a GPU that it was predicted for has less."""
    most = m.get("training", {}).get("memory_bytes", m["training_bytes"])
    return _gib(m["training_bytes"]) + (" (too much)" if m["training_bytes"] > most else "")


def _time(v: dict) -> str:
    return f"{v['median_ms']:.4g} ms ({v['low_ms']:.4g} to {v['high_ms']:.4g})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def paper_tables(as_json: bool) -> None:
    """Print published figures beside ours."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from diffussm_cli.profiling import paper

    dit = list(paper.dit_rows())
    training = list(paper.training_rows())
    if as_json:
        rows = {"dit": [r._asdict() for r in dit], "training": [t._asdict() for t in training]}
        print_json(rows | {"sentence": paper.sentence()}, make_console())
        return

    # A forward pass of DiT.
    console = make_console(stderr=False)
    grid = Table(
        "",
        "published",
        "ours",
        "difference",
        box=SIMPLE_HEAD,
        title="Gflops of DiT (arXiv 2212.09748, table 4)",
    )
    for r in dit:
        grid.add_row(r.name, f"{r.published:.2f}", f"{r.ours:.3f}", f"{r.difference:+.2%}")
    console.print(grid)

    # Total training, by the paper's way of counting.
    grid = Table(
        box=SIMPLE_HEAD, title="total training Gflops (arXiv 2311.18257): images x forward"
    )
    grid.add_column(no_wrap=True)
    for name in (
        "images",
        "printed",
        "ours",
        "difference",
        "per forward, implied",
        "per forward, ours",
    ):
        grid.add_column(name, justify="right")
    for t in training:
        cells = (
            f"{t.images / 1e6:.0f} M",
            f"{t.printed:.3g}",
            f"{t.ours:.3g}",
            f"{t.difference:+.1%}",
        )
        grid.add_row(t.name, *cells, f"{t.implied:.1f}", f"{t.forward:.1f}")
    console.print(grid)
    console.print(paper.sentence())
