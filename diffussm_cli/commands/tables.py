"""Tables that commands show on stdout."""

from collections.abc import Sequence
from typing import Any

from diffussm_cli.commands.console import duration, make_console


def metrics_table(result: dict[str, Any]) -> None:
    """The metrics of an evaluation, one per row."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    found = dict(result["metrics"])
    error = found.pop("kid_error", None)
    for name, value in found.items():
        table.add_row(name, f"{value:.6g}" + (f" ± {error:.2g}" if name == "kid" else ""))
    stdout = Console(markup=False, emoji=False, highlight=False)
    stdout.print(f"{result['num']:,} samples against {result['reference']}", soft_wrap=True)
    stdout.print(table)


def presets_table(rows: Sequence) -> None:
    """The presets, one per row, and on stderr what the columns mean."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("preset", "data", "tokens", "parameters", "memory", "time", "run"):
        table.add_column(name, justify="left" if name in ("preset", "data") else "right", no_wrap=True)
    for row in rows:
        c, memory = row.cost, f"{row.cost.training_bytes / 2**30:,.1f} GiB"
        time = "unknown" if row.seconds is None else duration(row.seconds)
        table.add_row(row.name, row.data, f"{c.tokens:,}", f"{c.parameters / 1e6:,.1f} M", memory, time, row.run)
    Console().print(table)
    make_console().print(
        "memory: by formula, for the whole batch on one device; train.accumulate divides it\n"
        "time: of the training, at the rate in the preset's header, on one or two CPU cores\n"
        "run: by us, with this code, to its end\n"
        "time on this machine: diffussm profile --preset NAME --estimate"
    )
