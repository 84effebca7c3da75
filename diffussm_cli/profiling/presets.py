"""The training cost of each preset, from its configuration, and whether it was run, from the header of its file."""

import re
from typing import NamedTuple

from diffussm_cli.config import load_config, preset_names, preset_text
from diffussm_cli.profiling.flops import Cost, cost

UNRUN = "Nobody has run this preset to its end"  # in the header of a preset until someone has
RATE = re.compile(r"([\d,]+) images/s")  # in the header of a preset that was run or started


class PresetRow(NamedTuple):
    """One preset. `seconds` is its training time at the rate in its header, on one or two CPU cores, if known."""

    name: str
    data: str
    cost: Cost
    seconds: float | None
    run: str  # yes, begun, no


def preset_rows() -> list[PresetRow]:
    """Every preset, ordered by training cost."""
    rows = []
    for name in preset_names():
        config, header = load_config(name), preset_text(name).partition("\n\nmodel:")[0]
        rate, images = RATE.search(header), config.train.steps * config.train.batch_size
        seconds = images / float(rate[1].replace(",", "")) if rate else None
        run = "no" if rate is None else "begun" if UNRUN in header else "yes"
        rows.append(PresetRow(name, config.data.path, cost(config), seconds, run))
    return sorted(rows, key=lambda row: row.cost.training_gflops)
