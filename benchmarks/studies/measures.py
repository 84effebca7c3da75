"""What the studies measure of a trained run beside its held-out loss, and the same of real images: the floor."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import Config
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.source import BUILTIN, open_source
from diffussm_cli.evaluation.session import EvaluationSession
from diffussm_cli.evaluation.sets import HELD_OUT, open_images
from diffussm_cli.evaluation.text import names_in
from diffussm_cli.events import finish
from diffussm_cli.machine.files import default_cache
from diffussm_cli.runs import find_run
from diffussm_cli.sampling.sampler import open_sampler

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")


def measure(root: Path, samples: int, seed: int = 0) -> dict[str, float]:
    """Measures of images drawn with the averaged weights of a run, and images/s of drawing them.

    A run with text draws the names of its held-out images in turn.
    """
    trained = find_run(root)
    sampler, seeds = open_sampler(trained), range(seed, seed + samples)
    names = names_held_out(trained.config) if trained.config.model.text_width else []
    prompts = list(itertools.islice(itertools.cycle(names), samples))
    labels, text, start = sampler.labels(seeds), sampler.text(prompts), time.perf_counter()
    images = torch.cat([batch for _, batch in sampler.draw(seeds, labels, text)])
    seconds = time.perf_counter() - start
    found = compare(trained.config, images, labels, root / f"samples-{seed}.npz", prompts)
    return found | {"samples": samples, "sampling_images_per_second": samples / seconds}


def names_held_out(config: Config) -> list[str]:
    """The names of the held-out images of a built-in data set: each image's first caption."""
    return names_in(open_images(config.data.path + HELD_OUT, config.data.channels).captions)


def floor(config: Config, samples: int, work: Path) -> dict[str, float]:
    """Measures of training images in place of samples: what a perfect model of the training set would get."""
    source = open_source(config)
    chosen = np.random.default_rng(0).permutation(len(source))[:samples].tolist()
    x_0, labels = source.read(chosen, [torch.Generator()] * len(chosen))
    return compare(config, ((x_0 + 1) * 127.5).round().to(torch.uint8), labels.tolist(), work / "floor.npz")


def compare(
    config: Config, images: Tensor, labels: list[int] | None, file: Path, prompts: Sequence[str] = ()
) -> dict[str, float]:
    """Measures of uint8 images (n, C, H, W), which are also written to `file`.

    Beside the metrics against `eval.reference`, by default the held-out images of a built-in data set:

    - `retrieval_...`: how often the images are found by their prompts, if there are prompts (docs/text.md).
    - `asked`: the share of images to which the extractor assigns the class that was asked for, if it knows the classes.
    - `nearness`: the median distance to the nearest training image in features, over that of held-out images. It is
      near 1 for new images, and 0 for copies of training images.
    """
    session = EvaluationSession(config.eval.extractor, cache=default_cache())
    arrays = images.permute(0, 2, 3, 1).numpy()
    write_npz(file, {"arr_0": (arrays.shape, np.uint8, [arrays])})
    own = config.data.path + HELD_OUT if config.data.path.startswith(BUILTIN) else None
    opened = session.open(str(file))
    against = session.reference(config.eval.reference or own or config.data.path, None, config.data.size)
    values, gathered = finish(session.compare(opened, against, METRICS))
    if prompts:
        values |= finish(session.prompted(gathered, prompts, against.images))
    if own:
        training = finish(session.features(session.open(config.data.path), "training")).pool
        values["nearness"] = nearest(gathered.pool, training) / nearest(against.gathered.pool, training)
    if labels is not None and gathered.classes is not None and session.name == "digits":
        logits = torch.cat([session.extractor(part).logits for part in images.split(500)])
        values["asked"] = (logits.argmax(1).cpu() == torch.tensor(labels)).double().mean().item()
    return values


def nearest(features: Tensor, others: Tensor) -> float:
    """The median over features (n, d) of the distance to the nearest of the others (m, d)."""
    return torch.cdist(features.float(), others.float()).min(1).values.median().item()
