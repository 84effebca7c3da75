"""What only a CUDA device can show: `pytest --device cuda`. `test_pretended_gpu.py` sees part of it
without one.
"""

import warnings

import pytest
import torch

from diffussm_cli.config import load_config
from diffussm_cli.data.opening import open_source
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.diffusion.samplers import sample_by_name
from diffussm_cli.model.s4d.layer import S4D
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.step import Step
from tests.conftest import device, randn
from tests.training.job import start

pytestmark = pytest.mark.skipif(device().type != "cuda", reason="needs pytest --device cuda")


SETTINGS = ("train.precision=bf16", "train.grad_clip=1", "train.accumulate=2")


def test_transforms_are_float32_under_bfloat16_autocast(monkeypatch):
    """At powers of two cuFFT takes bfloat16 without a word,
    where the CPU's autocast promotes it.
    """
    seen, rfft = set(), torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, *a, **k: seen.add(x.dtype) or rfft(x, *a, **k))
    layer, u = S4D(16, 8).to(device()), randn(2, 16, 64)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(u.bfloat16())
    assert seen == {torch.float32}
    assert y.dtype == torch.bfloat16


def test_update_does_not_wait_for_the_device(tiny):
    config = tiny(*SETTINGS)
    step, batch = Step(config, device()), make_batch(open_source(config), config, 0)
    step.update(batch)  # the first one makes the optimiser's state
    try:
        forbid_waits()
        step.update(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "euler", "heun"])
def test_steps_of_a_sampler_do_not_wait_for_the_device(sampler):
    """The noise of `ddpm` and `sde` is drawn on the CPU, and UniPC solves a system at each step."""
    objective = make_objective(load_config("digits").diffusion, device())

    def after_step(i, t, x):  # the end waits, to see that all images are finite
        forbid_waits() if i < 3 else torch.cuda.set_sync_debug_mode("default")
        return x

    x = randn(2, 1, 8, 8, dtype=torch.float64)
    try:
        sample_by_name(sampler, lambda x, t: x, objective, x, 5, after_step=after_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forbid_waits() -> None:
    """Whatever makes the host wait for the device is an error from here on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")


def test_previews_leave_nothing_on_the_device(tiny, tmp_path):
    config = tiny(
        *SETTINGS, "train.sample_every=2", "train.sample_images=4", "train.sample_steps=2"
    )
    trainer = Trainer(config, open_source(config), tmp_path)
    list(trainer.run(lambda: trainer.step.number == 2))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    trainer.preview(last=False)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_under_torchrun_trains_alone(parallel, tmp_path):
    """Without a process group: NCCL takes two GPUs."""
    done = start(
        tmp_path,
        {"alone": ("none", [f"train.parallel={parallel}", "train.device=cuda"])},
        processes=1,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "alone" / "averaged.safetensors").is_file()
