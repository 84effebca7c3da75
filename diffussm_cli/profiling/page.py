"""What models cost on one HTML page: figure 3 of the paper, and time, memory and quality that were measured."""

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from diffussm_cli.config import Config
from diffussm_cli.errors import ConfigError, reading, writing
from diffussm_cli.machine.files import write_text
from diffussm_cli.pages import Curve, chart, number, render
from diffussm_cli.profiling.report import panels

SUFFIXES = (".html",)
NO_TRAININGS = ("floor.json", "rates.json")  # beside the results of a study: measures of real images, seconds of a step
# Fields of a study's results, and their headings.
MEASURES = {
    "gflops": "Gflops of training",
    "images_per_second": "training images/s",
    "sampling_images_per_second": "sampling images/s",
    "peak_mib": "peak MiB",
    "held_out": "held-out loss",
    "fid": "FID",
    "precision": "precision",
    "recall": "recall",
}


class Trained(NamedTuple):
    """A training of a study: its measures by name, and the held-out loss by Gflops of training."""

    run: str
    preset: str
    measures: dict[str, float]
    curve: Curve


def write_page(path: Path, result: dict[str, Any], configs: Sequence[Config], study: Sequence[Trained] = ()) -> None:
    """Write what `profile` found of the models in `configs`, and what a study has measured, as a page.

    Raises:
        ConfigError: if the file cannot be written.
    """
    charts = []
    for title, curves in panels(result, configs).items():
        sides = sorted({side for x, _ in curves.values() for side in x})
        charts.append(chart(title, {name: Curve(*xy) for name, xy in curves.items()}, marks=sides))
    learning = {trained.run: trained.curve for trained in study}  # of the last seed
    text = render(
        "profiling/page.html",
        title="What the models cost",
        charts=charts,
        result=result,
        kinds=dict.fromkeys(kind for m in result["models"] for kind in m.get("measured", {})),
        study=list(summary(study)),
        learning=chart("Held-out loss by Gflops of training", learning) if study else None,
        written=datetime.datetime.now(datetime.timezone.utc),
    )
    with writing(f"--report: cannot write {str(path)!r}", ConfigError):
        write_text(path, text)


def read_study(folder: Path) -> list[Trained]:
    """The results of a study, one JSON file for each training, without the trials of its search.

    Raises:
        ConfigError: if there are none, or a file cannot be read.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        with reading(f"--quality: {str(file)!r}", ConfigError):
            record = json.loads(file.read_text(encoding="utf-8"))
            if file.name not in NO_TRAININGS:
                found += _trained(record)
    if not found:
        raise ConfigError(f"--quality: {str(folder)!r} holds no results of a study, as benchmarks/studies/results/NAME")
    return found


def _trained(record: Any) -> list[Trained]:
    """The training in a record; none in a trial of a search. Raises ValueError."""
    try:
        if record["searched"] is not None:
            return []
        values = record | record["metrics"]
        measures = {name: float(values[name]) for name in MEASURES if name in values}
        points = [(record["gflops"] * step / record["steps"], loss) for step, _, loss in record["curve"]]
        return [Trained(str(record["run"]), str(record["preset"]), measures, Curve(*zip(*points)))]
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise ValueError("is no result of a study") from e


def summary(study: Sequence[Trained]) -> Iterator[tuple[str, list[Any]]]:
    """The rows of a table of a study, a column for each run: means of measures, and their ranges over the seeds."""
    runs: dict[str, list[Trained]] = {}
    for trained in study:
        runs.setdefault(trained.run, []).append(trained)
    yield "run", list(runs)
    yield "preset", [found[0].preset for found in runs.values()]
    yield "seeds", [len(found) for found in runs.values()]
    for name, heading in MEASURES.items():
        yield heading, [_spread([t.measures[name] for t in found if name in t.measures]) for found in runs.values()]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(map(number, values))
    return f"{number(mean(values))} ({number(min(values))} to {number(max(values))})"
