"""A folder of samples: one PNG per seed, a grid, meta.json, and an .npz on request; written by one
process or several.

The batches of seeds are always the same, so that the images depend neither on the number of
processes nor on interruptions. meta.json is written first and describes the request; its field
`complete` becomes true at the end.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.images import read_image, save_grid, save_png
from diffussm_cli.data.samples import META, NPZ, file_name
from diffussm_cli.errors import RunError
from diffussm_cli.machine.files import whole_file, write_text
from diffussm_cli.machine.processes import ALONE, World
from diffussm_cli.sampling.request import FIXED, prompts_of, read_meta
from diffussm_cli.sampling.sampler import Sampler

IMAGES = "images"
GRID_IMAGES = 100
READ = 256  # images read back at a time


@dataclass(frozen=True)
class SampleFolder:
    """The folder for the images of a request; `facts` come from `sample_facts`. A full disk raises
    OSError.
    """

    path: Path
    sampler: Sampler
    seeds: range
    facts: Mapping[str, Any]

    def begin(self) -> None:
        """Write meta.json, which describes the request.

        Raises:
            RunError: if the folder holds images of another request.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        check_same_request(self.path, self.facts)
        self._write_meta(complete=False)

    def missing(self, world: World = ALONE) -> list[range]:
        """The batches of this process that still lack an image."""
        size = self.sampler.batch_size
        every = [self.seeds[i : i + size] for i in range(0, len(self.seeds), size)]
        with os.scandir(self.path) as entries:  # an empty file is what a power failure may leave
            existing = {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}
        incomplete = [
            batch for batch in every if not all(file_name(seed) in existing for seed in batch)
        ]
        return incomplete[world.rank :: world.size]

    def draw(self, batches: Sequence[range]) -> Iterator[int]:
        """Draw the batches and write the images that are missing; yields the number of seeds
        done.
        """
        labels = self.facts["labels"]
        for batch in batches:
            batch_labels = labels and [labels[seed - self.seeds.start] for seed in batch]
            text = self.sampler.text(prompts_of(self.facts, batch), self.facts["negative"])

            for seeds, images in self.sampler.draw(batch, batch_labels, text):
                for seed, image in zip(seeds, images):
                    if not self._is_drawn(seed):
                        with whole_file(self.file(seed), durable=False) as file:
                            save_png(image, file, *prompts_of(self.facts, [seed]))
                yield len(seeds)

    def _is_drawn(self, seed: int) -> bool:
        file = self.file(seed)
        return file.is_file() and file.stat().st_size > 0

    def finish(self, grid: Path, npz: bool) -> None:
        """Write the grid of the first images, the .npz of all images if `npz`, and the final
        meta.json.
        """
        first = self.seeds[:GRID_IMAGES]
        shown = torch.cat([torch.from_numpy(b) for b in self.read(first)]).permute(0, 3, 1, 2)
        grid.parent.mkdir(parents=True, exist_ok=True)
        columns = 10 if len(shown) >= 10 else int(np.ceil(len(shown) ** 0.5))
        if 1 < len(self.facts["prompts"] or ()) <= columns:
            columns = len(self.facts["prompts"])  # one prompt per column
        save_grid(shown, grid, columns, prompts_of(self.facts, first))

        if npz:
            write_npz(self.path / NPZ, self._arrays(shown.permute(0, 2, 3, 1).shape[1:]))
        self._write_meta(complete=True)

    def _arrays(self, shape: Sequence[int]) -> dict[str, tuple]:
        """Images in NHWC as `arr_0`, as the ADM evaluation expects, and labels as `arr_1` if there
        are any.
        """
        labels = self.facts["labels"]
        arrays = {"arr_0": ((len(self.seeds), *shape), np.uint8, self.read(self.seeds))}
        return arrays | (
            {"arr_1": ((len(labels),), np.int64, [np.array(labels)])} if labels else {}
        )

    def read(self, seeds: range) -> Iterator[np.ndarray]:
        """Read images back, uint8 (n, H, W, C), up to 256 at a time. Raises RunError for an image
        of another size.
        """
        for i in range(0, len(seeds), READ):
            yield np.stack([self._image(seed) for seed in seeds[i : i + READ]])

    def _image(self, seed: int) -> np.ndarray:
        data = self.sampler.config.data
        image = read_image(self.file(seed), None, 1 if data.is_grey else 3)
        if image.shape[:2] != data.size:
            size = f"{image.shape[0]}x{image.shape[1]}"
            raise RunError(
                f"{self.file(seed)}: is {size}, not an image of this run; "
                "delete it to draw it again"
            )
        return image

    def file(self, seed: int) -> Path:
        """The PNG of a seed."""
        return self.path / file_name(seed)

    def _write_meta(self, complete: bool) -> None:
        write_text(
            self.path / META, json.dumps({**self.facts, "complete": complete}, indent=1) + "\n"
        )


def check_same_request(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raises RunError if `folder` holds images that were drawn with other settings."""
    if not (folder / META).is_file():
        if any(folder.glob("*.png")):
            raise RunError(
                f"--out: {str(folder)!r} holds images without {META}; name another folder"
            )
        return

    before = read_meta(folder)
    for key in FIXED:
        if before.get(key) != facts[key]:
            raise RunError(
                f"--out: {str(folder)!r} holds images of another request: "
                f"{key} was {before.get(key)!r} and is now {facts[key]!r}; name another folder"
            )


def free_folder(root: Path, facts: Mapping[str, Any]) -> Path:
    """The first of ROOT/images, ROOT/images-2, ... that is free or holds images of the same
    request.
    """
    for i in range(1, 10_000):
        folder = root / (IMAGES if i == 1 else f"{IMAGES}-{i}")
        try:
            check_same_request(folder, facts)
        except RunError:
            continue
        return folder
    raise RunError(f"--out: {str(root)!r} has no free name for a folder of images; name one")
