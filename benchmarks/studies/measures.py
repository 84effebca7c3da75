"""What the studies measure of a trained run beside its held-out loss, and the same of real images:
the floor.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffussm_cli.config import BUILTIN, Config
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.opening import open_held_out, open_source
from diffussm_cli.diffusion.losses import training_losses
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.evaluation.evaluator import Evaluator
from diffussm_cli.evaluation.sets import HELD_OUT, open_images
from diffussm_cli.evaluation.text import names_in
from diffussm_cli.events import finish
from diffussm_cli.machine.device import pick_device, pick_dtype
from diffussm_cli.machine.files import default_cache
from diffussm_cli.runs import find_run, load_model
from diffussm_cli.sampling.sampler import open_sampler
from diffussm_cli.training.batches import Batch
from diffussm_cli.training.measure import HeldOut
from diffussm_cli.training.record import QUARTERS

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")


def measure(root: Path, samples: int, seed: int = 0, balanced: bool = False) -> dict[str, float]:
    """Measures of images drawn with the averaged weights of a run, and images/s of drawing them.

    A run with text draws the names of its held-out images in turn. If `balanced`, a run with
    classes draws its classes in turn; otherwise a class is drawn with each seed.
    """
    trained = find_run(root)
    config = trained.config
    sampler, seeds = open_sampler(trained), range(seed, seed + samples)
    names = names_held_out(config) if config.model.text_width else []
    prompts = list(itertools.islice(itertools.cycle(names), samples))
    labels = sampler.labels(seeds, range(config.model.num_classes) if balanced else ())
    text, start = sampler.text(prompts), time.perf_counter()
    images = torch.cat([batch for _, batch in sampler.draw(seeds, labels, text)])
    seconds = time.perf_counter() - start
    measured = compare(config, images, labels, root / f"samples-{seed}.npz", prompts)
    return measured | {"samples": samples, "sampling_images_per_second": samples / seconds}


def held_out_losses(root: Path, images: int | None = None) -> dict[str, Any]:
    """The held-out loss of the averaged weights of a run: its mean, by quarter of the timesteps,
    and of each image.

    Args:
        images: number of held-out images; by default the run's own `eval.held_out_images`.
    """
    trained = find_run(root)
    config = trained.config
    if images:
        config = dataclasses.replace(
            config, eval=dataclasses.replace(config.eval, held_out_images=images)
        )
    source = open_held_out(config, open_source(config))
    assert source is not None, "the studies have held-out images"

    device = pick_device(config.train.device)
    dtype = pick_dtype(config.train.precision, device)
    model = load_model(trained).to(device)
    objective = make_objective(config.diffusion, device)
    t = config.train
    gamma = t.min_snr_gamma if t.loss_weight == "min_snr" else None
    of_each: list[Tensor] = []

    def losses(batch: Batch) -> dict[str, Tensor]:
        x_t = objective.q_sample(batch.x_0, batch.t, batch.noise)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = model(x_t, batch.t, batch.y, batch.text).float()
        known = (batch.x_0, x_t, batch.t, batch.noise)
        values = training_losses(objective, output, *known, t.mse_weight_cap, gamma)
        of_each.append(values["loss"].double().cpu().view(-1, QUARTERS).mean(1))
        return values

    means = HeldOut(source, config, device).measure(losses)
    return {
        "held_out": means["held_out"],
        "held_out_quarters": [float(f"{means[f'held_out/q{q + 1}']:.5g}") for q in range(QUARTERS)],
        "held_out_of_each": [float(f"{loss:.4g}") for loss in torch.cat(of_each).tolist()],
    }


def names_held_out(config: Config) -> list[str]:
    """The names of the held-out images of a built-in data set: each image's first caption."""
    return names_in(open_images(config.data.path + HELD_OUT, config.data.channels).captions)


def floor(config: Config, samples: int, work: Path) -> dict[str, float]:
    """Measures of training images in place of samples: what a perfect model of the training set
    would get.
    """
    source = open_source(config)
    chosen = np.random.default_rng(0).permutation(len(source))[:samples].tolist()
    x_0, labels = source.read(chosen, [torch.Generator()] * len(chosen))
    return compare(
        config, ((x_0 + 1) * 127.5).round().to(torch.uint8), labels.tolist(), work / "floor.npz"
    )


def compare(
    config: Config,
    images: Tensor,
    labels: list[int] | None,
    file: Path,
    prompts: Sequence[str] = (),
) -> dict[str, float]:
    """Measures of uint8 images (n, C, H, W), which are also written to `file`.

    Beside the metrics against `eval.reference`, by default the held-out images of a built-in data
    set:

    - `retrieval_...`: how often the images are found by their prompts, if there are prompts
    (docs/text.md).
    - `asked`: the share of images to which the extractor assigns the class that was asked for, if
    it knows the classes.
    - `nearness`: the median distance to the nearest training image in features, over that of
      held-out images. It is near 1 for new images, and 0 for copies of training images.
    """
    evaluator = Evaluator(config.eval.extractor, cache=default_cache())
    arrays = images.permute(0, 2, 3, 1).numpy()
    write_npz(file, {"arr_0": (arrays.shape, np.uint8, [arrays])})
    held_out = config.data.path + HELD_OUT if config.data.path.startswith(BUILTIN) else None
    opened = evaluator.open(str(file))
    against = evaluator.reference(
        config.eval.reference or held_out or config.data.path, None, config.data.size
    )
    values, gathered = finish(evaluator.compare(opened, against, METRICS))
    if prompts:
        values |= finish(evaluator.prompted(gathered, prompts, against.images))
    if held_out:
        training = finish(evaluator.features(evaluator.open(config.data.path), "training")).pool
        values["nearness"] = nearest(gathered.pool, training) / nearest(
            against.gathered.pool, training
        )
    if labels is not None and gathered.classes is not None and evaluator.name == "digits":
        logits = torch.cat([evaluator.extractor(part).logits for part in images.split(500)])
        values["asked"] = (logits.argmax(1).cpu() == torch.tensor(labels)).double().mean().item()
    return values


def nearest(features: Tensor, others: Tensor) -> float:
    """The median over features (n, d) of the distance to the nearest of the others (m, d)."""
    return torch.cdist(features.float(), others.float()).min(1).values.median().item()
