"""Time and memory of the evaluation at full size, with an Inception of random weights in place of
the published ones.

    python benchmarks/speed/inception.py [--images 500] [--size 256] [--samples 50000]

Features of `--images` synthetic images are timed and scaled to `--samples`; the metrics are
computed in full, of synthetic features of that many samples against 10,000. Prints one JSON object;
memory is the process's peak.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch_fidelity import feature_extractor_inceptionv3 as module

from diffussm_cli.data.arrays import write_npz
from diffussm_cli.evaluation.comparison import METRICS, evaluate_features
from diffussm_cli.evaluation.extractors import Extractor
from diffussm_cli.evaluation.features import Gathered, gather_features
from diffussm_cli.evaluation.metrics import Moments, SplitSums
from diffussm_cli.evaluation.networks import load_inception
from diffussm_cli.evaluation.reference import Reference
from diffussm_cli.evaluation.sets import open_images
from diffussm_cli.events import finish


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=50_000)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(Path(folder) / "weights.pth")
        extractor = Extractor(*load_inception(weights), torch.device("cpu"))
        path, rng = Path(folder) / "images.npz", np.random.default_rng(0)
        shape = (a.images, a.size, a.size, 3)
        blocks = (rng.integers(0, 256, (1, *shape[1:]), np.uint8) for _ in range(a.images))
        write_npz(path, {"arr_0": (shape, np.uint8, blocks)})
        start = time.perf_counter()
        finish(gather_features(open_images(str(path), 3), extractor, 32))
        seconds = time.perf_counter() - start
    result = {
        "features_s": seconds,
        "scaled_to_samples_s": seconds / a.images * a.samples,
        "peak_gib": peak_gib(),
    }
    result["metrics"] = metrics(a.samples)
    print(json.dumps(result))


def peak_gib() -> float:
    """Peak resident memory of this process (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def metrics(n: int) -> dict[str, float]:
    """Seconds of each metric of n random features against 10,000, and the peak after it."""
    generator = torch.Generator().manual_seed(0)
    samples, pool = synthetic(n, generator), synthetic(10_000, generator)
    reference = Reference("synthetic", None)
    reference.complete(pool)
    seconds, start = {}, time.perf_counter()
    for name, _ in evaluate_features(samples, reference, METRICS):
        seconds[name], start = time.perf_counter() - start, time.perf_counter()
    return seconds | {"peak_gib": peak_gib()}


def synthetic(n: int, generator: torch.Generator) -> Gathered:
    pool = torch.rand(n, 2048, generator=generator)
    sums = SplitSums.empty(n, 1008)
    sums.add(0, torch.randn(n, 1008, generator=generator))
    return Gathered(pool, Moments.of(torch.rand(4000, 2023, generator=generator)), sums)


def random_weights(path: Path) -> Path:
    """A file as torch-fidelity downloads it, with random numbers in it."""
    kept, load = {}, torch.load
    original = module.FeatureExtractorInceptionV3.load_state_dict
    module.FeatureExtractorInceptionV3.load_state_dict = lambda self, *_: kept.update(
        torch.nn.Module.state_dict(self)
    )
    torch.load = lambda *_, **__: {}
    module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="none")
    module.FeatureExtractorInceptionV3.load_state_dict, torch.load = original, load
    torch.save(kept, path)
    return path


if __name__ == "__main__":
    main()
