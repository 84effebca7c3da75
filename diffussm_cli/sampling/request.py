"""What a request for images is: everything that determines them, as meta.json says it. Another file
of this kind may come from a stranger, so it is checked when it is read.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from diffussm_cli import __version__
from diffussm_cli.config import SampleConfig, read_section
from diffussm_cli.data.samples import META
from diffussm_cli.data.text import check_prompts
from diffussm_cli.errors import ConfigError, RunError, reading
from diffussm_cli.runs import TrainedRun, dit_checkpoint
from diffussm_cli.sampling.beginning import FACTS, FIXED_FACTS
from diffussm_cli.sampling.sampler import Sampler

PIXEL_RULE = "floor(clamp(127.5 x + 128, 0, 255))"
CHOICES = ("random", "balanced", "given")  # of labels
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


def prompts_of(facts: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """The prompt of each seed, all prompts in turn; empty if there are none."""
    prompts = facts["prompts"] or []
    return [prompts[(seed - facts["first_seed"]) % len(prompts)] for seed in seeds if prompts]


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
