"""Race a recipe against the record: seconds of one CPU thread to a held-out loss and an FID.

    python benchmarks/speedrun/race.py NAME [--against RECORD] [--work runs/speedrun]

NAME is a file in benchmarks/speedrun/recipes: a preset and other values of its fields. README.md
beside this file has the rules and the records. For each of three seeds the record and then the new
recipe are trained, each in a process of its own with one thread. It prints a row for the table and
whether the rules admit it, and writes results/NAME.json.
"""

import argparse
import multiprocessing
import shutil
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "studies"))
from run import as_text, machine_name, provenance  # noqa: E402

from diffussm_cli.config import Config, load_config  # noqa: E402
from diffussm_cli.machine.files import write_text  # noqa: E402

RECORD = "conv"  # the last of the table in README.md
TARGETS = {"held_out": 0.200, "fid": 1.0}  # of means over the seeds
SEEDS = (0, 1, 2)
SAMPLES = 300  # for FID, each digit as often; other ones for each seed
# What makes losses and FIDs comparable.
FIXED = {
    "data.path": "builtin:mnist",
    "data.resolution": 28,
    "data.held_out": "",
    "diffusion.objective": "flow",
    "diffusion.predicts": "velocity",
    "train.init": "",
    "train.loss_weight": "none",
    "eval.held_out_images": 2000,
}
# How the runner trains and draws, whatever the recipe says.
SET = {
    "train.device": "cpu",
    "train.sample_every": 0,
    "eval.every": 0,
    "eval.held_out_every": 0,
    "sample.sampler": "heun",
    "sample.steps": 10,
    "sample.guidance": 2.0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"recipes: {', '.join(recipe_names())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", metavar="NAME", help="the new recipe: a file in recipes/, without .yaml"
    )
    parser.add_argument("--against", default=RECORD, help="another recipe than the record")
    parser.add_argument("--work", type=Path, default=Path("runs/speedrun"), help="where runs go")
    arguments = parser.parse_args()

    names = [arguments.against, arguments.name]
    for name in names:
        recipe(name, SEEDS[0])  # a mistake shows before anything is trained
    origin = provenance()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in SEEDS:
        for name in names:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                runs[name].append(alone.submit(train_once, name, seed, arguments.work).result())
            print(f"{name}, seed {seed}: {runs[name][-1]}", flush=True)

    result = {"runs": runs, **verdict(runs[arguments.against], runs[arguments.name])}
    result |= {"machine": machine_name(), **origin}
    (HERE / "results").mkdir(exist_ok=True)
    write_text(HERE / "results" / f"{arguments.name}.json", as_text(result))
    print(row(arguments.name, result))
    print("admitted" if result["admitted"] else "not admitted")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in (HERE / "recipes").glob("*.yaml"))


def recipe(name: str, seed: int) -> Config:
    """The configuration of a recipe with a seed. Raises SystemExit if there is no such recipe, or
    if the rules forbid it.
    """
    if name not in recipe_names():
        raise SystemExit(
            f"{name}: no such recipe; there are {', '.join(recipe_names())}; "
            "write yours as benchmarks/speedrun/recipes/NAME.yaml"
        )
    values = yaml.safe_load((HERE / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    fields = {k: v for k, v in values.items() if k != "preset"} | SET | {"train.seed": seed}
    config = load_config(values["preset"], [f"{k}={v}" for k, v in fields.items()])
    for field, value in FIXED.items():
        section, _, key = field.partition(".")
        if (now := getattr(getattr(config, section), key)) != value:
            raise SystemExit(f"{name}: {field} is {now!r}, and the rules want {value!r}")
    return config


def train_once(name: str, seed: int, work: Path) -> dict[str, float]:
    """Train a recipe from the start with one thread: seconds of its processor, the held-out loss
    and FID of the averaged weights.
    """
    from measures import measure
    from run import train_config

    root = work / f"{name}-s{seed}"
    shutil.rmtree(root, ignore_errors=True)
    trained = train_config(recipe(name, seed), None, root)
    drawn = measure(root, SAMPLES, seed * SAMPLES, balanced=True)
    names = {"seconds": trained["cpu_seconds"], "held_out": trained["held_out"]}
    return {**names, "fid": drawn["fid"]}


def verdict(record: list[dict[str, float]], new: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds, the ratio of the seconds of both, and whether the rules admit `new`."""
    means = {name: statistics.mean(run[name] for run in new) for name in new[0]}
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(new, record)]
    reached = all(means[name] <= target for name, target in TARGETS.items())
    return {
        "means": means,
        "ratio": sum(run["seconds"] for run in new) / sum(run["seconds"] for run in record),
        "admitted": reached and max(ratios) < 1,
    }


def row(name: str, result: dict[str, Any]) -> str:
    """The row of a table of records."""
    means = result["means"]
    return (
        f"| {name} | {means['seconds']:.0f} | {result['ratio']:.2f} | {means['held_out']:.4f} "
        f"| {means['fid']:.2f} | {result['commit']} |"
    )


if __name__ == "__main__":
    main()
