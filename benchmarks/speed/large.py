"""What the largest model takes on this machine: one real optimiser step, and a checkpoint of it.

    python benchmarks/speed/large.py step [--preset xl-256] [--precision auto]
    python benchmarks/speed/large.py checkpoint FOLDER [--preset xl-256]

`step`: full model, batch 1, gradient checkpointing, Adam's moments and averaged weights; peak
resident memory.
`checkpoint`: bytes, and the seconds for which writing one keeps training waiting, at once and
beside it.
"""

import argparse
import dataclasses
import json
import resource
import shutil
import time
from pathlib import Path

import torch

from diffussm_cli.config import load_config
from diffussm_cli.machine.device import keep_freed_memory, pick_device
from diffussm_cli.profiling.plan import Noise
from diffussm_cli.training.batches import make_batch
from diffussm_cli.training.checkpoint import CheckpointWriter
from diffussm_cli.training.step import Step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["step", "checkpoint"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("large"))
    parser.add_argument("--preset", default="xl-256")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--set", action="append", default=[])
    a = parser.parse_args()
    keep_freed_memory()
    settings = ["train.batch_size=1", "train.gradient_checkpointing=true"]
    config = load_config(a.preset, [*settings, f"train.precision={a.precision}", *a.set])
    step = Step(config, pick_device(config.train.device))
    steps = [timed_step(step) for _ in range(2 if a.what == "step" else 1)]
    if a.what == "step":
        print(json.dumps({"dtype": str(step.dtype), "steps": steps, "peak_gib": peak_gib()}))
    else:
        print(
            json.dumps(
                {how: save(step, a.folder, how == "beside") for how in ("at once", "beside")}
            )
        )


def peak_gib() -> float:
    """Peak resident memory of this process (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed_step(step: Step) -> dict:
    batch = make_batch(Noise(step.config), step.config, step.number)
    start = time.perf_counter()
    step.update(batch)
    left_out, _ = step.bad_steps.flush(step.number)
    return {"seconds": time.perf_counter() - start, "left_out": left_out, **step.meter.flush()}


def save(step: Step, root: Path, beside: bool) -> dict:
    shutil.rmtree(root, ignore_errors=True)
    writer = CheckpointWriter(root, dataclasses.replace(step.config.train, async_checkpoint=beside))
    start = time.perf_counter()
    writer.write(step.state(), {"step": step.number})
    waiting = time.perf_counter() - start
    writer.finish()
    done = time.perf_counter() - start
    size = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
    shutil.rmtree(root)
    return {
        "bytes": size,
        "training_waits_s": waiting,
        "on_disk_after_s": done,
        "peak_gib": peak_gib(),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
