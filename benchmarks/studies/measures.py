"""What the studies measure of a trained run beside its held-out loss, and the same of real images: the floor."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.source import open_source
from diffussm_cli.evaluation.session import EvaluationSession
from diffussm_cli.events import finish
from diffussm_cli.runs import find_run
from diffussm_cli.sampling.sampler import open_sampler

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")


def measure(root: Path, samples: int, seed: int = 0) -> dict[str, float]:
    """Measures of images drawn with the averaged weights of a run, and images/s of drawing them."""
    trained = find_run(root)
    sampler, seeds = open_sampler(trained), range(seed, seed + samples)
    labels, start = sampler.labels(seeds), time.perf_counter()
    images = torch.cat([batch for _, batch in sampler.draw(seeds, labels)])
    seconds = time.perf_counter() - start
    found = compare(trained.config, images, labels, root / f"samples-{seed}.npz")
    return found | {"samples": samples, "sampling_images_per_second": samples / seconds}


def floor(config: Config, samples: int, work: Path) -> dict[str, float]:
    """Measures of training images in place of samples: what a perfect model of the training set would get."""
    source = open_source(config)
    chosen = np.random.default_rng(0).permutation(len(source))[:samples].tolist()
    x_0, labels = source.read(chosen, [torch.Generator()] * len(chosen))
    return compare(config, ((x_0 + 1) * 127.5).round().to(torch.uint8), labels.tolist(), work / "floor.npz")


def compare(config: Config, images: Tensor, labels: list[int] | None, file: Path) -> dict[str, float]:
    """Measures of uint8 images (n, C, H, W), which are also written to `file`.

    Beside the metrics against the held-out images:

    - `asked`: the share of images to which the extractor assigns the class that was asked for, if it knows the classes.
    - `nearness`: the median distance to the nearest training image in features, over that of held-out images. It is
      near 1 for new images, and 0 for copies of training images.
    """
    session = EvaluationSession(config.eval.extractor)
    arrays = images.permute(0, 2, 3, 1).numpy()
    write_npz(file, {"arr_0": (arrays.shape, np.uint8, [arrays])})
    opened, against = session.open(str(file)), session.reference(f"{config.data.path}/held-out", None, config.data.size)
    values, gathered = finish(session.compare(opened, against, METRICS))
    training = finish(session.features(session.open(config.data.path), "training")).result.pool
    values["nearness"] = nearest(gathered.pool, training) / nearest(against.gathered.pool, training)
    logits = torch.cat([session.extractor(part).logits for part in images.split(500)])
    if labels is not None and logits.shape[1] == config.model.num_classes:
        values["asked"] = (logits.argmax(1).cpu() == torch.tensor(labels)).double().mean().item()
    return values


def nearest(features: Tensor, others: Tensor) -> float:
    """The median over features (n, d) of the distance to the nearest of the others (m, d)."""
    return torch.cdist(features.float(), others.float()).min(1).values.median().item()
