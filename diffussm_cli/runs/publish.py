"""What makes `final/` useful to others: a model card, as the hub reads it, and a pipeline that
diffusers loads.
"""

import json
import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffussm_cli import __version__
from diffussm_cli.config import BUILTIN, Config
from diffussm_cli.diffusion.flow import MeanFlow
from diffussm_cli.diffusion.integrators import INTEGRATORS
from diffussm_cli.diffusion.objectives import make_objective
from diffussm_cli.diffusion.schedulers import scheduler_settings
from diffussm_cli.runs.layout import CARD, CONFIG, IMAGE, LOG, SAMPLES

CODE = '''"""The pipeline for diffusers. All code is in the package diffussm."""

try:
    from diffussm_cli.sampling.pipeline import Denoiser, DiffuSSMPipeline  # noqa: F401
except ModuleNotFoundError as e:
    raise ImportError("this model needs the package diffussm: pip install . in a clone of it") from e
'''  # noqa: E501
HUB_DATA = {"builtin:mnist": "ylecun/mnist"}
UNKNOWN = (
    "Not filled in: licence of the training data, intended use, limitations. Complete this before "
    "you publish it, and choose a licence in the first lines of this file."
)
USE = """## Use

    diffussm sample OWNER/NAME{option}

or in Python, with the package diffussm (`pip install .` in a clone of it). `trust_remote_code` runs `pipeline.py`,
which only imports that package:

```python
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

pipe = DiffusionPipeline.from_pretrained("OWNER/NAME", trust_remote_code=True)  # a folder works too
# {beside}
image = pipe({argument}generator=torch.Generator().manual_seed(0)).images[0]
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
images = pipe({argument}batch_size=8, num_inference_steps=20).images
```
"""  # noqa: E501


def files_to_publish(root: Path, config: Config, step: int, parameters: int) -> dict[str, bytes]:
    """The files that `final/` of the run at `root` holds beside its weights and configuration, by
    name.
    """
    preview = root / SAMPLES / f"step-{step:08d}.png"
    images = {IMAGE: preview.read_bytes()} if preview.is_file() else {}

    # The card, with the scores of this step if it was evaluated.
    scores = last_scores(root, step)
    measured = ""
    if scores:
        steps = min(config.sample.steps, config.eval.steps)
        e = config.eval
        measured = f"Of {e.images:,} images in {steps} steps, by `diffussm train --eval-every`.\n"
    card = model_card(config, step, parameters, scores, measured, image=bool(images))
    return {CARD: card.encode(), **images, **pipeline_files(config)}


def pipeline_files(config: Config) -> dict[str, bytes]:
    """The files that diffusers reads, by name."""
    sampler = config.sample.sampler
    made_by = {"_diffusers_version": version("diffusers")}
    objective = make_objective(config.diffusion)
    learned = config.model.learn_sigma
    sampler = "dpmpp" if sampler in INTEGRATORS else sampler  # diffusers has none of those

    kind, options = scheduler_settings(sampler, objective, learned)
    if isinstance(objective, MeanFlow):  # the solvers' noise ends at 1 - 1/T
        kind, options = "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": objective.T}
    index = {"_class_name": ["pipeline", "DiffuSSMPipeline"], **made_by}
    index |= {"denoiser": ["denoiser", "Denoiser"], "scheduler": ["diffusers", kind]}
    settings: dict[str, Any] = {"model_index.json": index}
    settings["scheduler/scheduler_config.json"] = {"_class_name": kind, **made_by, **options}

    code = {"pipeline.py": CODE.encode(), "denoiser/denoiser.py": CODE.encode()}
    return code | {
        name: (json.dumps(values, indent=2) + "\n").encode() for name, values in settings.items()
    }


def model_card(
    config: Config,
    step: int,
    parameters: int,
    scores: Mapping[str, float] | None = None,
    measured: str = "",
    notes: str = UNKNOWN,
    license: str = "unknown",
    image: bool = False,
) -> str:
    """README.md of a model, with the header that the hub reads.

    Args:
        scores: metrics by name; `measured` says of what.
        notes: the data with their licences, limits, and whatever else a reader must know.
        image: whether a file with samples lies beside it.
    """
    import huggingface_hub as hub

    d, m, t, s = config.data, config.model, config.train, config.sample
    preset = config.preset or "diffussm"

    # The header, which the hub reads.
    data = d.path if d.path.startswith(BUILTIN) else Path(d.path).name
    measured_on = HUB_DATA.get(d.path, data.removeprefix(BUILTIN)), data.removeprefix(BUILTIN)
    task = "text-to-image" if m.text_width else "unconditional-image-generation"
    results = [
        hub.EvalResult(task, *measured_on, metric, round(value, 4))
        for metric, value in (scores or {}).items()
    ]
    conditional = (
        "text-conditional"
        if m.text_width
        else "class-conditional"
        if m.num_classes
        else "unconditional"
    )
    header = hub.ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=task,
        tags=["diffussm", "diffusion", "image-generation", "state-space-model", conditional],
        datasets=[HUB_DATA[d.path]] if d.path in HUB_DATA else None,
        model_name=preset,
        eval_results=results or None,
    )

    # What it is, and how it was trained.
    kind = "DiT" if m.backbone == "dit" else "[DiffuSSM](https://arxiv.org/abs/2311.18257)"
    facts = {
        "Data": f"{plain(data)}, {d.size[0]}x{d.size[1]} pixels"
        + (f", as latents of {plain(d.vae)}" if d.vae else ""),
        "Training": f"{step:,} steps of {t.batch_size} images, learning rate {t.lr:g}, "
        f"seed {t.seed}",
        "Objective": config.diffusion.objective,
        "Weights": f"averaged with decay {t.ema[0]:g}" if t.ema else "averaged",
        "Drawn with": f"{s.sampler}, {s.steps} steps, guidance {s.guidance:g}",
        "Made by": f"diffussm {__version__}, preset {plain(config.preset) or 'none'}",
    }

    parts = [f"---\n{header.to_yaml()}\n---\n\n# {plain(preset)}\n"]
    parts += [f"![Images that the model drew]({IMAGE})\n"] if image else []
    parts += [
        f"{'An' if conditional == 'unconditional' else 'A'} {conditional} {kind} "
        f"with {parameters:,} parameters.\n"
    ]
    parts += [table({"": "", **facts}) + f"\n`{CONFIG}` holds the whole configuration.\n"]

    # How to use it, and what it reached.
    option, argument = (
        (' --prompt "red heart"', 'prompt="red heart", ') if m.text_width else ("", "")
    )
    beside = "the same image as `diffussm sample --seed 0 --precision fp32`"
    if s.sampler in INTEGRATORS and not config.diffusion.in_one_step:
        beside = f"by DPM-Solver++: diffusers does not have {s.sampler}, by which diffussm draws"
    parts += [USE.format(option=option, argument=argument, beside=beside)]
    if scores:
        numbers = {metric: f"{value:.4g}" for metric, value in scores.items()}
        parts += [f"## Metrics\n\n{measured}\n" + table({"Metric": "Value", **numbers})]
    return "\n".join([*parts, f"## Data and limits\n\n{notes}\n"])


def plain(text: str) -> str:
    """A name in Markdown, as it stands: neither markup nor HTML, and on one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$@])", r"\\\1", " ".join(text.split()))


def table(rows: Mapping[str, str]) -> str:
    """A Markdown table of two columns; the first row is its header."""
    first, *lines = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join([first, "|---|---|", *lines]) + "\n"


def last_scores(root: Path, step: int) -> dict[str, float]:
    """The metrics of the first average that training measured at its last step; empty if it
    measured none.
    """
    try:
        records = [
            json.loads(line) for line in (root / LOG).read_text(encoding="utf-8").splitlines()
        ]
        last = [r for r in records if r["step"] == step][-1]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}

    scores = {
        k.removeprefix("eval/"): v
        for k, v in last.items()
        if k.startswith("eval/") and "@" not in k
    }
    return {k: v for k, v in scores.items() if isinstance(v, float) and math.isfinite(v)}
