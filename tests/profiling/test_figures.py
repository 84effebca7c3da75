"""Figures: what they show, where labels go, and which files are refused before any work."""

import builtins

import pytest

from diffussm_cli.config import load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.profiling import figures


def test_figure_3_compares_five_models_at_six_resolutions():
    curves = figures.figure_3()
    assert list(curves) == [
        "DiT-XL/2",
        "DiT-XL/1",
        "DiT-XL/1 M=2",
        "DiffuSSM-XL M=1",
        "DiffuSSM-XL M=2",
    ]
    assert {tuple(x) for x, _ in curves.values()} == {(256, 512, 768, 1024, 1536, 2048)}
    at_256 = {name: round(y[0], 1) for name, (_, y) in curves.items()}
    assert (at_256["DiT-XL/2"], at_256["DiT-XL/1"], at_256["DiffuSSM-XL M=2"]) == (
        118.6,
        524.5,
        298.7,
    )
    for _, y in curves.values():
        assert list(y) == sorted(y)


def test_labels_move_up_only_where_they_would_touch():
    assert figures.spread([0.0, 0.5, 0.75, 9.0], 1.0) == [0.0, 1.0, 2.0, 9.0]
    assert figures.spread([0.0, 1.0, 2.0], 1.0) == [0.0, 1.0, 2.0]
    assert figures.spread([], 1.0) == []


def test_panels_show_what_was_measured_at_two_resolutions(monkeypatch):
    monkeypatch.setattr(figures, "figure_3", lambda: {"x": ([1, 2], [3.0, 4.0])})
    sizes = ("8", "16x64")
    configs = [load_config("digits", ["data.path=x", f"data.resolution={s}"]) for s in sizes]

    def entry(milliseconds, peak):
        return {
            "name": "a",
            "measured": {"forward": {"median_ms": milliseconds, "peak_bytes": peak}},
        }

    measured = [entry(500.0, 1 << 30), entry(2000.0, 1 << 30)]
    panels = figures.panels({"models": measured}, configs)
    assert panels["forward (seconds)"] == {"a": ([8, 32], [0.5, 2.0])}
    assert panels["peak memory of forward (GiB)"] == {"a": ([8, 32], [1.0, 1.0])}
    on_cpu = figures.panels({"models": [entry(500.0, None), entry(2000.0, None)]}, configs)
    assert list(on_cpu) == ["Gflops of a forward pass", "forward (seconds)"]
    assert list(figures.panels({"models": measured[:1]}, configs)) == ["Gflops of a forward pass"]


@pytest.mark.parametrize("suffix", figures.SUFFIXES)
def test_drawable_file_types_are_accepted(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    figures.check_figure(tmp_path / f"a{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **named):
        if name == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"--figure: .*\.\[figures\]"):
        figures.check_figure(tmp_path / "a.png")
