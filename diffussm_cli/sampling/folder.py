"""A folder of samples: one PNG per seed, a grid, meta.json, and an .npz on request; written by one
process or several.

The batches of seeds are always the same, so that the images depend neither on the number of
processes nor on interruptions. meta.json is written first and describes the request; its field
`complete` becomes true at the end.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffussm_cli import __version__
from diffussm_cli.config import SampleConfig, read_section
from diffussm_cli.data.arrays import write_npz
from diffussm_cli.data.images import read_image, save_grid, save_png
from diffussm_cli.data.samples import META, NPZ, file_name
from diffussm_cli.data.text import check_prompts
from diffussm_cli.errors import ConfigError, RunError, reading
from diffussm_cli.machine.files import whole_file, write_text
from diffussm_cli.machine.processes import ALONE, World
from diffussm_cli.runs import TrainedRun, dit_checkpoint
from diffussm_cli.sampling.beginning import FACTS, FIXED_FACTS
from diffussm_cli.sampling.sampler import Sampler

IMAGES = "images"
PIXEL_RULE = "floor(clamp(127.5 x + 128, 0, 255))"
GRID_IMAGES = 100
CHOICES = ("random", "balanced", "given")  # of labels
READ = 256  # images read back at a time
# The facts of meta.json that must not change when more images are drawn into a folder.
SETTINGS = tuple(f.name for f in dataclasses.fields(SampleConfig))
FIXED: tuple[str, ...] = ("weights_sha256", "objective", *SETTINGS)
FIXED += ("first_seed", "classes", "negative", "text_encoder", "vae", "decoded_by", "precision")
FIXED += ("guide_sha256", *FIXED_FACTS)


def sample_facts(
    trained: TrainedRun,
    sampler: Sampler,
    seeds: range,
    classes: Sequence[int] = (),
    prompts: Sequence[str] = (),
    negative: str | None = None,
) -> dict[str, Any]:
    """Everything that determines the images of these seeds, for meta.json. Raises ConfigError for
    wrong prompts.
    """
    check_prompts(prompts, negative, trained.config, sampler.sampling)

    config = trained.config
    foreign = trained.weights.suffix == dit_checkpoint.SUFFIX
    in_turn = "balanced" if sorted(classes) == list(range(config.model.num_classes)) else "given"
    finished = None if foreign else config.train.steps
    text_encoder = {"name": config.data.text, "sha256": config.data.text_sha256}

    return {
        "run": str(trained.root),
        "weights": trained.weights.name,
        "weights_sha256": trained.weights_sha256,
        "objective": config.diffusion.objective if foreign else None,  # as the file was read
        "step": finished if trained.step is None else trained.step,
        "ema": trained.ema,
        "ema_width": trained.mixture and trained.mixture.width,
        **dataclasses.asdict(sampler.sampling),
        "guidance_interval": list(sampler.sampling.guidance_interval) or None,
        **(sampler.guide.record if sampler.guide else {"guide": None, "guide_sha256": None}),
        **(dict.fromkeys(FACTS) | sampler.beginning.facts),
        "first_seed": seeds.start,
        "num": len(seeds),
        "classes": list(classes) or None,
        "label_choice": (in_turn if classes else "random") if config.model.num_classes else None,
        "labels": sampler.labels(seeds, classes),
        "class_names": list(config.data.class_names) or None,
        "prompts": list(prompts) or None,
        "negative": negative,
        "text_encoder": text_encoder if prompts else None,
        "reference": config.reference,
        "extractor": config.eval.extractor,
        "null_class": config.model.num_classes or None,
        "pixel_rule": PIXEL_RULE,
        **sampler.decoding.record,
        "precision": str(sampler.dtype).removeprefix("torch."),
        "device": sampler.device.type,
        "versions": {
            "diffussm": __version__,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
        },
    }


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


def prompts_of(facts: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """The prompt of each seed, all prompts in turn; empty if there are none."""
    prompts = facts["prompts"] or []
    return [prompts[(seed - facts["first_seed"]) % len(prompts)] for seed in seeds if prompts]


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


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a folder of samples, which may come from a stranger. Raises RunError for values
    without sense.
    """
    path = folder / META
    remedy = "; delete the folder to draw its images again"
    with reading(f"{path}: cannot be read", RunError, remedy):
        text = path.read_text(encoding="utf-8")
        facts = json.loads(text, parse_float=_finite, parse_constant=_finite)
    if not isinstance(facts, dict):
        raise RunError(f"{path}: is not a JSON object{remedy}")
    known = {name: value for name, value in facts.items() if value is not None}

    # The settings of sampling are checked as those of a configuration are.
    try:
        read_section("sample", {name: known[name] for name in SETTINGS if name in known})
    except ConfigError as e:
        raise RunError(f"{path}: {str(e).removeprefix('sample.')}{remedy}") from e
    for name, (is_right, words) in CHECKS.items():
        if name in known and not is_right(known[name]):
            raise RunError(f"{path}: {name}: {known[name]!r:.80} must be {words}{remedy}")
    if wrong := _contradiction(known):
        raise RunError(f"{path}: {wrong}{remedy}")
    return facts


def _contradiction(facts: Mapping[str, Any]) -> str:
    """What the labels of checked facts contradict, in words; empty if nothing."""
    labels, classes = facts.get("labels", []), facts.get("null_class")
    if labels and len(labels) != facts.get("num", len(labels)):
        return f"labels: there are {len(labels):,} of {facts['num']:,} images"
    if classes is None:
        return ""

    for name in ("labels", "classes"):
        beyond = [label for label in facts.get(name, []) if label >= classes]
        if beyond:
            return f"{name}: {beyond[0]} must be less than {classes}, the number of classes"
    names = facts.get("class_names", [])
    if names and len(names) != classes:
        return f"class_names: there are {len(names):,} of {classes:,} classes"
    return ""


def _finite(text: str) -> float:
    """A number in JSON, which Python also reads if it is NaN or infinite. Raises ValueError for
    these.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


# What must be true of facts in meta.json that others read or print, and how an error calls it.
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("run", "weights", "weights_sha256", "negative", "reference", "extractor", "image", "mask"),
        (_is_text, "text"),
    ),
    **dict.fromkeys(("grid", "film", "objective"), (_is_text, "text")),
    **dict.fromkeys(
        ("step", "first_seed", "num", "null_class"), (_is_whole, "a whole number from 0")
    ),
    **dict.fromkeys(("prompts", "class_names"), (_are_texts, "a list of texts")),
    **dict.fromkeys(("labels", "classes"), (_are_whole, "a list of labels")),
    **dict.fromkeys(("ema", "ema_width"), (_is_number, "a number")),
    "complete": (lambda value: isinstance(value, bool), "true or false"),
    "label_choice": (lambda value: value in CHOICES, " or ".join(CHOICES)),
}
