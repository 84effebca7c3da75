"""The page of a run: its numbers, what it does with hostile names and long logs, and how a browser
shows it.
"""

import errno
import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.data.images import read_image
from diffussm_cli.errors import RunError
from diffussm_cli.model.mixers.axial import Axial
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.model.s4d.reference import s4d_kernel_naive
from diffussm_cli.pages import POINTS, chart, thin
from diffussm_cli.runs import report
from diffussm_cli.runs.report import Log, kernels, write_report
from diffussm_cli.training import train

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    pytest.importorskip("sklearn")
    from diffussm_cli.config import load_config
    from tests.conftest import TINY

    root = tmp_path_factory.mktemp("report") / "run & <b>"
    measured = ["eval.every=2", "eval.images=0", "eval.held_out_images=8", "train.sample_every=2"]
    config = load_config("digits", [*TINY, *measured, "train.steps=2", "train.lr=0.003"])
    list(train(config, root))
    list(train(runs.resumed_config(root, ["train.steps=4"]), root, resume=True))
    return root


@pytest.fixture
def run(once, tmp_path):
    shutil.copytree(once, tmp_path / once.name)
    return tmp_path / once.name


def page(root):
    return write_report(root).read_text(encoding="utf-8")


def test_report_is_written_by_training(once):
    text = (once / "report.html").read_text()
    for expected in (
        "finished",
        "Held-out loss",
        "training continued",
        "train.lr",
        "0.003",
        "preview at step 4",
    ):
        assert expected in text
    assert text.count("<img") == 3  # previews at steps 2 and 4, and the nearest training images
    assert text.count("<polyline") == 32  # 20 curves, and both directions of six kernels


def test_matrices_that_muon_updates_have_a_curve_of_their_own(run):
    file = run / "metrics.jsonl"
    assert "</svg>matrices <" in page(run)
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    with_muon = [r | ({"update/muon": 0.01} if "update/matrices" in r else {}) for r in records]
    file.write_text("".join(json.dumps(r) + "\n" for r in with_muon), encoding="utf-8")
    text = page(run)
    assert "</svg>matrices of the blocks (Muon) <" in text
    assert "</svg>other matrices <" in text
    assert "</svg>matrices <" not in text


def test_report_is_written_at_every_preview_and_evaluation(tiny, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "diffussm_cli.training.session.write_report",
        lambda root: written.append(Log(root / runs.LOG)),
    )
    settings = [
        "train.log_every=1",
        "train.sample_every=2",
        "eval.every=3",
        "eval.images=0",
        "eval.held_out_images=4",
    ]
    list(train(tiny(*settings), tmp_path / "run"))
    assert [log.step for log in written] == [2, 3, 4, 4]


def test_names_in_report_are_escaped(run):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        config.replace("preset: digits", f"preset: '{HOSTILE}'").replace("'0'", f"'{HOSTILE}'")
    )
    with (run / "metrics.jsonl").open("a") as log:
        session = {
            "from_step": 4,
            "time": HOSTILE,
            "processor": HOSTILE,
            HOSTILE: HOSTILE,
            "parameters": 1,
        }
        log.write(
            json.dumps(
                {"step": 4, "session": session, "left_out": [HOSTILE], f"eval/{HOSTILE}": 1.0}
            )
            + "\n"
        )
    text = page(run)
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;") >= 8
    assert text.count("<script") == 1
    assert "run &amp; &lt;b&gt;" in text


def test_report_of_long_log_is_small_and_keeps_the_spike(run):
    lines = [
        json.dumps({"step": i, "loss": 1 + i % 7, "grad_norm": 2.0, "images_per_second": 9.0})
        for i in range(100_000)
    ]
    lines[54_321] = json.dumps(
        {"step": 54_321, "loss": 5000.0, "grad_norm": None, "left_out": [54_321]}
    )
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 100000, "lo']))
    assert len(page(run)) < 300_000
    log = Log(run / "metrics.jsonl")
    x, y = thin(log.curves["loss"])
    assert len(y) <= POINTS
    assert x[y.argmax()] == 54_321
    assert len(log.curves["grad_norm"].x) == 99_999
    assert log.events == [(54_321, "not finite, left out: steps 54321")]


def log_of(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Log(path)


def session(step, **facts):
    return {"from_step": step, "time": "noon", "processor": "abacus"} | facts


def test_time_of_a_run_is_the_sum_of_its_sessions(tmp_path):
    log = log_of(
        tmp_path / "log",
        {"step": 10, "session": session(0), "seconds": {"steps": 1800}, "images_per_second": 4.0},
        {"step": 20, "seconds": {"steps": 3600, "previews": 1800}, "images_per_second": 9.0},
        {"step": 30, "session": session(20), "seconds": {"steps": 900}, "images_per_second": 5.0},
        {"step": 40, "seconds": {"steps": -1}},  # damaged
        {"step": 50, "seconds": "noon", "loss": 0.5, "peak_memory_gib": 3.0, "held_out": 2.0},
        {"step": 60, "loss": 0.75, "peak_memory_gib": 2.5, "held_out": 2.5},
    )
    assert log.seconds == {"steps": 4500, "previews": 1800}
    assert list(log.clock.x) == [10, 20, 30]
    assert list(log.clock.y) == [0.5, 1.5, 1.75]
    assert log.damaged == [4]
    assert log.summary() == {
        "step": 60,
        "seconds": 6300,
        "images_per_second": 5.0,
        "peak_memory_gib": 3.0,
        "loss": 0.75,
        "best held_out": 2.0,
    }
    assert log_of(tmp_path / "log", {"step": 1}).summary() == {"step": 1}


def test_time_of_a_session_counts_what_came_after_its_last_record(tmp_path):
    log = log_of(
        tmp_path / "log",
        {
            "step": 10,
            "session": session(0),
            "seconds": {"steps": 1800},
            "seconds_at_end": {"steps": 1800, "previews": 900},
        },
        {"step": 20, "session": session(10), "seconds": {"steps": 1800}},
    )
    assert log.seconds == {"steps": 3600, "previews": 900}
    assert list(log.clock.y) == [0.5, 1.25]  # a record has the time at which it was measured
    assert log.damaged == []


def test_page_tells_time_median_rate_command_commit_and_hash(run):
    facts = session(0, command="diffussm train --x", commit="abc1234", data_sha256="feed" * 16)
    log_of(
        run / "metrics.jsonl",
        {"step": 1, "session": facts, "seconds": {"steps": 3000}, "images_per_second": 4.25},
        {"step": 2, "seconds": {"steps": 6000, "previews": 2000}, "images_per_second": 9.25},
        {"step": 4, "seconds": {"steps": 6000, "previews": 2000}, "images_per_second": 5.25},
    )
    text = page(run)
    for expected in ("2:13:20", "5.25 ", "last 5.25", "steps 75.0%, previews 25.0%"):
        assert expected in text
    for expected in ("diffussm train --x", "abc1234", "feed" * 16):
        assert f"<td>{expected}</td>" in text


def test_page_loads_itself_again_until_the_run_is_finished(run):
    assert "refresh" not in page(run)
    log_of(run / "metrics.jsonl", {"step": 3, "loss": 1.0})
    assert '<meta http-equiv="refresh" content="60">' in page(run)


def axes_in(text):
    return json.loads(re.search(r"data-runs='(.*?)'", text)[1])


def test_steps_of_a_run_become_images_and_hours(run):
    """By its batch size and its clock, which starts at 0; without times there is no such axis."""
    log_of(
        run / "metrics.jsonl",
        {"step": 2, "session": session(0), "loss": 2.0, "seconds": {"steps": 3600}},
        {"step": 4, "loss": 1.0, "seconds": {"steps": 5400}},
    )
    text = page(run)
    assert axes_in(text) == [{"batch": 8, "steps": [0, 2, 4], "hours": [0, 1.0, 1.5]}]
    assert re.findall(r'name="unit" value="(\w+)"', text) == ["steps", "images", "hours"]
    log_of(run / "metrics.jsonl", {"step": 2, "loss": 2.0})
    assert re.findall(r'name="unit" value="(\w+)"', page(run)) == ["steps", "images"]


def test_values_of_a_line_are_on_the_page_as_they_were_logged(run):
    log_of(run / "metrics.jsonl", *({"step": 10 * i, "loss": i / 8} for i in range(1, 5)))
    line = re.search(r'<polyline[^>]*data-run="(\d)" data-x="([^"]*)" data-y="([^"]*)"', page(run))
    assert line.groups() == ("0", "10 20 30 40", "0.125 0.25 0.375 0.5")


def test_line_of_a_single_value_is_a_dot(run):
    log_of(run / "metrics.jsonl", {"step": 2, "loss": 2.0})
    assert re.findall(r'<polyline class="s0 d0 dot"[^>]*points="(\S+) \1"', page(run))
    log_of(run / "metrics.jsonl", *({"step": i, "loss": 2.0} for i in (1, 2)))
    assert 'class="s0 d0 dot"' not in page(run)


def test_nearest_training_images_are_shown_with_their_distances(run):
    facts = {"step": 4, "images": 1617, "distances": [30.0, 10.5, 40.0]}
    (run / "nearest.json").write_text(json.dumps(facts))
    text = " ".join(page(run).split())
    assert "a sample of step 4, and beside it the training image" in text
    assert "of 1,617" in text
    assert "differ by 30 of 255" in text
    assert "least in pair 2: 10.5" in text


@pytest.mark.parametrize(
    "damage",
    ["[]", "{", '{"step": 4, "images": 9, "distances": [NaN]}', '{"distances": []}', "[" * 10**5],
)
def test_damaged_facts_of_nearest_images_leave_them_out(run, damage):
    assert "Nearest training images" in page(run)
    (run / "nearest.json").write_text(damage)
    assert "Nearest training images" not in page(run)


def test_previews_are_thinned_and_shrunk(run):
    folder = run / "samples"
    for i in range(30):
        Image.new("RGB", (2, 2)).save(folder / f"step-{i + 100:08d}.png")
    (folder / "step-00000110.png").write_bytes(b"no picture")
    noise = np.random.default_rng(0).integers(0, 255, (600, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "step-00000200.png")
    found = list(report.frames(folder))
    assert report.PICTURES - 1 <= len(found) <= report.PICTURES
    assert (found[0][0], found[-1][0]) == (2, 200)
    assert found[-1][1].startswith("data:image/webp")
    assert all(url.startswith("data:image/png") for _, url in found[:-1])


def test_kernels_are_those_of_the_averaged_weights(run):
    trained = runs.find_run(run)
    layer = next(m for m in runs.load_model(trained).modules() if isinstance(m, S4D))
    channel = int(layer.log_dt.mean(0).argmin())
    taps = layer.taps(64)[:, channel]
    taps[:, 0] -= layer.D_skip[:, channel]
    expected = report.both_ways(taps.double().numpy())
    first = next(kernels(run, trained.config))
    assert first["lines"] == chart("", expected)["lines"]
    assert first["title"].startswith(f"Layer 1, channel {channel}, dt ")
    np.testing.assert_array_equal(
        expected["earlier tokens"].y[::-1], taps[0, : len(expected["later tokens"].x)]
    )


def test_kernels_of_axial_are_those_of_both_axes_in_tokens(tiny, tmp_path):
    list(train(tiny("model.mixer=axial", "train.steps=2"), tmp_path / "run"))
    trained = runs.find_run(tmp_path / "run")
    layer = next(m for m in runs.load_model(trained).modules() if isinstance(m, Axial))
    charts = list(kernels(tmp_path / "run", trained.config))
    for axis, (words, first) in enumerate((("rows", charts[0]), ("columns", charts[3]))):
        channel = int(layer.log_dt[axis].mean(0).argmin())
        ssm = (layer.log_dt.exp() / 8, -layer.log_A_real.exp(), layer.A_imag, layer.B, layer.C)
        taps = s4d_kernel_naive(*(p[axis] for p in ssm), 8)[:, channel]  # of eight tokens a side
        assert first["lines"] == chart("", report.both_ways(taps.double().numpy()))["lines"]
        assert first["title"].startswith(f"Layer 1 along {words}, channel {channel}, dt ")


def test_run_without_weights_previews_or_log_has_a_report(run):
    for name in ("checkpoints", "final", "samples"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    text = page(run)
    assert "<polyline" not in text
    assert "step 0 of 4" in text


def test_damaged_lines_of_log_are_skipped(run):
    session = {"from_step": 0, "time": "noon", "processor": "abacus"}
    damaged = [
        '{"step": "x"}',
        "[]",
        "null",
        "{",
        '{"loss": 1}',
        '{"step": 1, "session": 5}',
        '{"step": 1, "session": {}}',
        '{"step": 1e999}',
        '{"step": -Infinity}',
        '{"step": 1.5}',
        '{"step": true}',
        f'{{"step": 1{"0" * 400}}}',
        f'{{"step": 1, "loss": 1{"0" * 400}}}',
    ]
    whole = json.dumps({"step": 2, "session": session, "loss": 0.75, "images_per_second": 0.0})
    (run / "metrics.jsonl").write_text("\n".join([*damaged, whole]))
    text = page(run)
    assert "training began at noon on abacus" in text
    assert "last 0.75" in text
    assert "Parameters" not in text
    assert "metrics.jsonl: lines passed over, because they are damaged: 1, 2, 3, 4, 5, ..." in text


def test_damaged_weights_leave_out_the_kernels(run):
    (run / "final" / "model.safetensors").write_bytes(b"damaged")
    shutil.rmtree(run / "checkpoints")
    assert "Learned kernels" not in page(run)


def save_result(path, fid, age, **changes):
    """A file as `diffussm eval` writes it, some seconds old."""
    metrics = {"fid": fid, "kid": 0.5, "kid_error": 0.125}
    result = {"metrics": metrics, "num": 70, "reference": HOSTILE, "warnings": ["few samples"]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(result | {"meta": {"sampler": "ddim", "steps": 7, "run": "no"}} | changes)
    )
    os.utime(path, (time.time() - age,) * 2)


def test_evaluations_are_listed_newest_first(run):
    save_result(run / "images" / "results.json", 3.5, age=1)
    save_result(run / "results.json", 2.5, age=9)
    save_result(run / "checkpoints" / "step-00000002" / "results.json", 4.5, age=5)
    for i, changes in enumerate(
        ({"metrics": [1]}, {"warnings": 3}, {"meta": None}, {"metrics": {"fid": "x"}})
    ):
        save_result(run / f"{i}.results.json", 9.5, 0, **changes)
    (run / "b.results.json").write_text("[" * 100_000)
    found = list(report.evaluations(run))
    assert [f["values"] for f in found] == [{"FID": fid, "KID": 0.5} for fid in (3.5, 4.5, 2.5)]
    assert found[0]["drawn"] == "sampler ddim, steps 7"
    text = page(run)
    for expected in (
        "<dd>3.5 ",
        "images/results.json",
        "70 samples against &lt;script",
        "Warning: few samples",
    ):
        assert expected in text


def test_report_of_other_folder_is_one_line_error(tmp_path):
    with pytest.raises(RunError, match="config.yaml"):
        write_report(tmp_path)


def test_full_disk_leaves_the_last_report(run, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    before = (run / "report.html").read_bytes()
    monkeypatch.setattr(report, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_best_point_of_metric_follows_its_direction(tmp_path):
    records = [
        {"step": s, "eval/fid": f, "eval/recall": f, "eval/fid@0.9": 1.0}
        for s, f in ((1, 3.0), (2, 1.0), (3, 2.0))
    ]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, records)))
    log = Log(tmp_path / "log")
    assert (log.best("eval/fid"), log.best("eval/recall")) == (1, 0)
    fid = next(c for c in report.charts_of(log, {}) if c["title"] == "FID")
    assert fid["best"]["step"] == 2
    assert fid["best"]["value"] == 1.0
    assert [label for label, _ in fid["legend"]] == ["", "0.9"]


FIRST_COLUMNS = (
    "[...document.querySelector('svg.chart').querySelectorAll('.column')].map(t => t.textContent)"
)
# What the figure of the first chart says while the pointer is in its middle, and afterwards.
POINTED = """(() => {
    const chart = document.querySelector('svg.chart'), box = chart.getBoundingClientRect();
    const middle = { clientX: box.left + 199 / 360 * box.width, clientY: box.top + 20 };
    chart.dispatchEvent(new PointerEvent('pointermove', middle));
    const pointed = chart.parentElement.innerText;
    chart.dispatchEvent(new PointerEvent('pointerleave'));
    return [pointed, chart.parentElement.innerText];
})()"""


@pytest.mark.slow
def test_report_is_shown_by_a_browser(run, tmp_path):
    from tests.browser import CHROMIUM, browser

    if CHROMIUM is None:
        pytest.skip("no Chromium found (Debian: apt-get install chromium)")
    path = write_report(run)
    shown = (
        "[...document.querySelectorAll('.film figure')].filter(f => f.offsetParent).map(f => "
        "f.innerText.trim())"
    )
    colour = "getComputedStyle(document.body).backgroundColor"
    with browser(tmp_path / "profile") as tab:
        tab.open(path)
        assert tab.ask(shown) == ["step 4"]
        tab.ask("slider.value = 0; slider.dispatchEvent(new Event('input'))")
        assert tab.ask(shown) == ["step 2"]
        assert tab.ask("[...document.images].every(i => i.naturalWidth > 20)")
        assert tab.ask(colour) == "rgb(255, 255, 255)"
        tab.screenshot(tmp_path / "wide.png")
        assert tab.ask(FIRST_COLUMNS) == ["0", "2", "4"]
        tab.ask("document.querySelector('input[value=images]').click()")
        assert tab.ask(FIRST_COLUMNS) == ["0", "16", "32"]
        pointed, left = tab.ask(POINTED)
        assert re.match(r"Held-out loss at 16 images\n0\.\d+\nbest", pointed)
        assert re.match(r"Held-out loss *\nlast 0\.\d+\nbest", left)
        tab.call("Emulation.setEmulatedMedia", media="print")
        assert tab.ask(shown) == ["step 2", "step 4"]
        tab.open(path, width=390, dark=True)
        assert tab.ask("document.documentElement.scrollWidth") == 390
        assert tab.ask(colour) == "rgb(20, 23, 27)"
        tab.screenshot(tmp_path / "narrow.png")
        tab.open(path, scripts=False)
        assert tab.ask(shown) == ["step 2", "step 4"]
        assert tab.problems == []
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}
    for name, width in (("wide", 1280), ("narrow", 390)):
        pixels = read_image(tmp_path / f"{name}.png", None, 3)
        assert pixels.shape[1] == width
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_two_runs_on_one_page_share_curves_fields_and_previews(run, tmp_path):
    """Each curve once per run; what is equal in both is not listed; the newest common preview."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("lr: 0.003", "lr: 0.007"))
    (other / runs.SAMPLES / "step-00000004.png").unlink()
    both = report.compare(report.read_runs([run, other]))
    assert both["rows"] == [("train.lr", [0.003, 0.007])]
    titles = [chart["title"] for chart in both["charts"]]
    assert titles == ["Loss", "Images per second", "Held-out loss"]
    for chart_of_both in both["charts"]:
        names = [name for name, _ in chart_of_both["legend"]]
        assert names == both["names"] == ["1 run & <b>", "2 other"]
        assert chart_of_both["lines"][0] == chart_of_both["lines"][1]  # a copy lies on the first
    assert both["step"] == 2
    assert len(both["previews"]) == 2

    text = write_report(run, [other]).read_text(encoding="utf-8")
    assert "Fields that differ" in text
    assert "2 other" in text
    assert "Compared" not in page(run)
    assert [facts["batch"] for facts in axes_in(text)] == [8, 8]
    assert {'data-run="0"', 'data-run="1"'} <= set(re.findall(r'data-run="\d"', text))
    elsewhere = write_report(run, [other], tmp_path / "both.html")
    assert elsewhere == tmp_path / "both.html"
    assert "2 other" in elsewhere.read_text(encoding="utf-8")
    with pytest.raises(RunError, match="missing"):
        write_report(run, [tmp_path / "missing"])
