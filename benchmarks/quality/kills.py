"""Kill a job again and again, start the same command each time, and compare the end with a run that
nobody disturbed.

    python benchmarks/quality/kills.py train|sample|encode FOLDER [--kills 20]
        [--from 0.5 --to 20] [--preset mnist]
    python benchmarks/quality/kills.py train FOLDER --every 60 --kills 1000
        (a soak: killed each minute until done)

SIGKILL comes at a random time after the start, or every so many seconds. `sample` needs a run,
FOLDER/calm (made by `train`); `encode` makes its pictures and a small VAE itself. Prints one JSON
object.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

PROGRAM = [sys.executable, "-m", "diffussm_cli"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=["train", "sample", "encode"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--from", dest="least", type=float, default=0.5)
    parser.add_argument("--to", dest="most", type=float, default=20)
    parser.add_argument("--every", type=float)
    parser.add_argument("--preset", default="mnist")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--num", type=int, default=2000)
    a = parser.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)

    command, result = {"train": training, "sample": sampling, "encode": encoding}[a.job](a)
    calm, killed = a.folder / f"{a.job}-calm", a.folder / f"{a.job}-killed"
    start = time.time()
    subprocess.run(command(calm), check=True, capture_output=True)
    undisturbed = time.time() - start
    random.seed(0)
    start, kills = time.time(), 0
    while kills < a.kills:
        process = subprocess.Popen(
            command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(a.every or random.uniform(a.least, a.most))  # noqa: S311
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    last = subprocess.run(command(killed), capture_output=True, text=True)
    outcome = {
        "job": a.job,
        "kills": kills,
        "exit_code": last.returncode,
        "equal": result(calm) == result(killed),
        "undisturbed_s": round(undisturbed, 1),
        "killed_s": round(time.time() - start, 1),
    }
    print(json.dumps(outcome))


def training(a):
    settings = [part for value in a.set for part in ("--set", value)]

    def command(out: Path) -> list[str]:
        return [
            *PROGRAM,
            "train",
            "--preset",
            a.preset,
            "--out",
            str(out),
            "--resume",
            "auto",
            *settings,
        ]

    return command, lambda out: hashes(out / "final", "*.safetensors")


def sampling(a):
    def command(out: Path) -> list[str]:
        run = a.folder / "train-calm"
        return [*PROGRAM, "sample", str(run), "-n", str(a.num), "--steps", "20", "--out", str(out)]

    return command, lambda out: hashes(out, "*.png")


def encoding(a):
    import diffusers

    pictures, vae, rng = a.folder / "pictures", a.folder / "vae", np.random.default_rng(0)
    pictures.mkdir(exist_ok=True)
    for i in range(a.num):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(pictures / f"{i:05d}.png")
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    diffusers.AutoencoderKL(
        **blocks, block_out_channels=(16,) * 4, norm_num_groups=4
    ).save_pretrained(vae)

    def command(out: Path) -> list[str]:
        more = ["--resolution", "64", "--shard-size", "64", "--batch-size", "16", "--workers", "1"]
        return [*PROGRAM, "encode", str(pictures), str(out), "--vae", str(vae), *more]

    return command, lambda out: hashes(out, "*.safetensors")


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))
    }


if __name__ == "__main__":
    main()
