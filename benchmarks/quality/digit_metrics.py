"""Every metric of a digits run beside real digits that were held out, and beside sets that are
wrong in a known way.

    python benchmarks/quality/digit_metrics.py RUN

500 of each against the 4,500 digits of training, by `diffussm eval` with its embedded extractor.
Prints a table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from diffussm_cli.data import builtin

COUNT = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    run = parser.parse_args().run
    held_out = builtin.load("mnist", None, held_out=True)
    images, labels = held_out.images[:, 0].numpy(), held_out.labels.numpy()
    order = np.random.default_rng(0).permutation(COUNT)
    real, noise = images[order], np.random.default_rng(1).normal(0, 60, images.shape)
    sets = {
        "held-out digits": real,
        "blurred (radius 1.5)": [
            np.asarray(Image.fromarray(i).filter(ImageFilter.GaussianBlur(1.5))) for i in real
        ],
        "noised (sigma 60)": np.clip(real + noise, 0, 255).astype(np.uint8),
        "one class (3), repeated": np.tile(images[labels == 3], (COUNT // 50, 1, 1)),
    }
    rows = {"samples of the run": evaluate(run, "-n", str(COUNT))}
    with tempfile.TemporaryDirectory() as folder:
        for name, pictures in sets.items():
            place = Path(folder) / name
            place.mkdir()
            for i, picture in enumerate(pictures):
                Image.fromarray(picture).save(place / f"{i:03d}.png")
            rows[name] = evaluate(str(place), "--reference", "builtin:mnist")
    print("| 500 of | " + " | ".join(next(iter(rows.values()))) + " |")
    for name, metrics in rows.items():
        print(f"| {name} | " + " | ".join(f"{v:.4g}" for v in metrics.values()) + " |")


def evaluate(*arguments: str) -> dict[str, float]:
    program = [sys.executable, "-m", "diffussm_cli", "eval"]
    command = [*program, *arguments, "--metrics", "all", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["metrics"]


if __name__ == "__main__":
    main()
