"""A folder of samples: the same images whoever draws them and whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffussm_cli import runs
from diffussm_cli.config import config_from_dict, to_dict
from diffussm_cli.data.opening import open_source
from diffussm_cli.errors import RunError
from diffussm_cli.machine.files import PARTIAL
from diffussm_cli.machine.processes import World
from diffussm_cli.sampling import open_sampler
from diffussm_cli.sampling.folder import META, SampleFolder, free_folder
from diffussm_cli.sampling.request import sample_facts
from diffussm_cli.training.loop import Trainer
from tests.conftest import TINY, fill
from tests.helpers import Background, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of random weights, which draws something else from each seed and label."""
    pytest.importorskip("sklearn")
    from diffussm_cli.config import load_config

    config = load_config("digits", TINY)
    root = tmp_path_factory.mktemp("run")
    trainer = Trainer(config, open_source(config), root)
    runs.write_weights(root / "final", config, fill(trainer.step.ema.model).state_dict(), 0)
    return runs.find_run(root)


def request(trained, path, num=7, batch_size=3, seed=5, classes=(), **changes):
    how = config_from_dict(
        to_dict(trained.config), "", fields={f"sample.{k}": v for k, v in changes.items()}
    ).sample
    sampler, seeds = open_sampler(trained, how, batch_size, "fp32"), range(seed, seed + num)
    return SampleFolder(path, sampler, seeds, sample_facts(trained, sampler, seeds, classes))


def draw(folder, npz=False):
    folder.begin()
    drawn = sum(folder.draw(folder.missing()))
    folder.finish(folder.path / "grid.png", npz)
    return drawn


def contents(path):
    return {p.name: p.read_bytes() for p in path.glob("0*.png")}


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    folder = request(trained, tmp_path_factory.mktemp("whole"))
    assert draw(folder, npz=True) == 7
    return folder.path


def test_missing_images_are_drawn_again_bitwise(trained, whole, tmp_path):
    folder = request(trained, tmp_path)
    draw(folder)
    kept = folder.file(5).stat().st_mtime_ns
    folder.file(6).unlink()
    folder.file(11).unlink()
    (tmp_path / f"{PARTIAL}{folder.file(6).name}.1").write_bytes(b"half")
    assert [list(b) for b in folder.missing()] == [[5, 6, 7], [11]]
    assert draw(folder) == 4
    assert folder.file(5).stat().st_mtime_ns == kept
    assert contents(tmp_path) == contents(whole)
    assert draw(folder) == 0


def test_processes_share_the_batches(trained, whole, tmp_path):
    folder = request(trained, tmp_path)
    folder.begin()
    shares = [folder.missing(World(rank, 2)) for rank in (0, 1)]
    assert [[list(b) for b in world] for world in shares] == [[[5, 6, 7], [11]], [[8, 9, 10]]]
    for world in shares:
        list(folder.draw(world))
    assert contents(tmp_path) == contents(whole)


def test_larger_request_adds_images(trained, whole, tmp_path):
    draw(request(trained, tmp_path, num=3))
    assert draw(request(trained, tmp_path, num=7)) == 4
    assert contents(tmp_path) == contents(whole)
    meta = json.loads((tmp_path / META).read_text())
    assert (meta["num"], len(meta["labels"]), meta["complete"]) == (7, 7, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance": 3.0}, "guidance was 1.0 and is now 3.0"),
        ({"steps": 3}, "steps was 4 and is now 3"),
        ({"seed": 6}, "first_seed was 5 and is now 6"),
        ({"classes": (1, 2)}, "classes was None and is now \\[1, 2\\]"),
    ],
)
def test_different_request_is_rejected(trained, whole, change, words):
    before = contents(whole)
    with pytest.raises(RunError, match=f"holds images of another request: {words}"):
        request(trained, whole, **change).begin()
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("classes", "choice"),
    [((), "random"), (tuple(range(10)), "balanced"), ((3, 7), "given"), ((3, 3), "given")],
)
def test_meta_records_choice_of_labels(trained, tmp_path, classes, choice):
    facts = request(trained, tmp_path, num=30, classes=classes).facts
    assert facts["label_choice"] == choice
    if choice == "balanced":
        assert [facts["labels"].count(label) for label in range(10)] == [3] * 10


def test_request_goes_to_the_first_fitting_folder(trained, tmp_path):
    first, second = request(trained, tmp_path), request(trained, tmp_path, guidance=3.0)
    assert free_folder(tmp_path, first.facts) == tmp_path / "images"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / META).write_text(json.dumps(first.facts))
    assert free_folder(tmp_path, first.facts) == tmp_path / "images"
    assert free_folder(tmp_path, second.facts) == tmp_path / "images-2"


def test_foreign_images_and_damaged_meta_are_rejected(trained, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "mine.png")
    with pytest.raises(RunError, match="holds images without meta.json"):
        request(trained, tmp_path).begin()
    for damaged in (b"{", b"[" * 100_000, b"\xff\xfe", b"\0"):
        (tmp_path / META).write_bytes(damaged)
        with pytest.raises(
            RunError, match="meta.json: cannot be read: .*; delete the folder to draw"
        ):
            request(trained, tmp_path).begin()


def test_image_of_other_size_is_named(trained, tmp_path):
    folder = request(trained, tmp_path)
    draw(folder)
    Image.new("L", (16, 8)).save(folder.file(6))
    with pytest.raises(
        RunError, match="000006.png: is 8x16, not an image of this run; delete it to draw it again"
    ):
        draw(folder)


def test_npz_holds_the_images_in_order(whole):
    with np.load(whole / "samples.npz", allow_pickle=False) as found:
        assert found["arr_0"].shape == (7, 8, 8, 1)
        for i in range(7):
            with Image.open(whole / f"{i + 5:06d}.png") as image:
                assert np.array_equal(found["arr_0"][i, :, :, 0], np.asarray(image))
        assert found["arr_1"].tolist() == json.loads((whole / META).read_text())["labels"]


def command(trained, out, *more):
    arguments = [
        "sample",
        trained.root,
        "--seed",
        5,
        "--batch-size",
        3,
        "--precision",
        "fp32",
        "--out",
        out,
        *more,
    ]
    return arguments


@pytest.mark.slow
def test_torchrun_draws_the_same_images(trained, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2"]
    arguments = command(trained, tmp_path / "two", "-n", 7, "--device", "cpu", "--npz")
    done = subprocess.run(
        [*torchrun, "-m", "diffussm_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "two" / "grid.png")
    with np.load(whole / "samples.npz") as one, np.load(tmp_path / "two" / "samples.npz") as two:
        # one thread and not two: sums in another order
        assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1


def test_killed_sampling_continues(trained, tmp_path):
    """SIGKILL while images are being written; what is there is whole, and the rest follows."""
    out = tmp_path / "killed"
    job = Background(*command(trained, out, "-n", 400), log=tmp_path / "log")
    job.wait_until(lambda: len(contents(out)) >= 20)
    assert job.kill() == -signal.SIGKILL  # it was still at work
    before = contents(out)
    assert len(before) < 400
    assert json.loads((out / META).read_text())["complete"] is False
    for name in before:
        with Image.open(out / name) as image:
            image.load()
    assert run(*command(trained, out, "-n", 400)).exit_code == 0
    after = contents(out)
    assert len(after) == 400
    assert {name: after[name] for name in before} == before
    assert json.loads((out / META).read_text())["complete"] is True
