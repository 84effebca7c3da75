"""`diffussm profile`."""

import json
from typing import Annotated

import typer

from diffussm_cli.config import DEFAULT_PRESET, load_config


def profile(
    preset: Annotated[list[str] | None, typer.Option(help="A preset or YAML file. Repeatable.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field in all of them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Print parameters, tokens and Gflops (multiply-adds of a forward pass) by formula."""
    configs = [load_config(name, overrides or []) for name in preset or [DEFAULT_PRESET]]

    from rich.console import Console

    from diffussm_cli.profiling.flops import cost

    costs = [cost(config) for config in configs]
    if as_json:
        typer.echo(json.dumps({"models": [to_dict(c) for c in costs]}, indent=1))
    else:
        Console().print(cost_table(costs))


def to_dict(c) -> dict:
    """A cost as plain values."""
    return {
        "name": c.name,
        "parameters": c.parameters,
        "tokens": c.tokens,
        "positions": c.positions,
        "gflops": c.gflops,
        "parts": c.parts,
        "kernel_gflops": c.kernel_gflops,
    }


def cost_table(costs: list, training: bool = False):
    """Costs side by side, one column a model."""
    from rich.table import Table

    table = Table(title="cost of one image (Gflops: 1e9 multiply-adds of a forward pass)", title_justify="left")
    table.add_column()
    for c in costs:
        table.add_column(c.name, justify="right")
    table.add_row("parameters", *(f"{c.parameters:,}" for c in costs))
    table.add_row("tokens L", *(f"{c.tokens:,}" for c in costs))
    table.add_row("positions J", *(f"{c.positions:,}" for c in costs))
    table.add_row("Gflops", *(f"{c.gflops:.4g}" for c in costs))
    for part in costs[0].parts:
        table.add_row(f"  {part}", *(f"{c.parts[part]:.4g}" for c in costs))
    table.add_row("SSM kernels, once an update", *(f"{c.kernel_gflops:.4g}" for c in costs))
    if training:
        table.add_row("memory to train, estimated", *(f"{c.training_bytes / 2**30:.1f} GiB" for c in costs))
    return table
