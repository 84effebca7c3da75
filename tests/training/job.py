"""What the tests of several processes start by torchrun: one job, its records and weights to a file.

torchrun --nproc-per-node 2 job.py OUT FAULT OVERRIDE...
"""

import datetime
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from diffussm_cli import distributed, runs
from diffussm_cli.commands.train import leave
from diffussm_cli.config import load_config
from diffussm_cli.data.source import open_source
from diffussm_cli.distributed import meeting, read_share
from diffussm_cli.errors import DiffussmError
from diffussm_cli.training.checkpoint import agree_on_checkpoint
from diffussm_cli.training.trainer import Trainer


def main(out: Path, fault: str, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    share, config = read_share(), load_config("digits", overrides)
    if fault == "roots":
        out = out / str(share.rank)
    if fault == "slow":
        distributed.STEP = datetime.timedelta(seconds=2)
    with meeting(share):
        trainer = Trainer(config, open_source(config), out, share)
        newest, _ = agree_on_checkpoint(out, share)
        if newest is not None:
            trainer.resume(newest)
        records = list(trainer.run(inject(trainer, fault)))
        weights = trainer.averaged().state_dict()
    if share.rank == 0:
        (out / "records.json").write_text(json.dumps(records))
        runs.write_tensors(weights, out / "averaged.safetensors")
    leave(0)


def inject(trainer: Trainer, fault: str):
    """The fault, in the second process; gives what `run` asks whether to stop."""
    here, losses = trainer.share.rank == 1, trainer.losses

    def faulty(part):
        found = losses(part)
        if here and trainer.step == 2 and fault == "nan":
            return {k: v * torch.nan for k, v in found.items()}
        if here and trainer.step == 2 and fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def slow_preview(last):
        if trainer.share.rank == 0:
            time.sleep(5)

    trainer.losses = faulty
    if fault == "slow":
        trainer.preview = slow_preview
    return lambda: here and fault == "stop" and trainer.step == 3


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    except DiffussmError as e:
        sys.exit(str(e))
