"""What the largest model takes on this machine: one real optimiser step, and a checkpoint of it.

    python benchmarks/speed/large.py step [--preset xl-256] [--precision auto]
    python benchmarks/speed/large.py checkpoint FOLDER [--preset xl-256]

`step`: full model, batch 1, gradient checkpointing, Adam's moments and averaged weights; peak resident memory.
`checkpoint`: bytes, and the seconds for which writing one keeps training waiting, at once and beside it.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import torch

from diffussm_cli.config import load_config
from diffussm_cli.machine.device import keep_freed_memory
from diffussm_cli.profiling.plan import Noise
from diffussm_cli.runs import EMA
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.checkpoint import CheckpointWriter, collect
from diffussm_cli.training.record import Meter
from diffussm_cli.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "checkpoint"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("large"))
    parser.add_argument("--preset", default="xl-256")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--set", action="append", default=[])
    a = parser.parse_args()
    keep_freed_memory()
    settings = ["train.batch_size=1", "train.sample_every=0", "train.gradient_checkpointing=true"]
    config = load_config(a.preset, [*settings, f"train.precision={a.precision}", *a.set])
    trainer = Trainer(config, Noise(config), a.folder)
    steps = [step(trainer) for _ in range(2 if a.what == "step" else 1)]
    if a.what == "step":
        print(json.dumps({"dtype": str(trainer.dtype), "steps": steps, "peak_gib": peak_gib()}))
    else:
        print(json.dumps({how: save(trainer, how == "beside") for how in ("at once", "beside")}))


def peak_gib() -> float:
    """Peak resident memory of this process (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def step(trainer: Trainer) -> dict:
    meter = Meter(trainer.config.diffusion.timesteps, trainer.device)
    batch = make_batch(trainer.source, trainer.config, trainer.step)
    start = time.perf_counter()
    trainer.update(batch, meter)
    trainer.step += 1
    left_out, _ = trainer.bad_steps.flush(trainer.step)
    return {"seconds": time.perf_counter() - start, "left_out": left_out, **meter.flush()}


def save(trainer: Trainer, beside: bool) -> dict:
    shutil.rmtree(trainer.root, ignore_errors=True)
    config = trainer.config.train
    object.__setattr__(config, "async_checkpoint", beside)
    writer = CheckpointWriter(trainer.root, config)
    start = time.perf_counter()
    writer.write(
        collect(trainer.model, {EMA: trainer.ema.model.state_dict()}, trainer.optimizer), {"step": trainer.step}
    )
    waiting = time.perf_counter() - start
    writer.finish()
    done = time.perf_counter() - start
    size = sum(f.stat().st_size for f in trainer.root.rglob("*") if f.is_file())
    shutil.rmtree(trainer.root)
    return {"bytes": size, "training_waits_s": waiting, "on_disk_after_s": done, "peak_gib": peak_gib()}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
