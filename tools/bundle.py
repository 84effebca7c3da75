"""Put a run into the package, so that `diffussm sample NAME` works right after installation.

    python tools/bundle.py RUN NAME [--sampler dpmpp --steps 20]

Weights are stored as bfloat16, except for the parameters of the state space layers and all vectors,
which stay float32.
Then the tool measures the stored model and writes its card: metrics of --num samples against
held-out digits, the share that a classifier takes for the requested digit, how far rounding moves
the samples, and the mean and spread of a quick score, which a test measures again. Of a run with
text it measures how often prompts for emoji are drawn recognisably.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffussm_cli import runs
from diffussm_cli.config import Config, SampleConfig
from diffussm_cli.evaluation import evaluate
from diffussm_cli.events import finish
from diffussm_cli.model.mixer import StateSpace
from diffussm_cli.model.mixers import MIXERS
from diffussm_cli.runs.hub import BUNDLED
from diffussm_cli.runs.layout import CARD, IMAGE
from diffussm_cli.sampling import sample
from diffussm_cli.sampling.sampler import open_sampler

ROOT = Path(__file__).parents[1]
USUAL = ("fid", "sfid", "is", "precision", "recall", "kid")
QUICK, BLOCKS, QUICK_IMAGES = {"sampler": "dpmpp", "steps": 8}, 10, 300
STATE_SPACES = [name for name, mixer in MIXERS.items() if issubclass(mixer, StateSpace)]
PROMPTS = [
    "red heart",
    "smiling face",
    "flag of France",
    "sun",
    "green apple",
    "woman with red hair",
    "blue flower",
]
USE = """## Use

This model comes with the package diffussm:

    diffussm sample {name}{prompt}

The folder has no pipeline for diffusers; `final/` of a run that you train has one.

"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument(
        "--notes", type=Path, help="data, licences and limits; default: tools/cards/NAME.md"
    )
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--sampler", help="default: the run's; the stored configuration names it")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--num", type=int, default=2000, help="number of samples")
    parser.add_argument("--out", type=Path, default=BUNDLED)
    a = parser.parse_args()
    trained, folder = runs.find_run(a.run), a.out / a.name
    settings = {k: v for k, v in {"sampler": a.sampler, "steps": a.steps}.items() if v is not None}
    s = dataclasses.replace(trained.config.sample, **settings)
    config = dataclasses.replace(trained.config, sample=s)
    weights = {
        name: stored(name, tensor) for name, tensor in runs.read_tensors(trained.weights).items()
    }
    step = config.train.steps if trained.step is None else trained.step

    with tempfile.TemporaryDirectory() as place:
        draft = Path(place) / a.name
        runs.write_weights(draft, config, weights, step)
        print(f"{(draft / runs.MODEL).stat().st_size:,} bytes of weights", flush=True)
        subjects = {"prompts": PROMPTS} if config.data.text else {"classes": range(10)}
        drawing = sample(draft, draft / "images", 40, **subjects, precision="fp32")
        grid = finish(drawing).read_bytes()
        numbers, notes, measured = (
            checked_text(draft) if config.data.text else checked(trained, draft, s, a.num)
        )
    notes = (a.notes or ROOT / "tools" / "cards" / f"{a.name}.md").read_text(
        encoding="utf-8"
    ).strip() + notes
    commit = output("git", "-C", ROOT, "describe", "--always", "--dirty").strip()
    notes += f"\n\nCommit {commit}, torch {torch.__version__}."
    scores = {k: v for k, v in numbers.items() if not k.startswith("quick")}
    parameters = sum(t.numel() for t in weights.values())
    card = runs.model_card(config, step, parameters, scores, measured, notes, a.license, image=True)
    start, end = card.index("## Use"), card.index("## Metrics")
    prompt = ' --prompt "red heart"' if config.data.text else ""
    card = card[:start] + USE.format(name=a.name, prompt=prompt) + card[end:]
    others = {CARD: card.encode(), IMAGE: grid}
    runs.write_weights(folder, config, weights, step, {"step": step, **numbers}, None, others)
    print(f"wrote {folder}")


def checked(
    trained: runs.TrainedRun, draft: Path, s: SampleConfig, num: int
) -> tuple[dict[str, float], str, str]:
    """All numbers of a stored model of digits, and what its card says about rounding and about the
    numbers.
    """
    n = min(num, QUICK_IMAGES)
    cache = draft.parent / "features"  # of the training digits, which are compared with many times
    numbers = measure(draft, s, "builtin:mnist/held-out", num, cache=cache) | {
        "digit_share": digit_share(draft, num)
    }
    quick = quick_sampling(trained.config)
    found = [quick_fid(draft, n, block, cache) for block in range(BLOCKS)]
    numbers |= {
        "quick_fid": statistics.mean(found),
        "quick_fid_std": statistics.stdev(found),
        "quick_images": n,
    }
    print(numbers, flush=True)
    return (
        numbers,
        (
            f"\n\n## Checks\n\nThe FID of {n} samples ({quick.sampler}, {quick.steps} "
            f"steps) against the training digits is {numbers['quick_fid']:.3f}, with a standard "
            f"deviation of {numbers['quick_fid_std']:.3f} over {BLOCKS} blocks of seeds; a test "
            f"measures it again. {rounding(trained, draft, s, n, cache)}"
        ),
        (
            f"Of {num:,} samples (seeds from 0; {s.sampler}, {s.steps} steps, guidance "
            f"{s.guidance:g}, float32) against the 500 held-out digits, by the package's "
            "extractor of digits. digit_share is the share of as many samples that an SVM takes "
            "for the requested digit (benchmarks/quality/digit_share.py).\n"
        ),
    )


def checked_text(draft: Path) -> tuple[dict[str, float], str, str]:
    """The same for a stored model of emoji: how often its pictures are found, by the group of the
    prompts' names.
    """
    groups = found_by_prompt(draft)
    numbers = {
        f"{group}_{name}": v["run"][name]
        for group, v in groups.items()
        for name in ("top1", "top5", "category")
    }
    chance, lookup = groups["name"]["chance"]["top5"], groups["name"]["lookup"]["top5"]
    print(numbers, flush=True)
    return (
        numbers,
        (
            f" By chance `name_top5` is {chance:.3f}; a lookup of the training picture with the "
            f"most similar caption has {lookup:.3f}."
        ),
        (
            "Shares of 160 pictures whose most similar real picture, or one of the five most "
            "similar, among those of 80 names has the name or the category of the prompt, by "
            "features of EfficientNet: for names that were trained on, for names of which one "
            "style is held out (pair), and for held-out names "
            "(benchmarks/quality/text_retrieval.py).\n"
        ),
    )


def found_by_prompt(run: Path, *options: Any) -> dict[str, Any]:
    """What text_retrieval.py measures, by group."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "found.json"
        output(
            sys.executable,
            ROOT / "benchmarks" / "quality" / "text_retrieval.py",
            run,
            "--out",
            file,
            *options,
        )
        return json.loads(file.read_text(encoding="utf-8"))["groups"]


def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A weight as the package stores it."""
    is_state_space = any(f".{mixer}." in name for mixer in STATE_SPACES)
    return tensor.float() if is_state_space or tensor.ndim < 2 else tensor.bfloat16()


def measure(
    run: Path,
    sampling: SampleConfig,
    reference: str,
    num: int,
    seed: int = 0,
    metrics=USUAL,
    cache: Path | None = None,
) -> dict[str, float]:
    """Metrics of a run's samples, in float32; `cache` is a folder for features."""
    with tempfile.TemporaryDirectory() as place:
        options = {
            "num": num,
            "seed": seed,
            "sampling": sampling,
            "precision": "fp32",
            "cache": cache,
            "out": Path(place) / "result.json",
        }
        return finish(evaluate(run, reference, metrics, **options))["metrics"]


def quick_sampling(config: Config) -> SampleConfig:
    """How the quick score is drawn; a model of the mean velocity knows one way only."""
    is_quick = config.diffusion.predicts == "mean_velocity"
    return config.sample if is_quick else dataclasses.replace(config.sample, **QUICK)


def quick_fid(run: Path, n: int, block: int, cache: Path | None = None) -> float:
    """The quick score of a block of seeds."""
    sampling = quick_sampling(runs.find_run(run).config)
    return measure(run, sampling, "builtin:mnist", n, block * n, ("fid",), cache)["fid"]


def digit_share(run: Path, num: int) -> float:
    """The share of samples that an SVM takes for the requested digit."""
    script = ROOT / "benchmarks" / "quality" / "digit_share.py"
    return json.loads(output(sys.executable, script, run, "--num", num))["samples"]


def rounding(
    trained: runs.TrainedRun, folder: Path, sampling: SampleConfig, n: int, cache: Path
) -> str:
    """A sentence on how far storing bfloat16 moves the samples of the first seeds."""
    samplers = [
        open_sampler(t, sampling, precision="fp32") for t in (trained, runs.find_run(folder))
    ]
    drawn = [
        torch.cat([x for _, x in s.draw(range(n), s.labels(range(n)))]).int() for s in samplers
    ]
    moved = (drawn[1] - drawn[0]).abs()
    files = [trained.weights.parent, folder]
    fid = [measure(file, sampling, "builtin:mnist", n, 0, ("fid",), cache)["fid"] for file in files]
    return (
        f"Storing matrices as bfloat16 moves the pixels (0 to 255) of {n} samples by "
        f"{moved.float().mean():.3f} on average and by {moved.max()} at most, and changes their "
        f"FID from {fid[0]:.4f} to {fid[1]:.4f}."
    )


def output(*command: Any) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
