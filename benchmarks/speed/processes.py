"""Images a second of one process with all threads against two with half of them each, at equal
global batch (gloo).

    python benchmarks/speed/processes.py FOLDER [--preset mnist] [--steps 200] [--rounds 3]

In turn, as the machine may be shared; prints the rates of the second half of each run and the ratio
of their medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="mnist")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[])
    a = parser.parse_args()
    settings = [
        f"train.steps={a.steps}",
        f"train.log_every={a.steps // 2}",
        "train.sample_every=0",
        *a.set,
    ]
    kinds = {"1 process": (1, "ddp"), "2 ddp": (2, "ddp"), "2 fsdp": (2, "fsdp")}
    rates = {name: [] for name in kinds}
    for _ in range(a.rounds):
        for name, (processes, parallel) in kinds.items():
            rates[name].append(rate(a, [*settings, f"train.parallel={parallel}"], processes))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = {name: medians[name] / medians["1 process"] for name in kinds}
    print(json.dumps({"preset": a.preset, "images_per_second": rates, "ratio": ratios}))


def rate(a, settings: list[str], processes: int) -> float:
    shutil.rmtree(a.folder, ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *torchrun,
        "-m",
        "diffussm_cli",
        "train",
        "--preset",
        a.preset,
        "--out",
        str(a.folder),
    ]
    command += [part for value in settings for part in ("--set", value)]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes))}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | threads)
    return json.loads((a.folder / "metrics.jsonl").read_text().splitlines()[-1])[
        "images_per_second"
    ]


if __name__ == "__main__":
    main()
