"""A step on its own, without a run folder: its loss, that it does not wait, and its state."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from diffussm_cli import runs
from diffussm_cli.data.opening import open_source
from diffussm_cli.machine.processes import World
from diffussm_cli.training import parallel
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.step import Step
from tests.conftest import device

CPU = torch.device("cpu")


def batch_of(step, number=0):
    return make_batch(open_source(step.config), step.config, number)


def weights(step):
    return {
        f"{name}.{k}": v.clone()
        for name, model in (("model", step.model), ("average", step.ema.model))
        for k, v in model.state_dict().items()
    }


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_min_snr_weights_the_loss_that_is_trained(tiny):
    config = tiny("train.loss_weight=min_snr", "train.min_snr_gamma=0.5", "model.learn_sigma=false")
    step = Step(config, device())
    batch = batch_of(step).part(0, 8, device())
    losses = step.losses(batch)
    torch.testing.assert_close(
        losses["loss"], losses["mse"] * step.objective.min_snr_weight(batch.t, 0.5)
    )
    assert losses["loss"].sum() < 0.9 * losses["mse"].sum()


def test_update_does_not_wait_for_the_device(tiny, monkeypatch):
    """torch.tensor of a Python number, and `item`, copy between host and device and wait for it."""
    step = Step(tiny("train.accumulate=2", "train.grad_clip=1"), torch.device("cpu"))
    batch = batch_of(step)
    step.update(batch)  # the optimiser makes its state

    def wait(*_, **__):
        raise AssertionError("waits for the device")

    for owner, name in (
        (torch, "tensor"),
        (torch.Tensor, "item"),
        (torch.Tensor, "tolist"),
        (torch.Tensor, "cpu"),
    ):
        monkeypatch.setattr(owner, name, wait)
    step.update(batch)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_that_is_not_finite_changes_no_weight_and_is_counted(tiny, optimizer):
    step = Step(tiny(f"train.optimizer={optimizer}", "train.warmup_steps=0"), device())
    step.update(batch_of(step, 0))
    before = weights(step)
    step.losses = lambda part: {
        name: loss * torch.nan for name, loss in Step.losses(step, part).items()
    }
    step.update(batch_of(step, 1))
    of_model = {name: tensor for name, tensor in weights(step).items() if name.startswith("model.")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in of_model.items())
    assert step.bad_steps.flush(step.number) == ([2], 1)


def test_state_holds_everything_for_the_next_step(tiny, tmp_path):
    """A Step that loads it goes on as the one that made it, bit by bit."""
    config = tiny("train.ema=0.9,0.1")
    first = Step(config, device())
    for number in range(2):
        first.update(batch_of(first, number))
    files = first.state()
    hashes = {name: runs.write_tensors(tensors, tmp_path / name) for name, tensors in files.items()}
    runs.write_state(tmp_path, {"step": first.number, "sha256": hashes})

    second = Step(config, device())
    assert not same(weights(second), weights(first))
    second.load(tmp_path)
    assert second.number == 2
    for step in (first, second):
        step.update(batch_of(step, 2))
    assert same(weights(second), weights(first))
    assert sorted(files) == [
        "ema-0.1.safetensors",
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
    ]


# ----------------------------------------------------------------------------- in several processes
@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_average_of_sharded_model_is_assembled_without_drawing_weights(tiny):
    """At 673 million parameters drawing takes long, in every process and at every preview."""
    step = Step(tiny(), CPU)
    average = step.averaged()
    expected = {name: value.clone() for name, value in average.state_dict().items()}
    position = average.position.clone()
    parallel.shard(step.ema.model, World(), CPU, torch.float32)
    before = torch.get_rng_state()
    found = step.averaged()
    assert torch.equal(torch.get_rng_state(), before)
    assert same(found.state_dict(), expected)
    assert torch.equal(found.position, position)
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.usefixtures("one_process")
def test_sharded_model_stays_gathered_between_micro_batches(tiny):
    step = Step(tiny(), CPU)
    parallel.shard(step.model, World(), CPU, torch.float32)
    batch = batch_of(step).part(0, 4, CPU)
    for is_last in (False, False, True):
        with parallel.last_part_only(step.model, is_last):
            step.losses(batch)["loss"].mean().backward()
        kept = [not isinstance(p, DTensor) for p in step.model.blocks.parameters()]
        assert kept == [not is_last] * len(kept)


@pytest.mark.usefixtures("one_process")
def test_replicas_do_not_send_their_table_of_positions(tiny):
    copies = parallel.replicate(Step(tiny(), CPU).model, CPU)
    assert not copies.will_sync_module_buffers()
