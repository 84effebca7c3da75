"""How fast a store is read, warm and in random order, and how large it is.

    python benchmarks/speed/latents.py [--images 16384] [--shard-size 1024]

Writes a store of random numbers (4x32x32, mean and deviation, plain and mirrored) without a VAE,
then reads batches: `moments` is the reading alone, `read` draws from the posterior as training
does. Prints one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from diffussm_cli.data.latents import shard as shards
from diffussm_cli.data.latents.manifest import StoreSettings
from diffussm_cli.data.latents.reading import LatentStore
from diffussm_cli.data.latents.store import begin
from diffussm_cli.data.listing import Entry, Listing
from diffussm_cli.machine.tensors import file_size

IMAGENET = 1_281_167


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        settings = write_store(Path(folder), a.images, a.shard_size)
        store = LatentStore(Path(folder), flip=True)
        on_disk = sum(p.stat().st_size for p in Path(folder).glob("shard-*"))
        rng = np.random.default_rng(0)
        generators = [torch.Generator().manual_seed(i) for i in range(a.batch_size)]
        mirrored = rng.random(a.batch_size) < 0.5
        batches = [rng.permutation(a.images)[: a.batch_size] for _ in range(64)]
        rate = {
            "moments": lambda b: store.moments(b, mirrored),
            "read": lambda b: store.read(b, generators),
        }
        rates = {name: rates_of(work, batches, a.rounds) for name, work in rate.items()}
    result = {
        "latents_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "rounds": rates,
        "images": a.images,
        "shard_size": a.shard_size,
        "batch_size": a.batch_size,
        "threads": torch.get_num_threads(),
        "bytes_on_disk": on_disk,
        "bytes_computed": bytes_of(settings),
        "imagenet_256_bytes": imagenet_bytes(32),
        "imagenet_512_bytes": imagenet_bytes(64),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    print(json.dumps(result))


def make_settings(images: int, side: int, shard_size: int) -> StoreSettings:
    resolution, per_channel = (8 * side, 8 * side), ((1.0,) * 4, (0.0,) * 4)
    return StoreSettings(
        "", images, (), resolution, "none", "", "", 4, 8, *per_channel, True, "fp32", 1, shard_size
    )


def write_store(folder: Path, images: int, shard_size: int) -> StoreSettings:
    """Random moments in the format of a store."""
    settings = make_settings(images, 32, shard_size)
    listing = Listing(folder, [Entry(str(i), 0, 0) for i in range(images)], (), [])
    begin(folder, listing, settings)
    rng = np.random.default_rng(0)
    for shard in range(settings.shards):
        arrays = shards.empty_shard(settings, shard)
        for name in arrays:
            if name.startswith(("mean", "std")):
                arrays[name][:] = rng.standard_normal(arrays[name].shape, np.float32)
        arrays["readable"][:] = 1
        shards.write_shard(folder, settings, shard, arrays, [])
    return settings


def rates_of(work, batches: list, rounds: int) -> list[float]:
    """Latents a second of each round, after one that warms up."""
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for batch in batches:
            work(batch)
        rates.append(sum(map(len, batches)) / (time.perf_counter() - start))
    return rates[1:]


def bytes_of(settings: StoreSettings) -> int:
    """What all shards take, by the layout."""
    return sum(file_size(shards.layout(settings, i)) for i in range(settings.shards))


def imagenet_bytes(side: int) -> int:
    """All of ImageNet's training images as 4 x side x side latents, mirrored ones too, in shards of
    4096.
    """
    return bytes_of(make_settings(IMAGENET, side, 4096))


if __name__ == "__main__":
    main()
