"""Tables on stdout: the rows that have something to say, in the units they name."""

import io

import rich.console

from diffussm_cli.commands import tables
from diffussm_cli.config import load_config
from diffussm_cli.profiling.report import cost_entry


def rows(table):
    """The cells of each row by the name of the row."""
    shown = io.StringIO()
    rich.console.Console(file=shown, width=200).print(table)
    lines = [line.split("\u2502") for line in shown.getvalue().splitlines() if "\u2502" in line]
    return {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in lines}


def test_cost_table_holds_models_side_by_side():
    models = [cost_entry(load_config(name), name) for name in ("digits", "mnist-dit")]
    models[0]["parameters"] = 1234567
    models[1]["parameters"] = 89
    found = rows(tables.cost_table(models))
    assert found["parameters"] == ["1,234,567", "89"]
    assert found["tokens L"] == ["64", "196"]
    assert found["attention"][0] == ""  # the first one has none
    assert float(found["attention"][1]) > 0
    assert not any("memory" in name or "step" in name for name in found)


def test_memory_is_shown_in_gib_on_request():
    model = cost_entry(load_config("digits")) | {"training_bytes": 3 << 29, "processes": 2}
    assert rows(tables.cost_table([model], memory=True))[
        "memory of each of 2 processes, by formula"
    ] == ["1.50 GiB"]


def test_metrics_are_shown_with_six_digits_and_with_their_errors(capsys):
    result = {
        "num": 1234,
        "reference": "r.npz",
        "metrics": {"fid": 3.94261234, "kid": 0.00125, "kid_error": 0.00034}
        | {"mmd": 0.5, "mmd_error": 0.25},
    }
    tables.metrics_table(result)
    shown = capsys.readouterr().out
    assert "1,234 samples against r.npz" in shown
    for text in ("3.94261 ", "0.00125 \u00b1 0.00034", "0.5 \u00b1 0.25"):
        assert text in shown
    assert "_error" not in shown
