"""`diffussm profile` as a user meets it."""

import errno
import json
import re

import pytest
import torch
from PIL import Image

from diffussm_cli.config import load_config, to_yaml
from diffussm_cli.machine.gpus import GPUS
from diffussm_cli.profiling import plan as planning
from diffussm_cli.profiling import timing
from diffussm_cli.runs import report
from tests.helpers import line_of, run


def profile(*arguments):
    result = run("profile", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_default_compares_diffussm_with_dit():
    out = json.loads(profile("--json"))
    assert [m["name"] for m in out["models"]] == ["DiffuSSM-XL", "DiT-XL/2", "DiT-XL/1"]
    ours, dit = out["models"][:2]
    assert ours["parameters"] == 673_088_272
    assert dit["parameters"] == 674_834_720
    assert sum(ours["parts"].values()) == pytest.approx(ours["gflops"])
    assert ours["flops"] == pytest.approx(2e9 * ours["gflops"])
    assert sum(v for k, v in ours["counted"].items() if k != "kernels") == pytest.approx(
        ours["gflops"], rel=5e-3
    )
    assert dit["training_gflops"] == pytest.approx(2.13e11, rel=3e-3)


def test_grid_of_resolutions_and_sizes_is_profiled():
    out = json.loads(
        profile(
            *("--models", "s,dit-s/2", "--resolution", "256,512x256", "--no-count", "--json"),
            *("--sweep", "M=1,2", "--sweep", "P=2,4"),
        )
    )
    assert len(out["models"]) == 2 * 2 * 4
    assert [m["resolution"] for m in out["models"]] == [[256, 256]] * 8 + [[512, 256]] * 8
    assert "counted" not in out["models"][0]


def test_tables_hold_every_model(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = profile("--models", "xl,dit-xl/2,dit-xl/1,s", "--no-count")
    for text in (
        "673,088,272",
        "674,834,720",
        "DiT-XL/1",
        "DiffuSSM-S",
        "118.6",
        "Gflops to train",
    ):
        assert text in out
    assert "…" not in out


def test_paper_tables_equal_published_values():
    out = profile("--paper")
    for text in ("118.64", "118.621", "280.3", "295.7", "2.13e+11", "2.5 times"):
        assert text in out
    rows = json.loads(profile("--paper", "--json"))
    assert len(rows["dit"]) == 13
    assert len(rows["training"]) == 4


def test_latency_is_measured_for_every_kind(tmp_path):
    figure = tmp_path / "figure.png"
    out = json.loads(
        profile(
            *("--preset", "digits", "--latency", "--repeats", "1", "--batch-size", "2", "--json"),
            *("--figure", figure),
        )
    )
    measured = out["models"][0]["measured"]
    assert list(measured) == ["forward", "forward+backward", "guided step"]
    for found in measured.values():
        assert found["median_ms"] > 0
        assert found["images_per_second"] == pytest.approx(2e3 / found["median_ms"])
    assert out["setting"]["batch_size"] == 2
    with Image.open(figure) as image:
        assert min(image.size) > 500


def test_latency_table_shows_growth_of_time(monkeypatch):
    times = iter([2.0, 4.0, 16.0, 4.0])  # of each resolution, DiffuSSM first

    def measure(configs, kind, setting):
        facts = {"low_ms": 1, "high_ms": 9, "images_per_second": 1, "of_product_rate": 0.5}
        return [{"median_ms": next(times), "peak_bytes": 3 << 30, **facts} for _ in configs]

    monkeypatch.setattr(timing, "measure", measure)
    out = profile(
        *("--models", "s,dit-s/2", "--resolution", "64,128", "--latency", "--work", "forward"),
        "--no-count",
    )
    assert "3.00 GiB" in out
    assert "2 ms (1 to 9)" in out
    assert "DiffuSSM-S: forward grows with L to the power of 1.50" in out
    assert "DiT-S/2: forward grows with L to the power of 0.00" in out


def test_estimate_measures_a_real_step():
    out = json.loads(profile("--preset", "digits", "--estimate", "--json"))
    training = out["models"][0]["training"]
    assert training["step_seconds"] > 0
    assert training["seconds"] == pytest.approx(
        training["step_seconds"] * load_config("digits").train.steps
    )


def test_estimate_on_gpu_sizes_the_batch_by_its_memory(monkeypatch):
    given = []
    monkeypatch.setattr(
        "diffussm_cli.profiling.report.pick_device",
        lambda name: torch.device("cuda", int(name[-1])),
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index << 30, 80 << 30))
    monkeypatch.setattr(
        planning,
        "plan",
        lambda config, available: given.append(available) or planning.Plan(1, 1, 1),
    )
    profile("--preset", "digits", "--set", "train.device=cuda:3", "--no-count", "--estimate")
    assert given == [3 << 30]


def test_estimate_for_gpu_is_predicted(monkeypatch):
    monkeypatch.setattr(planning, "step_seconds", None)
    monkeypatch.setenv("COLUMNS", "100")
    words = ("--preset", "digits", "--set", "model.depth=1", "--no-count", "--estimate")
    out = profile(*words, "--device", "h200")
    for text in (
        "predicted for",
        "H200 SXM",
        "images per second",
        "hours of the GPU",
        "131.32 GiB",
    ):
        assert text in out
    assert "A prediction, never compared with a GPU: eager code" in out
    training = json.loads(profile(*words, "--device", "4090", "--json"))["models"][0]["training"]
    assert training["memory_bytes"] == 24e9
    assert training["seconds"] == pytest.approx(
        training["step_seconds"] * load_config("digits").train.steps
    )


def test_memory_of_predicted_gpu_is_in_its_automatic_precision():
    words = ("--preset", "mnist", "--no-count", "--estimate", "--device", "h200", "--json")
    auto, bf16, fp32 = (
        json.loads(profile(*words, "--set", f"train.precision={precision}"))["models"][0]
        for precision in ("auto", "bf16", "fp32")
    )
    assert auto["training_bytes"] == bf16["training_bytes"] < fp32["training_bytes"]


def test_prediction_says_if_memory_is_too_small():
    words = ("--preset", "digits", "--no-count", "--estimate", "--device", "4090")
    assert "(too much)" not in profile(*words)
    assert "(too much)" in profile(*words, "--set", "train.batch_size=65536")


def test_estimate_of_job_is_per_process(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    alone = run("train", "--preset", "xl-256", "--set", "train.parallel=fsdp", "--dry-run").stdout
    monkeypatch.setenv("WORLD_SIZE", "8")
    shared = run("train", "--preset", "xl-256", "--set", "train.parallel=fsdp", "--dry-run").stdout
    assert "memory to train, by formula" in alone
    assert "memory of each of 8 processes" in shared
    assert alone != shared


def test_unwritable_figure_is_named_and_costs_no_result(tmp_path, monkeypatch):
    """A full disk, which tells no name."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    path = tmp_path / "figure.png"
    result = run("profile", "--preset", "digits", "--no-count", "--json", "--figure", path)
    assert f"--figure: cannot write {str(path)!r}: No space left on device" in line_of(result)
    assert json.loads(result.stdout)["models"]
    assert not list(tmp_path.iterdir())


def test_swept_field_that_a_model_does_not_have_is_named():
    words = ("--models", "s,dit-s/2", "--sweep", "N=8,64", "--no-count", "--json")
    lines = run("profile", *words).stderr.splitlines()
    assert lines == ["warning: DiT-S/2 N=8: not used: model.d_state=8 (a DiT has no states)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "huge"], "--models: 'huge' must be one of"),
        (["--models", "xl", "--preset", "mnist"], "--models: cannot be combined with --preset"),
        (["--resolution", "25x"], "--resolution: '25x'"),
        (["--resolution", "100"], "--resolution: 100 must be a multiple"),
        (
            ["--sweep", "M=1", "P=2"],
            "RUN: 'P=2' is no folder of a run; each LETTER=VALUES needs a --sweep of its own",
        ),
        (["--sweep", "Q=1"], "--sweep: 'Q=1' must read LETTER=VALUES"),
        (["--set", "model.depth=1"], "name them with --preset"),
        (["--work", "sleep", "--latency"], "--work: 'sleep' must be one of"),
        (["--estimate"], "--estimate: choose what to measure with --preset"),
        (["--device", "h200"], "--device: h200 is a GPU to predict for, with --estimate"),
        (
            ["--preset", "digits", "--estimate", "--latency", "--device", "a100"],
            "--device: a100 is a GPU to predict for, with --estimate and without --latency",
        ),
        (["--figure", "x.gif"], "must end in .png or .svg or .pdf"),
        (["--device", "h300"], "--device: 'h300' must be one of auto, cpu, cuda, cuda:1, mps, or"),
        (
            ["--preset", "mnist", "--estimate", "--device", "h300"],
            "or a GPU to predict for: " + ", ".join(GPUS),
        ),
        (["--latency", "--device", "cuda:9"], "device: 'cuda:9' is not available"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_errors(arguments, message):
    assert message in line_of(run("profile", *arguments))


def test_estimate_of_impossible_size_is_one_line_error(monkeypatch):
    monkeypatch.setattr("diffussm_cli.profiling.timing.available_bytes", lambda device: 1 << 30)
    line = line_of(
        run(
            "profile",
            "--preset",
            "xl-256",
            "--set",
            "train.precision=fp32",
            "--no-count",
            "--estimate",
        )
    )
    assert "one image of xl-256 takes about" in line
    assert "gradient_checkpointing" in line


@pytest.fixture
def two_runs(tmp_path):
    """Runs of a network that was never trained, with logs."""
    for name, lr, loss in (("one", 0.003, 0.5), ("two", 0.007, 0.25)):
        root = tmp_path / name
        root.mkdir()
        config = load_config("digits", [f"train.lr={lr}", "train.steps=9"])
        (root / "config.yaml").write_text(to_yaml(config))
        record = {"step": 9, "loss": loss, "images_per_second": 8.0, "seconds": {"steps": 90}}
        (root / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path / "one", tmp_path / "two"


def test_runs_are_compared_in_a_table_and_on_a_page(two_runs, tmp_path):
    one, two = two_runs
    out = profile(one, two)
    for expected in ("1 one", "2 two", "0.25", "Seconds"):
        assert expected in out
    assert "Fields that differ" in (one / "report.html").read_text(encoding="utf-8")
    assert not (two / "report.html").exists()

    given = json.loads(profile(one, two, "--json", "--page", tmp_path / "page.html"))
    assert given["report"] == str(tmp_path / "page.html")
    assert [row["run"] for row in given["runs"]] == [str(one), str(two)]
    assert given["runs"][1] == {
        **{"run": str(two), "step": 9, "seconds": 90.0, "images_per_second": 8.0, "loss": 0.25}
    }
    assert "2 two" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_log_of_each_run_is_read_once(two_runs, monkeypatch):
    read, log = [], report.Log
    monkeypatch.setattr(report, "Log", lambda path: read.append(path) or log(path))
    profile(*two_runs)
    assert read == [root / "metrics.jsonl" for root in two_runs]


def test_page_of_runs_replaces_nothing_and_tells_what_is_not_used(two_runs, tmp_path):
    one, _ = two_runs
    wrong = {
        "RUN: 'xl-256' is no folder of a run; .* diffussm profile --preset NAME": ("xl-256",),
        "--page: .* is read by this command": (one, "--page", one / "config.html"),
        "--page: .* must end in .html": (one, "--page", tmp_path / "page.png"),
        "--page: needs the folders of runs": ("--page", tmp_path / "page.html"),
    }
    (one / "config.html").write_text("of a user")
    for words, arguments in wrong.items():
        result = run("profile", *arguments)
        assert result.exit_code == 1
        assert re.search(words, line_of(result)), result.output
    assert (one / "config.html").read_text() == "of a user"
    result = run("profile", one, "--repeats", 3)
    assert "--repeats: not used, because runs have been trained" in result.output
