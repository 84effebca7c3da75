"""The tables and the figure of a study from its results, in seconds.

    python benchmarks/studies/report.py NAME [--against RUN] [--figure NAME.svg [--narrow]]
    [--grid NAME.png --work runs/studies]
    python benchmarks/studies/report.py --csv docs/results/all.csv   # every training of every study

Means over seeds with 95% t-intervals. Differences to one run (the first by default) are paired by
seed, which shares the order of the data. Prints markdown. The figure shows the held-out loss by
Gflops and by seconds of one thread; the grid shows samples of the same seeds, two rows for each
run, if the trained runs are still in the folder of work. A study with a margin also gets a verdict
for each difference, with p-values corrected by Holm.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from study import FLOOR, RATES, RESULTS, Study, load_study

from diffussm_cli.config import load_config
from diffussm_cli.data.arrays import open_npz
from diffussm_cli.data.images import save_grid
from diffussm_cli.profiling.flops import cost

SAMPLING_SEED = 0  # of the first image that run.py draws

MEASURES = {
    "parameters": "parameters",
    "steps": "steps",
    "gflops": "Gflops",
    "training_seconds": "seconds of its steps, by the times measured in turn",
    "cpu_seconds": "seconds of the process, with evaluations",
    "held_out": "held-out loss",
    "at_gflops": "the same after the Gflops that all reach",
    "at_images": "the same after the images that all reach",
    "to_target": "seconds to the target loss",
    "kid": "KID",
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
    "asked": "asked class",
    "retrieval_top1": "retrieval, top 1",
    "retrieval_top5": "top 5",
    "retrieval_category": "category",
    "nearness": "nearness",
    "images_per_second": "training images/s",
    "sampling_images_per_second": "sampling images/s",
    "peak_mib": "peak MiB",
}

SIDE_BY_SIDE = 3  # the most runs that a table has in columns
OF_MANY = (
    "parameters",
    "gflops",
    "images_per_second",
    "held_out",
    "at_gflops",
    "at_images",
    "to_target",
    "kid",
    "fid",
    "asked",
)
SIGNIFICANT = 0.05  # a corrected p-value below this tells two runs apart
# What the table of all trainings has of each, and then the measures that only some have.
FACTS = ("study", "run", "seed", "searched", "change", "preset", "overrides", "config", "commit")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?")
    parser.add_argument("--csv", type=Path, help="write a row for every training of every study")
    parser.add_argument(
        "--against", help="the run that differences are taken to; by default the first"
    )
    parser.add_argument("--figure", type=Path)
    parser.add_argument(
        "--narrow", action="store_true", help="the figure has the seconds only, for a narrow page"
    )
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/studies"))
    arguments = parser.parse_args()
    if arguments.csv:
        write_csv(arguments.csv)
    if not arguments.name:
        return
    study = load_study(arguments.name)
    if not any((RESULTS / study.name).glob("*-s*.json")):
        raise SystemExit(
            f"{study.name}: no results yet; begin with python benchmarks/studies/run.py "
            f"{study.name}"
        )
    results = load_results(study)
    file = RESULTS / study.name / FLOOR
    floor = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    print("\n".join(page(study, results, arguments.against or study.compared(), floor)))
    if arguments.figure:
        draw(study, results, arguments.figure, arguments.narrow)
    if arguments.grid:
        grid(study, arguments.work, arguments.grid)


def names(study: Study) -> list[str]:
    """The runs of a report: those of the study beside it, then its own."""
    return [run for of in study.shown() for run in of.runs]


def load_results(study: Study) -> list[dict]:
    """Every result of a study and of the one beside it, but no trials of a search; metrics beside
    the rest.

    With a constant rate of learning, the loss of a run is also read from its curve where the
    shortest run ends, unless its curve begins later. With a target, so are the seconds that lead to
    it, if the run gets there.
    """
    results = [*(load_results(study.beside) if study.beside else []), *own_results(study)]
    if study.target is not None:
        for r in results:
            seconds = seconds_to(study.target, *curve(r, "training_seconds"))
            if seconds is not None:
                r["to_target"] = seconds
    return results


def own_results(study: Study) -> list[dict]:
    """The results of a study itself, as `load_results` gives them."""
    paths = [
        path
        for path in sorted((RESULTS / study.name).glob("*.json"))
        if path.name not in (FLOOR, RATES)
    ]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    results = [{**r, **r.get("metrics", {})} for r in records if r["searched"] is None]
    if study.step_seconds:
        for r in results:
            r["training_seconds"] = r["steps"] * study.step_seconds[r["run"]]

    if study.base.get("train.lr_decay") == "constant":
        for name, unit in {"at_gflops": "gflops", "at_images": "images"}.items():
            common = min(curve(r, unit)[0][-1] for r in results)
            for r in results:
                if curve(r, unit)[0][0] <= common:
                    r[name] = float(np.interp(common, *curve(r, unit)))
    return results


def seconds_to(target: float, seconds: Sequence[float], losses: Sequence[float]) -> float | None:
    """When a curve with straight lines between its points first reaches a loss; None if it does
    not.
    """
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return seconds[0]
            share = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])
    return None


def curve(result: dict, unit: str) -> tuple[list[float], list[float]]:
    """The held-out losses of a run, by "images", or by a total such as "gflops" that grows with the
    steps.
    """
    steps, images, losses = map(list, zip(*result["curve"]))
    return images if unit == "images" else [
        step / result["steps"] * result[unit] for step in steps
    ], losses


def page(
    study: Study, results: Sequence[dict], against: str, floor: Mapping[str, float]
) -> list[str]:
    """The report in markdown, line by line: a row for each measure, or of many runs a row for each
    of them.
    """
    done = [run for run in names(study) if any(r["run"] == run for r in results)]
    columns: dict[str, Callable[[str], list[float]]] = {}  # the values of a measure, by title
    for run in done:
        seeds = sum(r["run"] == run for r in results)
        title = f"{run}, {seeds} seed" if seeds == 1 else f"{run}, {seeds} seeds"
        columns[title] = lambda m, run=run: values_of(results, run, m)
    for run in done:
        if run != against:
            columns[f"{run} - {against}"] = lambda m, run=run: paired(results, run, against, m)
    for r in results:
        if "metrics_again" in r:
            again = r["metrics_again"]
            columns[f"{r['run']}, seed {r['seed']}, other samples"] = lambda m, again=again: (
                [again[m]] if m in again else []
            )
    if floor:
        columns["training images"] = lambda m: [floor[m]] if m in floor else []
    lines = [study.question.strip(), "", f"Rule: {study.rule.strip()}", ""]
    measures = MEASURES if len(done) <= SIDE_BY_SIDE else {name: MEASURES[name] for name in OF_MANY}
    rows = [
        [title, *(interval(values(name)) for values in columns.values())]
        for name, title in measures.items()
    ]
    rows = [["mean ± 95%", *columns], *(row for row in rows if any(row[1:]))]
    rows = rows if len(done) <= SIDE_BY_SIDE else [list(column) for column in zip(*rows)]
    lines += [*table(rows), *verdict_table(study, results, against), *search_table(study)]
    machines = sorted(
        {f"{r['machine']}, torch {r['versions']['torch']}, commit {r['commit']}" for r in results}
    )
    return [*lines, "", *(f"- {m}" for m in machines)]


def verdict_table(study: Study, results: Sequence[dict], against: str) -> list[str]:
    """For each difference in held-out loss of the study's own runs, p-values and a verdict.

    Empty for a study without a margin, and until all of its runs have all seeds: a verdict on some
    of them would be corrected for too few comparisons. A run that was stopped before counts as a
    comparison, and has no verdict.
    """
    runs = [run for run in study.runs if run != against]
    differences = {run: paired(results, run, against, "held_out") for run in runs}
    whole = [run for run in runs if run not in study.stopped]
    if study.margin is None or any(len(differences[run]) < len(study.seeds) for run in whole):
        return []
    p = {run: float(stats.ttest_1samp(differences[run], 0).pvalue) for run in whole}
    corrected = holm(p | dict.fromkeys(study.stopped, 1.0))
    rows = [
        [
            "held-out loss",
            "difference ± 95%",
            "p",
            "p by Holm",
            f"verdict (margin {study.margin:g})",
        ]
    ]
    for run, values in differences.items():
        decided = ["", "", f"stopped after {len(values)} of {len(study.seeds)} seeds"]
        if run in whole:
            numbers = [f"{p[run]:.2g}", f"{corrected[run]:.2g}"]
            decided = [*numbers, verdict(values, corrected[run], study.margin)]
        rows.append([f"{run} - {against}", interval(values), *decided])
    return ["", *table(rows)]


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values of several comparisons, corrected by Holm: the i-th smallest of n times n - i, i =
    0..n-1, rising.
    """
    corrected, least = {}, 0.0
    for i, name in enumerate(sorted(p, key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - i) * p[name]))
        corrected[name] = least
    return corrected


def verdict(differences: Sequence[float], p: float, margin: float) -> str:
    """equal if the 95% interval lies within the margin; else better or worse if p tells them apart;
    else unknown.
    """
    middle = statistics.mean(differences)
    if abs(middle) + half_width(differences) <= margin:
        return "equal"
    if p < SIGNIFICANT:
        return "better" if middle < 0 else "worse"
    return "unknown"


def search_table(study: Study) -> list[str]:
    """The held-out losses of the trials of a search: a row for each value, a column for each run;
    empty without one.
    """
    lines: list[str] = []
    part = {1 / 3: "a third", 1: "the whole budget"}.get(
        study.search_share, f"{study.search_share:.0%}"
    )
    for name, grid in study.search.items():
        runs = study.searched(name)
        rows = [[f"{name}, held-out loss of one seed after {part}", *runs]]
        for value in grid:
            files = [RESULTS / study.name / f"{run}-{value}.json" for run in runs]
            losses = [
                [json.loads(f.read_text(encoding="utf-8"))["held_out"]] if f.is_file() else []
                for f in files
            ]
            rows.append([f"{value:g}", *map(interval, losses)])
        lines += ["", *table(rows)]
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in markdown, line by line; the first row is its head."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def values_of(results: Sequence[dict], run: str, measure: str) -> list[float]:
    """A measure of every seed of a run."""
    return [r[measure] for r in results if r["run"] == run and measure in r]


def paired(results: Sequence[dict], run: str, against: str, measure: str) -> list[float]:
    """Differences of a measure between two runs, for every seed that both have."""
    of = {
        name: {r["seed"]: r[measure] for r in results if r["run"] == name and measure in r}
        for name in (run, against)
    }
    return [
        of[run][seed] - of[against][seed] for seed in sorted(of[run].keys() & of[against].keys())
    ]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% t-interval of the mean; infinite for one value."""
    n = len(values)
    if n < 2:
        return math.inf
    return float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def interval(values: Sequence[float]) -> str:
    """Mean and half-width as text."""
    if not values:
        return ""
    width = half_width(values)
    return f"{statistics.mean(values):.4g}" + (f" ± {width:.2g}" if 0 < width < math.inf else "")


def write_csv(path: Path) -> None:
    """A row for every training of every study, trials of searches included, with empty cells for
    what it has not.
    """
    rows = []
    for file in sorted(RESULTS.glob("*/*.json")):
        if file.name not in (FLOOR, RATES):
            result = json.loads(file.read_text(encoding="utf-8"))
            values = result | result.get("metrics", {}) | {"study": file.parent.name}
            values |= {
                "overrides": " ".join(result["overrides"]),
                "begun": result.get("begun", result.get("date")),
            }
            rows.append(values)
    measures = [name for name in MEASURES if any(name in row for row in rows)]
    with path.open("w", encoding="utf-8", newline="") as to:
        writer = csv.DictWriter(
            to, [*FACTS, "begun", *measures], extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def draw(study: Study, results: Sequence[dict], path: Path, narrow: bool = False) -> None:
    """Held-out loss against Gflops and seconds, a colour for each run, a line for each seed.

    If the rate of learning is constant, a third panel has the last loss against the memory of
    training by formula. A narrow figure has the panel of the seconds only, which a telephone can
    show, with its legend inside.
    """
    import matplotlib
    from matplotlib import pyplot, ticker

    matplotlib.rcParams["svg.hashsalt"] = study.name  # the same file from the same results
    panels = {"gflops": "Gflops of training", "cpu_seconds": "seconds of one thread"}
    if study.step_seconds:
        panels = {
            "gflops": "Gflops of training",
            "training_seconds": "seconds of training on one thread",
        }
    if any("at_gflops" in r for r in results):
        panels["memory"] = "MiB of training, by formula"
    size = (4 * len(panels) + 1, 3.6)  # with room for the legend
    if narrow:
        panels = {unit: label for unit, label in panels.items() if unit.endswith("seconds")}
        size = (4.6, 3.4)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    axes = axes[0]
    colours = matplotlib.colormaps["tab10" if len(names(study)) <= 10 else "tab20"].colors
    for axis, (unit, label) in zip(axes, panels.items()):
        for i, run in enumerate(names(study)):
            of_run = [r for r in results if r["run"] == run]
            if unit == "memory":
                mib = [
                    cost(load_config(r["preset"], r["overrides"])).training_bytes / 2**20
                    for r in of_run
                ]
                axis.plot(mib, [r["held_out"] for r in of_run], "o", color=colours[i], alpha=0.6)
                continue
            for j, r in enumerate(of_run):
                axis.plot(
                    *curve(r, unit), color=colours[i], alpha=0.6, label=run if j == 0 else None
                )
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(xlabel=label, yscale="log")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axis.yaxis.set_major_locator(ticker.MaxNLocator(7))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axes[0].set_ylabel("held-out loss")
    if narrow:
        axes[0].legend(loc="upper right", frameon=False)
    else:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", frameon=False)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def grid(study: Study, work: Path, path: Path, columns: int = 12) -> None:
    """Samples of the first seed of each run, two rows of the same sampling seeds for each."""
    file = f"samples-{SAMPLING_SEED}.npz"
    files = [
        work / of.name / f"{run}-s{of.seeds[0]}" / file for of in study.shown() for run in of.runs
    ]
    images = [next(open_npz(file)["arr_0"].read(0, 2 * columns, 2 * columns)) for file in files]
    save_grid(torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), path, columns)


if __name__ == "__main__":
    main()
