"""A folder of samples: one PNG a seed, a grid, meta.json, on request an .npz; drawn by one process or several.

Seeds are drawn in the same batches whoever draws them, so that images depend neither on the number of processes nor on
interruptions. meta.json comes first and says what is being drawn; `complete` in it is true when all is there.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from diffussm_cli import __version__, published, runs
from diffussm_cli.config import SampleConfig
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.images import read_image, save_grid, save_png, to_uint8
from diffussm_cli.data.vae import open_decoding
from diffussm_cli.device import keep_freed_memory, pick_device, pick_dtype
from diffussm_cli.diffusion.process import GaussianDiffusion
from diffussm_cli.distributed import ALONE, Share
from diffussm_cli.errors import RunError
from diffussm_cli.files import sha256, whole_file
from diffussm_cli.generation import cast_products, generate, labels_of

META, GRID, NPZ = "meta.json", "grid.png", "samples.npz"
PIXEL_RULE = "floor(clamp(127.5 x + 128, 0, 255))"
GRID_IMAGES = 100
READ = 256  # images read back at a time
# What of meta.json must be the same when more is drawn into a folder.
FIXED = (
    "weights_sha256",
    "sampler",
    "steps",
    "guidance",
    "guidance_channels",
    "guidance_interval",
    "clip",
    "first_seed",
    "classes",
    "vae",
    "decoded_by",
    "precision",
)


class Sampler:
    """A trained run, ready to draw. `warning` is for the user.

    Args:
        how: sampler, steps and guidance.
        classes: labels in turn, from the first seed on; if empty, each seed draws its own.
    """

    def __init__(
        self,
        trained: runs.TrainedRun,
        how: SampleConfig,
        classes: Sequence[int] = (),
        batch_size: int = 64,
        precision: str = "fp32",
        device: str = "auto",
    ):
        keep_freed_memory()
        self.trained, self.how, self.classes, self.batch_size = trained, how, tuple(classes), batch_size
        self.device = pick_device(device)
        self.dtype = pick_dtype(precision, self.device)
        self.model = runs.load_model(trained).to(self.device)
        cast_products(self.model, self.dtype)
        self.decoding = open_decoding(trained.config, self.device)
        self.warning = self.decoding.warning
        self.process = GaussianDiffusion.from_config(trained.config.diffusion, self.device)

    def labels(self, seeds: range) -> list[int] | None:
        """The label of each seed, of seeds from the first one on; None for an unconditional model."""
        n = self.trained.config.model.num_classes
        if not n:
            return None
        return [self.classes[i % len(self.classes)] for i in range(len(seeds))] if self.classes else labels_of(seeds, n)

    def draw(self, seeds: Sequence[int], labels: Sequence[int] | None) -> Iterator[tuple[list[int], Tensor]]:
        """Yield seeds and their images, uint8 (B, C, H, W), batch by batch."""
        for drawn in generate(self.model, self.process, self.how, seeds, labels, self.batch_size, self.dtype):
            yield drawn.seeds, to_uint8(self.decoding.decode(drawn.images))

    def facts(self, seeds: range) -> dict[str, Any]:
        """What decides these images, for meta.json."""
        trained, config = self.trained, self.trained.config
        foreign = trained.weights.suffix == published.SUFFIX
        finished = None if foreign else config.train.steps
        return {
            "run": str(trained.root),
            "weights": trained.weights.name,
            "weights_sha256": sha256(trained.weights),
            "step": finished if trained.step is None else trained.step,
            "ema": None if foreign else config.train.ema,
            **dataclasses.asdict(self.how),
            "guidance_interval": list(self.how.guidance_interval) or None,
            "first_seed": seeds.start,
            "num": len(seeds),
            "classes": list(self.classes) or None,
            "labels": self.labels(seeds),
            "class_names": list(config.data.class_names) or None,
            "null_class": config.model.num_classes or None,
            "pixel_rule": PIXEL_RULE,
            **self.decoding.record,
            "precision": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "versions": {"diffussm": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        }


@dataclass(frozen=True)
class SampleFolder:
    """Where the images of a request go; `facts` are the sampler's for these seeds. Errors of the disk are OSError."""

    path: Path
    sampler: Sampler
    seeds: range
    facts: dict[str, Any]

    def begin(self) -> None:
        """Say in meta.json what is being drawn.

        Raises:
            RunError: if the folder holds images of another request.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        refuse_others(self.path, self.facts)
        self._write_meta(complete=False)

    def missing(self, share: Share = ALONE) -> list[range]:
        """The batches of this process of which an image is still to be drawn."""
        size = self.sampler.batch_size
        every = [self.seeds[i : i + size] for i in range(0, len(self.seeds), size)]
        wanting = [batch for batch in every if not all(self.file(seed).is_file() for seed in batch)]
        return wanting[share.rank :: share.of]

    def draw(self, batches: Sequence[range]) -> Iterator[int]:
        """Draw and write what batches lack, yielding the number of seeds done; every file appears whole."""
        labels = self.facts["labels"]
        for batch in batches:
            own = labels and [labels[seed - self.seeds.start] for seed in batch]
            for seeds, images in self.sampler.draw(batch, own):
                for seed, image in zip(seeds, images):
                    if not self.file(seed).is_file():
                        with whole_file(self.file(seed), durable=False) as file:
                            save_png(image, file)
                yield len(seeds)

    def finish(self, grid: Path, npz: bool) -> None:
        """Grid of the first images, .npz of all on request, and meta.json."""
        shown = torch.cat([torch.from_numpy(b) for b in self.read(self.seeds[:GRID_IMAGES])]).permute(0, 3, 1, 2)
        grid.parent.mkdir(parents=True, exist_ok=True)
        save_grid(shown, grid, columns=10 if len(shown) >= 10 else int(np.ceil(len(shown) ** 0.5)))
        if npz:
            write_npz(self.path / NPZ, self._arrays(shown.permute(0, 2, 3, 1).shape[1:]))
        self._write_meta(complete=True)

    def _arrays(self, shape: Sequence[int]) -> dict[str, tuple]:
        """Images in NHWC as `arr_0`, as the ADM evaluation reads them, and labels as `arr_1` if there are any."""
        labels = self.facts["labels"]
        arrays = {"arr_0": ((len(self.seeds), *shape), np.uint8, self.read(self.seeds))}
        return arrays | ({"arr_1": ((len(labels),), np.int64, [np.array(labels)])} if labels else {})

    def read(self, seeds: range) -> Iterator[np.ndarray]:
        """Images read back, uint8 (n, H, W, C), up to 256 at a time."""
        channels = 1 if self.sampler.trained.config.data.is_grey else 3
        for i in range(0, len(seeds), READ):
            yield np.stack([read_image(self.file(seed), None, channels) for seed in seeds[i : i + READ]])

    def file(self, seed: int) -> Path:
        """The PNG of a seed."""
        return self.path / f"{seed:06d}.png"

    def _write_meta(self, complete: bool) -> None:
        with whole_file(self.path / META) as file:
            file.write((json.dumps(self.facts | {"complete": complete}, indent=1) + "\n").encode())


def refuse_others(folder: Path, facts: dict[str, Any]) -> None:
    """Raises RunError if `folder` holds images that were drawn in another way."""
    if not (folder / META).is_file():
        if any(folder.glob("*.png")):
            raise RunError(f"--out: {str(folder)!r} holds images without {META}; name another folder")
        return
    before = read_meta(folder)
    for key in FIXED:
        if before.get(key) != facts[key]:
            raise RunError(
                f"--out: {str(folder)!r} holds images of another request: {key} was {before.get(key)!r} and is now "
                f"{facts[key]!r}; name another folder"
            )


def free_folder(root: Path, facts: dict[str, Any]) -> Path:
    """The first of ROOT/images, ROOT/images-2, ... that is free or holds images of the same request."""
    for i in range(1, 10_000):
        folder = root / ("images" if i == 1 else f"images-{i}")
        try:
            refuse_others(folder, facts)
        except RunError:
            continue
        return folder
    raise RunError(f"--out: {str(root)!r} is full of folders of images; name one")


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a folder of samples. Raises RunError."""
    try:
        found = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise RunError(f"{folder / META}: cannot be read: {e}; delete the folder to draw its images again") from e
    if not isinstance(found, dict):
        raise RunError(f"{folder / META}: holds no facts about samples; delete the folder to draw its images again")
    return found
