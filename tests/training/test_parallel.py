"""Several processes do what one does: DDP and FSDP2 on gloo, against one process and against accumulation."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffussm_cli import runs
from tests.conftest import TINY

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow
JOB = Path(__file__).parent / "job.py"
SETTINGS = [*TINY, "train.steps=6", "train.grad_clip=0.5", "data.flip=true", "train.log_every=1"]


def job(out, processes=2, *overrides, fault="none", check=True):
    out.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, JOB, out, fault, *SETTINGS, *overrides]
    environment = os.environ | {"PYTHONPATH": str(JOB.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
        return json.loads((out / "records.json").read_text()), runs.read_tensors(out / "averaged.safetensors")
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return job(tmp_path_factory.mktemp("alone"), 1)


def same_course(found, expected):
    (records, weights), (wanted, expected_weights) = found, expected
    assert [r["step"] for r in records] == [r["step"] for r in wanted]
    for ours, theirs in zip(records, wanted):
        for name in set(theirs) - {"images_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), (ours["step"], name)
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        ["train.parallel=ddp"],
        ["train.parallel=fsdp"],
        ["train.accumulate=4"],
        ["train.parallel=fsdp", "train.accumulate=2", "train.gradient_checkpointing=true"],
    ],
    ids=lambda how: " ".join(how),
)
def test_two_processes_train_as_one(alone, tmp_path, how):
    """Loss, its parts, norms, update sizes and time scales of every step, and the averaged weights."""
    same_course(job(tmp_path / "two", 2, *how), alone)


def test_one_process_in_eight_parts_trains_as_one(alone, tmp_path):
    same_course(job(tmp_path / "eight", 1, "train.accumulate=8"), alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_is_one_of_one(alone, tmp_path, parallel):
    """Two processes stop at step 3 though only the second is asked to; one goes on, and the other way round."""
    out = tmp_path / "run"
    records, _ = job(out, 2, f"train.parallel={parallel}", fault="stop")
    assert records[-1]["step"] == 3
    assert [p.name for p in runs.checkpoints(out)] == ["step-00000002", "step-00000003"]
    rest, weights = job(out, 1)
    same_course((records + rest, weights), alone)
    back = tmp_path / "back"
    job(back, 1, "train.steps=4")
    rest, weights = job(back, 2, f"train.parallel={parallel}")
    same_course((alone[0][:4] + rest, weights), alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_nan_on_one_of_two_is_left_out_by_both(tmp_path, parallel):
    records, weights = job(tmp_path / "run", 2, f"train.parallel={parallel}", fault="nan")
    assert [r.get("left_out") for r in records] == [None, None, [3], None, None, None]
    assert records[2]["left_out_images"] == [16]
    assert records[2]["update/matrices"] == pytest.approx(records[1]["update/matrices"], rel=0.2)
    assert all(torch.isfinite(w).all() for w in weights.values())
    for path in runs.checkpoints(tmp_path / "run"):
        for file in (runs.MODEL, runs.EMA, runs.OPTIMIZER):
            assert all(torch.isfinite(v).all() for v in runs.read_tensors(path / file).values())


def test_a_dead_process_ends_the_job_with_one_line(tmp_path):
    done = job(tmp_path / "run", 2, fault="die", check=False)
    assert done.returncode != 0
    assert re.search(r"^another process of this job has ended; .*\(.*Connection.*\)$", done.stderr, re.M), done.stderr
    newest, damaged = runs.newest_good(tmp_path / "run")
    assert (newest.name, damaged) == ("step-00000002", [])
    rest, _ = job(tmp_path / "run", 2)
    assert [r["step"] for r in rest] == [3, 4, 5, 6]


def test_the_others_wait_for_the_first_however_long_it_draws(tmp_path):
    """Two seconds of patience within a step, a preview of five."""
    records, _ = job(tmp_path / "run", 2, "train.sample_every=3", fault="slow")
    assert records[-1]["step"] == 6


def test_two_roots_do_not_diverge(tmp_path):
    """The second process has no checkpoint in its own root: the job ends, and nothing is written."""
    out = tmp_path / "run"
    job(out, 1, "train.steps=2")
    for rank in range(2):
        shutil.copytree(out, tmp_path / "both" / str(rank), ignore=shutil.ignore_patterns("*.json" * rank or "x"))
    done = job(tmp_path / "both", 2, fault="roots", check=False)
    assert done.returncode != 0
    assert "process 1 does not see the checkpoint of process 0" in done.stderr
    assert [p.name for p in runs.checkpoints(tmp_path / "both" / "0")] == ["step-00000002"]


def test_the_ssm_stays_float32_where_dense_layers_are_gathered_in_bfloat16(tmp_path):
    """FSDP2 over one process: what the modules hold while they compute."""
    import torch.distributed as dist

    from diffussm_cli.distributed import Share
    from diffussm_cli.model import DiffuSSM
    from diffussm_cli.training.parallel import shard, views_are_fine

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, seen = DiffuSSM(8, 1, 1, 16, 1, 2, 4, 5), {}
        shard(model, Share(), torch.device("cpu"), torch.bfloat16)
        block = model.blocks[0]
        for name, module in (
            ("ssm", block.s4d),
            ("dense", next(m for m in block.modules() if isinstance(m, torch.nn.Linear))),
        ):
            module.register_forward_hook(lambda m, *_, n=name: seen.update({n: {p.dtype for p in m.parameters()}}))
        with torch.autocast("cpu", torch.bfloat16), views_are_fine():
            model(torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).sum().backward()
        assert seen == {"ssm": {torch.float32}, "dense": {torch.bfloat16}}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.s4d.parameters())
    finally:
        dist.destroy_process_group()
