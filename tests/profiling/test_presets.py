"""The list of presets: cost and state from headers made for the test."""

import pytest

from diffussm_cli.config import load_config
from diffussm_cli.profiling import presets
from diffussm_cli.profiling.flops import cost

HEADERS = {
    "s-256": "# Nobody has run this preset to its end with this code yet.",
    "mnist": "# 4,000 steps at 1,600 images/s: an hour.",
    "digits": "# Begun at 8 images/s.\n# Nobody has run this preset to its end with this code yet.",
}


def test_rows_come_by_cost_with_the_time_that_the_rate_in_the_header_makes(monkeypatch):
    monkeypatch.setattr(presets, "preset_names", lambda: list(HEADERS))
    monkeypatch.setattr(presets, "preset_text", lambda name: f"{HEADERS[name]}\n\nmodel:\n  # at 7 images/s")
    rows = {row.name: row for row in presets.preset_rows()}
    assert list(rows) == ["digits", "mnist", "s-256"]
    assert {name: row.run for name, row in rows.items()} == {"digits": "begun", "mnist": "yes", "s-256": "no"}
    train = {name: load_config(name).train for name in rows}
    assert rows["s-256"].seconds is None
    assert rows["mnist"].seconds == pytest.approx(train["mnist"].steps * train["mnist"].batch_size / 1600)
    assert rows["digits"].seconds == pytest.approx(train["digits"].steps * train["digits"].batch_size / 8)
    assert rows["mnist"].data == "builtin:mnist"
    assert rows["mnist"].cost == cost(load_config("mnist"))
