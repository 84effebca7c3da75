"""The numbers of this checkout as hashes, so that a refactor can show that it changed none of them.

    python tools/fingerprint.py > before.json        # at one commit
    python tools/fingerprint.py > after.json         # at another; then compare the two
    python tools/fingerprint.py --checkout DIR
        # of the package in another checkout, by this script

Everything goes through the commands, in float32 on one thread of the CPU: losses and weights of
seeded training, the bytes of sampled PNG files, of an encoded latent store and of its training, and
evaluation figures.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
checkout = ROOT  # set by --checkout
# Of a record in metrics.jsonl, what depends on the clock or the machine.
TIMED = ("images_per_second", "mfu", "peak_memory_gib", "seconds", "seconds_at_end", "session")
EXACT = ["--set", "train.precision=fp32", "--set", "train.device=cpu"]


def command(folder: Path, *arguments: object) -> str:
    """Run `diffussm` in a folder; gives its standard output."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "DIFFUSSM_CACHE": str(folder / "cache"),
    }
    words = [sys.executable, "-m", "diffussm_cli", *map(str, arguments)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    return done.stdout


def digest(*paths: Path) -> str:
    """Hash of the content of files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def losses(run: Path) -> str:
    """Hash of every record of training, the clock left out."""
    records = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plain = [{k: v for k, v in r.items() if k not in TIMED} for r in records]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def trained(
    folder: Path,
    preset: str,
    steps: int,
    *settings: str,
    samplers: Sequence[str] = ("ddpm", "dpmpp"),
) -> dict[str, str]:
    """Seeded training of a preset, and eight images of it by each sampler."""
    run = folder / preset
    more = [
        part
        for s in (f"train.steps={steps}", "train.log_every=1", *settings)
        for part in ("--set", s)
    ]
    command(folder, "train", "--preset", preset, "--out", run, *EXACT, *more)
    hashes = {"losses": losses(run), "final weights": digest(run / "final" / "model.safetensors")}
    for sampler in samplers:
        out = folder / f"{preset}-{sampler}"
        fixed = ("--sampler", sampler, "--steps", 6, "--precision", "fp32", "--device", "cpu")
        command(folder, "sample", run, "--num", 8, "--out", out, *fixed)
        hashes[f"PNG, {sampler}"] = digest(*out.glob("0*.png"))
    hashes["previews"] = digest(*(run / "samples").glob("*.png"))
    return hashes


def evaluated(folder: Path) -> dict[str, float]:
    """Figures of 64 held-out digits against others, by the embedded extractor."""
    for name, seed in (("real", 0), ("noisy", 1)):
        (folder / name).mkdir()
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 28, 28), dtype=np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / name / f"{i:06d}.png")
    chosen = ("--extractor", "digits", "--device", "cpu", "--json")
    return json.loads(command(folder, "eval", "noisy", "--reference", "real", *chosen))["metrics"]


def encoded(folder: Path) -> dict[str, str]:
    """A store of 12 images in two classes by a small VAE with fixed weights, and training on it."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import save_vae

    for i in range(12):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (40, 32, 3), dtype=np.uint8)
        ).save(path)
    save_vae(folder / "vae")
    store = folder / "latents"
    where = (
        "--vae",
        "vae",
        "--resolution",
        32,
        "--shard-size",
        5,
        "--workers",
        0,
        "--device",
        "cpu",
    )
    command(folder, "encode", "images", "latents", *where)
    hashes = {
        "shards": digest(*store.glob("*.safetensors")),
        "listing": digest(store / "listing.jsonl"),
    }
    sizes = (
        "model.hidden_size=16",
        "model.depth=2",
        "model.num_classes=2",
        "train.batch_size=4",
        "train.steps=3",
    )
    shape = (
        "data.resolution=32",
        "data.downsample=4",
        "data.vae=vae",
        "train.log_every=1",
        "train.sample_every=3",
    )
    more = [part for s in (*sizes, *shape, "sample.steps=3") for part in ("--set", s)]
    command(
        folder,
        "train",
        "--preset",
        "s-256",
        "--data",
        "latents",
        "--out",
        "latent-run",
        *EXACT,
        *more,
    )
    run = folder / "latent-run"
    return hashes | {"losses": losses(run), "previews": digest(*(run / "samples").glob("*.png"))}


def main() -> None:
    global checkout
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkout", type=Path, default=ROOT, help="the folder whose package is measured"
    )
    checkout = parser.parse_args().checkout.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hashes = {
            "digits": trained(folder, "digits", 20, "train.sample_every=10"),
            "mnist-s4d": trained(
                folder,
                "mnist-s4d",
                3,
                "train.sample_every=3",
                "train.sample_images=10",
                "sample.steps=4",
                samplers=("heun", "dpmpp"),
            ),
            "mnist-noise": trained(
                folder, "mnist-noise", 3, "train.sample_every=3", "sample.steps=4"
            ),
            "mnist-dit": trained(folder, "mnist-dit", 2, "train.sample_every=2", "sample.steps=4"),
            "evaluation": evaluated(folder),
            "latents": encoded(folder),
        }
    print(json.dumps(hashes, indent=1))


if __name__ == "__main__":
    main()
