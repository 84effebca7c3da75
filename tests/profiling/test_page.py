"""The page of costs: its numbers, a study's results, damaged files, and how a browser shows it."""

import errno
import json

import pytest

from diffussm_cli.config import load_config
from diffussm_cli.errors import ConfigError
from diffussm_cli.profiling import page
from diffussm_cli.profiling.report import cost_entry

HOSTILE = "<script>alert(1)</script>"


def measured(milliseconds, peak):
    return {
        "median_ms": milliseconds,
        "low_ms": 1.0,
        "high_ms": 900.0,
        "images_per_second": 4.0,
        "of_product_rate": 0.5,
        "peak_bytes": peak,
        "shares": {"products": 0.75, "attention": 0.0, "SSM": 0.25},
        "blocks_measured": 2,
        "scaled": True,
    }


@pytest.fixture
def models():
    """The result of a profile at two resolutions, and its configurations."""
    configs = [load_config("digits", [f"data.resolution={size}"]) for size in (8, 16)]
    entries = [cost_entry(config, HOSTILE) for config in configs]
    entries[0]["measured"] = {"forward": measured(50.0, 1 << 30)}
    entries[1]["measured"] = {"forward": measured(200.0, None)}
    result = {"convention": "Gflops", "models": entries, "exponents": {HOSTILE: {"forward": 1.25}}}
    return result | {"setting": {"processor": HOSTILE}}, configs


@pytest.fixture
def study(tmp_path):
    """Two seeds of a run, a trial of its search, and real images."""
    folder = tmp_path / "study"
    folder.mkdir()
    common = {"run": HOSTILE, "preset": "mnist", "gflops": 100.0, "steps": 10, "searched": None}
    for seed, (fid, loss) in enumerate(((1.0, 0.5), (3.0, 0.25))):
        record = {"seed": seed, "held_out": loss, "curve": [[5, 50, 2.0], [10, 100, loss]], "metrics": {"fid": fid}}
        (folder / f"a-s{seed}.json").write_text(json.dumps(common | record))
    (folder / "a-0.1.json").write_text(json.dumps(common | {"searched": "0.1", "held_out": 77.0}))
    (folder / "floor.json").write_text(json.dumps({"fid": 88.0}))
    (folder / "rates.json").write_text(json.dumps({"step_seconds": {HOSTILE: 0.5}}))
    return folder


def test_costs_and_quality_stand_on_one_page(models, study, tmp_path):
    page.write_page(tmp_path / "a.html", *models, page.read_study(study))
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    for expected in ("DiffuSSM-XL M=1", "50 ms (1 to 900), 2 blocks, scaled", "200 ms", "1 GiB", "unknown", "1.25 ("):
        assert expected in text
    assert text.count('style="width: 25.0%"') == 1  # 50 of 200 ms
    assert text.count("<polyline") == 5 + 1 + 1  # figure 3, one measured time, the loss; a peak is unknown
    assert "products 75%, SSM 25%" in text
    assert HOSTILE not in text
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6


def test_a_page_without_measurements_has_figure_3_alone(models, tmp_path):
    result, configs = models
    bare = {"convention": "", "models": [{k: v for k, v in m.items() if k != "measured"} for m in result["models"]]}
    page.write_page(tmp_path / "a.html", bare, configs)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("<polyline") == 5
    assert not [word for word in ("Measured", "Quality", "Environment", "by a trace") if word in text]


def test_a_study_has_means_and_ranges_over_its_seeds(study):
    found = page.read_study(study)
    assert [list(t.curve.x) for t in found] == [[50.0, 100.0]] * 2  # Gflops
    table = dict(page.summary(found))
    assert (table["run"], table["seeds"], table["preset"]) == ([HOSTILE], [2], ["mnist"])
    assert table["FID"] == ["2 (1 to 3)"]
    assert table["held-out loss"] == ["0.375 (0.25 to 0.5)"]
    assert table["Gflops of training"] == ["100 (100 to 100)"]
    assert table["recall"] == [""]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "Expecting"),
        ("[]", "is no result of a study"),
        ('{"fid": 1}', "is no result of a study"),
        ('{"run": 1, "searched": null, "preset": 0, "gflops": "x", "metrics": {}}', "could not convert"),
        (
            '{"run": 1, "searched": null, "preset": 0, "gflops": 1, "steps": 0, "curve": [[1, 1, 1]], "metrics": {}}',
            "no",
        ),
        ('{"run": 1, "searched": null, "preset": 0, "gflops": 1, "steps": 1, "curve": [], "metrics": {}}', "no result"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, content, problem):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=f"^--quality: '.*a.json': .*{problem}") as found:
        page.read_study(tmp_path)
    assert "\n" not in str(found.value)


def test_a_page_that_cannot_be_written_is_named(models, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page, "write_text", full)
    with pytest.raises(ConfigError, match="^--report: cannot write .*a.html': No space left on device"):
        page.write_page(tmp_path / "a.html", *models)


@pytest.mark.slow
def test_a_browser_shows_it(models, study, tmp_path):
    from tests.browser import CHROMIUM, browser

    if CHROMIUM is None:
        pytest.skip("no Chromium found (Debian: apt-get install chromium)")
    path = tmp_path / "a.html"
    page.write_page(path, *models, page.read_study(study))
    widths = "[...document.querySelectorAll('.bar')].map(b => Math.round(b.getBoundingClientRect().width))"
    with browser(tmp_path / "profile") as tab:
        for width, dark in ((1280, False), (390, True)):
            tab.open(path, width=width, dark=dark)
            assert tab.ask("document.documentElement.scrollWidth") == width
            short, _, long = tab.ask(widths)  # time, memory, time
            assert long == pytest.approx(4 * short, abs=2)
        assert tab.problems == []
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}
