"""What encoding costs beside the VAE: `Encoder.write` against the VAE's forward alone on the same
batches, interleaved.

    python benchmarks/speed/encode.py [--vae NAME|FOLDER] [--device cuda] [--workers 8]
        [--images 2048]

Without --vae a small AutoencoderKL with random weights is taken: the cheaper the VAE, the harder
the test. Images are JPEG files of about ImageNet's size, made here. Prints one JSON object.
`overhead` is of wall time; `cpu_overhead` is of what this process computes, so that it means
something on a CPU that the workers must share with the VAE.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image

from diffussm_cli.data.latents.encoder import Encoder
from diffussm_cli.data.latents.encoding import make_settings
from diffussm_cli.data.listing import list_source
from diffussm_cli.data.vae import load_vae
from diffussm_cli.data.vae_facts import read_facts
from diffussm_cli.machine.device import keep_freed_memory, pick_device


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vae")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=256, help="how many are made")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--source", type=Path, help="images of yours in place of those made here")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=32, help="first width of the small VAE")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()

    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if a.source is None:
            write_images(root / "images", a.images)
        vae = load_vae(read_facts(a.vae or small_vae(root / "vae", a.width)), pick_device(a.device))
        listing = list_source(a.source or root / "images")
        images = len(listing.entries)
        size = (a.resolution, a.resolution)
        how = {"precision": "fp32", "flip": True, "batch_size": a.batch_size, "shard_size": images}
        settings = make_settings(listing, size, vae, how)
        encoding, alone = [], []
        forward(vae, settings)  # warm up
        for i in range(a.rounds):
            (root / str(i)).mkdir()
            encoder = Encoder(listing, settings, root / str(i), vae, a.workers)
            encoding.append(seconds_of_write(encoder))
            alone.append(seconds(lambda: forward(vae, settings)))
    (encoded, encoded_cpu), (forward_only, forward_cpu) = median(encoding), median(alone)
    result = {
        "vae_parameters": sum(p.numel() for p in vae.model.parameters()),
        "vae": a.vae
        or f"random AutoencoderKL, widths {a.width}, {2 * a.width}, {4 * a.width}, {4 * a.width}",
        "images": images,
        "encoded_seconds": encoding,
        "forward_seconds": alone,
        "images_per_second": images / encoded,
        "overhead": encoded / forward_only - 1,
        "cpu_overhead": encoded_cpu / forward_cpu - 1,
        "workers": a.workers,
        "device": str(vae.device),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    print(json.dumps(result))


def write_images(root: Path, n: int) -> None:
    """JPEG files of 500x375, smooth with some noise."""
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (500, 375)
        )
        noisy = np.asarray(coarse, np.int16) + rng.integers(-8, 9, (375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / f"{i:06d}.jpg", quality=90)


def small_vae(folder: Path, width: int) -> str:
    """An AutoencoderKL of SD's shape, but narrow."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    widths = (width, 2 * width, 4 * width, 4 * width)
    diffusers.AutoencoderKL(block_out_channels=widths, norm_num_groups=8, **blocks).save_pretrained(
        folder
    )
    return str(folder)


def median(pairs: list) -> tuple[float, float]:
    """Of wall seconds and of CPU seconds."""
    return tuple(statistics.median(values) for values in zip(*pairs))


def seconds_of_write(encoder: Encoder) -> tuple[float, float]:
    """From the first batch that workers have ready, as a long run is not their start, to the shard
    on disk.
    """
    steps = encoder.write([0])
    next(steps)  # nothing is done yet
    next(steps)
    first = encoder.settings.batch_size
    scale = encoder.settings.images / (encoder.settings.images - first)
    wall, cpu = seconds(lambda: list(steps))
    return wall * scale, cpu * scale


def forward(vae, settings) -> None:
    """The VAE's own work on as many images, plain and mirrored."""
    images = torch.rand(settings.batch_size, 3, *settings.resolution, device=vae.device) * 2 - 1
    for _ in range(2 * settings.images // settings.batch_size):
        vae.encode(images)
    if vae.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work) -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
