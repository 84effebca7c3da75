"""Several processes do what one does: DDP and FSDP2 on gloo, against one process and against
accumulation.
"""

import contextlib
import json
import re
import shutil

import pytest
import torch

from diffussm_cli import runs
from tests.training.job import SETTINGS, start, train

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow
WAYS = {
    "ddp": ["train.parallel=ddp"],
    "fsdp": ["train.parallel=fsdp"],
    "accumulated": ["train.accumulate=4"],
    "all": ["train.parallel=fsdp", "train.accumulate=2", "train.gradient_checkpointing=true"],
}
NETWORKS = {  # others than S4D's, held in parts by two processes
    "mixers": ["model.mixer=axial,conv", "model.skips=true"],
    "dit": [
        "model.backbone=dit",
        "model.heads=2",
        "model.qk_norm=true",
        "model.rope=true",
        "model.stem=4",
    ],
}


def outcome(folder):
    """Records and averaged weights of a job."""
    return json.loads((folder / "records.json").read_text()), runs.read_tensors(
        folder / "averaged.safetensors"
    )


@contextlib.contextmanager
def one_thread():
    """As many threads as each process of a job has, for sums of the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def by_one(folder, *overrides):
    """The outcome of a job by this process alone."""
    folder.mkdir(exist_ok=True)
    train(folder, "none", [*SETTINGS, *overrides])
    return outcome(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return by_one(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder with what two processes did in one start: each way, stopped, gone on with, with a
    loss that is no number, and the held-out loss of what one process had trained.
    """
    folder = tmp_path_factory.mktemp("together")
    begun = folder / "begun"
    by_one(begun, "train.steps=4")

    jobs = {name: ("none", overrides) for name, overrides in WAYS.items()}
    jobs |= {name: ("none", [*network, *WAYS["all"]]) for name, network in NETWORKS.items()}
    for name in ("ddp", "fsdp"):
        for fault in ("stop", "nan"):
            jobs[f"{fault}-{name}"] = (fault, WAYS[name])
        for use, fault in (("back", "none"), ("measure", "measure")):
            shutil.copytree(begun, folder / f"{use}-{name}")
            jobs[f"{use}-{name}"] = (fault, WAYS[name])

    done = start(folder, jobs)
    assert done.returncode == 0, done.stderr
    return folder


def same_course(found, expected):
    (records, weights), (wanted, expected_weights) = found, expected
    assert [r["step"] for r in records] == [r["step"] for r in wanted]
    for ours, theirs in zip(records, wanted):
        for name in set(theirs) - {"images_per_second", "peak_memory_gib"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), (
                ours["step"],
                name,
            )
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(alone, together, way):
    """Loss, its parts, norms, update sizes and time scales of every step,
    and the averaged weights.
    """
    same_course(outcome(together / way), alone)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_other_networks_as_one(name, together, tmp_path):
    same_course(outcome(together / name), by_one(tmp_path / "alone", *NETWORKS[name]))


def test_one_process_in_eight_parts_trains_as_one(alone, tmp_path):
    same_course(by_one(tmp_path / "eight", "train.accumulate=8"), alone)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_checkpoint_of_two_processes_continues_in_one(alone, together, way):
    """Two processes stop at step 3 though only the second is asked to; one goes on, and the other
    way round.
    """
    stopped = together / f"stop-{way}"
    records, _ = outcome(stopped)
    assert records[-1]["step"] == 3
    assert [p.name for p in runs.list_checkpoints(stopped)] == ["step-00000002", "step-00000003"]
    rest, weights = by_one(stopped)
    same_course((records + rest, weights), alone)
    rest, weights = outcome(together / f"back-{way}")
    same_course((alone[0][:4] + rest, weights), alone)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_step_with_nan_on_one_process_is_skipped_by_both(together, way):
    records, weights = outcome(together / f"nan-{way}")
    assert [r.get("left_out") for r in records] == [None, None, [3], None, None, None]
    assert records[2]["left_out_images"] == [16]
    assert records[2]["update/matrices"] == pytest.approx(records[1]["update/matrices"], rel=0.2)
    assert all(torch.isfinite(w).all() for w in weights.values())
    kept = runs.list_checkpoints(together / f"nan-{way}")
    assert [path.name for path in kept] == ["step-00000004", "step-00000006"]
    for path in kept:
        for file in (runs.MODEL, runs.EMA, runs.OPTIMIZER):
            assert all(torch.isfinite(v).all() for v in runs.read_tensors(path / file).values())


def test_held_out_loss_of_two_processes_is_that_of_one(together, tmp_path):
    """Bitwise, of the same checkpoint: by one process, by two with copies of the model, and by two
    with parts of it.
    """
    shutil.copytree(together / "begun", tmp_path / "alone")
    with one_thread():
        train(tmp_path / "alone", "measure", SETTINGS)
    (alone,), _ = outcome(tmp_path / "alone")
    assert sorted(alone) == ["held_out", *(f"held_out/q{i}" for i in range(1, 5))]
    for way in ("ddp", "fsdp"):
        assert outcome(together / f"measure-{way}")[0] == [alone], way


def test_lost_process_ends_the_others_after_their_patience(tmp_path):
    """The others wait for what the first process does alone longer than for a step; a dead one ends
    the job at once.
    """
    done = start(tmp_path, {"slow": ("slow", ["train.sample_every=3"]), "die": ("die", [])})
    assert done.returncode != 0
    records, _ = outcome(tmp_path / "slow")
    assert records[-1]["step"] == 6
    assert re.search(
        r"^another process of this job has ended .*\(.*Connection.*\)$", done.stderr, re.M
    ), done.stderr
    newest, damaged = runs.newest_good(tmp_path / "die")
    assert (newest.name, damaged) == ("step-00000002", [])
    rest, _ = by_one(tmp_path / "die")
    assert [r["step"] for r in rest] == [3, 4, 5, 6]


def test_ssm_stays_float32_where_dense_layers_are_gathered_in_bfloat16(tmp_path):
    """FSDP2 over one process: what the modules hold while they compute."""
    import torch.distributed as dist

    from diffussm_cli.machine.processes import World
    from diffussm_cli.model import DiffuSSM
    from diffussm_cli.training.parallel import shard, views_are_fine

    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model, seen = DiffuSSM(8, 1, 1, 16, 1, 2, 4, 5), {}
        shard(model, World(), torch.device("cpu"), torch.bfloat16)
        block = model.blocks[0]
        for name, module in (
            ("ssm", block.s4d),
            ("dense", next(m for m in block.modules() if isinstance(m, torch.nn.Linear))),
        ):
            module.register_forward_hook(
                lambda m, *_, n=name: seen.update({n: {p.dtype for p in m.parameters()}})
            )
        with torch.autocast("cpu", torch.bfloat16), views_are_fine():
            model(
                torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
            ).sum().backward()
        assert seen == {"ssm": {torch.float32}, "dense": {torch.bfloat16}}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32 for p in block.s4d.parameters()
        )
    finally:
        dist.destroy_process_group()
