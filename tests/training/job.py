"""What the tests of several processes start by torchrun: jobs one after another, each with its
records and weights.

torchrun --nproc-per-node 2 job.py JOBS.json, where JOBS.json holds [[OUT, FAULT, [OVERRIDE, ...]],
...]
"""

import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffussm_cli import runs
from diffussm_cli.commands.console import leave
from diffussm_cli.config import load_config
from diffussm_cli.data.opening import open_held_out, open_source
from diffussm_cli.errors import DiffussmError
from diffussm_cli.machine import processes as distributed
from diffussm_cli.machine.processes import ALONE, World, process_group, read_world
from diffussm_cli.training.checkpoint import agree_on_checkpoint
from diffussm_cli.training.loop import Trainer
from diffussm_cli.training.measure import HeldOut
from tests.conftest import TINY

ON_CPU = "train.device=cpu"  # two processes would need two GPUs
SETTINGS = [
    *TINY,
    ON_CPU,
    "train.steps=6",
    "train.grad_clip=0.5",
    "data.flip=true",
    "train.log_every=1",
    "train.ema=0.99,0.1",
]
PATIENCE, SLOW = 6, 9  # seconds within a step, and of a preview of the first process


def start(
    folder: Path, jobs: dict[str, tuple[str, list[str]]], processes: int = 2
) -> subprocess.CompletedProcess:
    """Jobs in one start, which takes longer than the jobs:
    name in `folder` to fault and overrides.
    """
    listed = []
    for name, (fault, overrides) in jobs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        listed.append([str(folder / name), fault, [*SETTINGS, *overrides]])
    (folder / "jobs.json").write_text(json.dumps(listed))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *torchrun, __file__, str(folder / "jobs.json")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def train(out: Path, fault: str, overrides: list[str], world: World = ALONE) -> None:
    """One job: from the newest checkpoint in `out`, if there is one; records.json and
    averaged.safetensors are left.

    The job `measure` does not train, and leaves the held-out loss alone.
    """
    config = load_config("digits", overrides)
    trainer = Trainer(config, open_source(config), out, world)
    newest, _ = agree_on_checkpoint(out, world)
    if newest is not None:
        trainer.step.load(newest)
    records = (
        [held_out(trainer)] if fault == "measure" else list(trainer.run(inject(trainer, fault)))
    )
    averages = {e.decay: trainer.step.averaged(e).state_dict() for e in trainer.step.averages}
    if world.rank == 0:
        (out / "records.json").write_text(json.dumps(records))
        weights = {
            f"{decay}/{name}": w
            for decay, average in averages.items()
            for name, w in average.items()
        }
        runs.write_tensors(weights, out / "averaged.safetensors")


def held_out(trainer: Trainer) -> dict[str, float]:
    """The held-out loss of the first average; `eval.every` would also want an extractor for these
    digits.
    """
    images = HeldOut(
        open_held_out(trainer.config, trainer.source),
        trainer.config,
        trainer.step.device,
        trainer.world,
    )
    return images.measure(functools.partial(trainer.step.losses, model=trainer.step.averaged()))


def inject(trainer: Trainer, fault: str):
    """The fault, in the second process or in the preview of the first; gives what `run` asks
    whether to stop.
    """
    here, losses = trainer.world.rank == 1, trainer.step.losses

    def faulty(part):
        found = losses(part)
        if here and trainer.step.number == 2 and fault == "nan":
            return {k: v * torch.nan for k, v in found.items()}
        if here and trainer.step.number == 2 and fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    trainer.step.losses = faulty
    if fault == "slow":
        trainer.preview = lambda last: here or time.sleep(SLOW)
    return lambda: here and fault == "stop" and trainer.step.number == 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if any(fault == "slow" for _, fault, _ in jobs):
        distributed.STEP = datetime.timedelta(seconds=PATIENCE)
    # torchrun sends SIGTERM to the others when one has died. As `diffussm train` does, they go on
    # until they see it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with process_group(read_world()):
            for out, fault, overrides in jobs:
                train(Path(out), fault, overrides, read_world())
        leave(0)
    except DiffussmError as e:
        sys.exit(str(e))
