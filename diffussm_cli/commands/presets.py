"""`diffussm train --list`."""

import re

from diffussm_cli.commands.console import duration, make_console
from diffussm_cli.config import Config, load_config, preset_names, preset_text

UNRUN = "Nobody has run this preset to its end"  # in the header of a preset, until someone has
RATE = re.compile(r"([\d,]+) images/s")  # in the header of a preset that was run, or begun


def show_presets() -> None:
    """A table of the presets on stdout, the cheapest training first."""
    from rich.console import Console
    from rich.table import Table

    from diffussm_cli.profiling.flops import cost

    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("preset", "data", "tokens", "parameters", "memory", "time", "run"):
        table.add_column(name, justify="left" if name in ("preset", "data") else "right", no_wrap=True)
    with make_console().status("counting"):
        costs = [(cost(config), config) for config in map(load_config, preset_names())]
    for c, config in sorted(costs, key=lambda pair: pair[0].training_gflops):
        time, run = _experience(config)
        memory = f"{c.training_bytes / 2**30:,.1f} GiB"
        table.add_row(c.name, config.data.path, f"{c.tokens:,}", f"{c.parameters / 1e6:,.1f} M", memory, time, run)
    Console().print(table)
    make_console().print(
        "memory: by formula, for the whole batch on one device; train.accumulate divides it\n"
        "time: of the training, at the rate in the preset's header, on one or two CPU cores\n"
        "run: by us, with this code, to its end\n"
        "time on this machine: diffussm profile --preset NAME --estimate"
    )


def _experience(config: Config) -> tuple[str, str]:
    """The time of a training at the rate in the preset's header, and whether it was run to its end."""
    header = preset_text(config.preset).partition("\n\nmodel:")[0]
    rate = RATE.search(header)
    if rate is None:
        return "unknown", "no"
    seconds = config.train.steps * config.train.batch_size / float(rate[1].replace(",", ""))
    return duration(seconds), "begun" if UNRUN in header else "yes"
