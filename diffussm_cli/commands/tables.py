"""Tables that commands show on stdout."""

from typing import Any


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
