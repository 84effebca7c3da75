"""The tables and the figure of a study from its results, in seconds.

    python benchmarks/studies/report.py NAME [--against RUN] [--out FOLDER]

Means over seeds with 95% t-intervals. Differences to one run (the first by default) are paired by seed, which shares
the order of the data. Prints markdown; with --out it also writes NAME.md and NAME.svg, the held-out loss by Gflops.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
from study import FLOOR, RATES, RESULTS, Study, load_study

MEASURES = {
    "held_out": "held-out loss",
    "fid": "FID",
    "sfid": "sFID",
    "is": "IS",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "asked": "asked class",
    "retrieval_top1": "retrieval, top 1",
    "retrieval_top5": "top 5",
    "retrieval_category": "category",
    "nearness": "nearness",
    "images_per_second": "training images/s",
    "sampling_images_per_second": "sampling images/s",
    "peak_mib": "peak MiB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--against", help="the run that differences are taken to; by default the first")
    parser.add_argument("--out", type=Path, help="a folder for NAME.md and NAME.svg")
    arguments = parser.parse_args()
    study = load_study(arguments.name)
    results = load_results(RESULTS / study.name)
    file = RESULTS / study.name / FLOOR
    floor = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    text = "\n".join(page(study, results, arguments.against or next(iter(study.runs)), floor))
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{study.name}.md").write_text(text + "\n", encoding="utf-8")
        draw(study, results, arguments.out / f"{study.name}.svg")


def load_results(folder: Path) -> list[dict]:
    """Every result of a study but the trials of its search, its metrics beside the rest."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name not in (FLOOR, RATES)]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [{**r, **r["metrics"]} for r in found if r["searched"] is None]


def page(study: Study, results: Sequence[dict], against: str, floor: Mapping[str, float]) -> list[str]:
    """The report in markdown, line by line."""
    done = [run for run in study.runs if any(r["run"] == run for r in results)]
    measures = [m for m in MEASURES if any(m in r for r in results)]
    lines = [f"# {study.name}", "", study.question.strip(), "", f"Rule: {study.rule.strip()}", ""]
    lines += ["| run | seeds | Gflops | " + " | ".join(MEASURES[m] for m in measures) + " |"]
    lines += ["|" + "---|" * (3 + len(measures))]
    for run in done:
        rows = [r for r in results if r["run"] == run]
        cells = [interval([r[m] for r in rows if m in r]) for m in measures]
        lines.append(f"| {run} | {len(rows)} | {rows[0]['gflops']:.3g} | " + " | ".join(cells) + " |")
        for again in (r["metrics_again"] for r in rows if "metrics_again" in r):
            cells = [interval([again[m]] if m in again else []) for m in measures]
            lines.append(f"| {run}, seed {study.seeds[0]}, other samples | | | " + " | ".join(cells) + " |")
    if floor:
        cells = [interval([floor[m]] if m in floor else []) for m in measures]
        lines.append("| training images | | | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Differences to {against}, paired by seed:",
        "",
        "| run | seeds | held-out loss | FID |",
        "|---|---|---|---|",
    ]
    for run in done:
        if run != against:
            pairs = {m: paired(results, run, against, m) for m in ("held_out", "fid")}
            lines.append(f"| {run} | {len(pairs['fid'])} | {interval(pairs['held_out'])} | {interval(pairs['fid'])} |")
    machines = sorted({f"{r['machine']}, torch {r['versions']['torch']}, commit {r['commit']}" for r in results})
    return [*lines, "", *(f"- {m}" for m in machines)]


def paired(results: Sequence[dict], run: str, against: str, measure: str) -> list[float]:
    """Differences of a measure between two runs, for every seed that both have."""
    of = {
        name: {r["seed"]: r[measure] for r in results if r["run"] == name and measure in r} for name in (run, against)
    }
    return [of[run][seed] - of[against][seed] for seed in sorted(of[run].keys() & of[against].keys())]


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
    return f"{statistics.mean(values):.4g}" + ("" if math.isinf(width) else f" ± {width:.2g}")


def draw(study: Study, results: Sequence[dict], path: Path) -> None:
    """Held-out loss against Gflops of training, a line per run, every seed faint."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    for i, run in enumerate(study.runs):
        rows = [r for r in results if r["run"] == run]
        for j, r in enumerate(rows):
            x = [step / r["steps"] * r["gflops"] for step, _, _ in r["curve"]]
            axis.plot(x, [loss for *_, loss in r["curve"]], color=f"C{i}", alpha=0.6, label=run if j == 0 else None)
    axis.set(xlabel="Gflops of training", ylabel="held-out loss", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, format="svg")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
