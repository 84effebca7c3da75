"""RUN/report.html: what a run is and how it goes, in one file that needs no network.

Without scripts it shows the same; its script adds a slider, values under the pointer and a choice
of axis.

It is made from the files of the run alone, so it can be written at any time, also long after
training. This module gathers the content; report.html beside it, a template of Jinja, is the page
and escapes all text.
"""

import base64
import contextlib
import datetime
import io
import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffussm_cli import runs
from diffussm_cli.config import (
    METRIC_FACTS,
    Config,
    load_config,
    preset_names,
    to_dict,
    to_yaml,
)
from diffussm_cli.data.images import open_image
from diffussm_cli.errors import DataError, RunError
from diffussm_cli.machine.files import read_regular, write_text
from diffussm_cli.model.s4d.kernel import s4d_kernel
from diffussm_cli.pages import Curve, chart, render
from diffussm_cli.runs.log import Log, is_metric

# previews; larger files (bytes) are shrunk to this width (pixels)
PICTURES, LARGE, WIDTH = 24, 1 << 18, 1280
ROWS, TAPS, EVALUATIONS = 200, 4096, 20  # most events in the table, taps of a kernel, evaluations
DRAWN = (
    "step",
    "ema",
    "sampler",
    "steps",
    "guidance",
    "guide",
    "label_choice",
)  # settings of samples
NAMES = {name: row.title for name, row in METRIC_FACTS.items()} | {"held_out": "Held-out loss"}
FACTS = {
    "step": "Steps",
    "seconds": "Seconds",
    "images_per_second": "Images per second, median",
    "peak_memory_gib": "Peak memory, GiB",
    "loss": "Loss, last",
}
COMPARED = {"loss": "Loss", "images_per_second": "Images per second"}  # beside the metrics
NOISY = {"loss", "grad_norm"}  # curves that get a line of their mean
EARLY = 0.1  # the share of training that does not count for the range of a chart
FOUND = ("class_names", "latents_mean", "latents_std")  # fields with long values of the data
TICKS = 200  # most points of a run's clock
MAX_FACTS = 1 << 20  # bytes of the file about nearest images
REFRESH = 60  # seconds after which a page of an unfinished run is loaded again
PARAMETERS = ("log_dt", "log_A_real", "A_imag", "B", "C")


def write_report(
    root: Path | str, against: Sequence[Path | str] = (), path: Path | str | None = None
) -> Path:
    """Write the page of a run from its files, finished or not, and return the path of the page.

    Args:
        against: other runs, whose curves, configuration and last previews are shown beside those of
            this one.
        path: the page; by default RUN/report.html.

    Raises:
        RunError: if a folder has no readable configuration.
        OSError: if the file cannot be written.
    """
    root = Path(root)
    path = root / runs.REPORT if path is None else Path(path)
    write_page(read_runs([root, *map(Path, against)]), path)
    return path


class ReadRun(NamedTuple):
    """A run folder, and what has been read of it."""

    root: Path
    config: Config
    log: Log


def read_runs(roots: Sequence[Path]) -> list[ReadRun]:
    """The configuration and the log of each run. Raises RunError."""
    return [ReadRun(root, runs.read_config(root), Log(root / runs.LOG)) for root in roots]


def write_page(
    read: Sequence[ReadRun], path: Path, compared: Mapping[str, Any] | None = None
) -> None:
    """Write the page of the first run, which shows the others beside it.

    Args:
        compared: what `compare` gives for these runs, if it is there already.
    """
    root, config, log = read[0]
    if len(read) > 1 and compared is None:
        compared = compare(read)

    text = render(
        "runs/report.html",
        Path(__file__).with_suffix(".js").read_text(encoding="utf-8"),
        title=root.resolve().name,
        folder=shlex.quote(str(root)),
        config=config,
        log=log,
        step=log.step,
        written=datetime.datetime.now(datetime.timezone.utc),
        frames=list(frames(root / runs.SAMPLES)),
        metrics={
            name: (curve, log.best(name)) for name, curve in log.curves.items() if is_metric(name)
        },
        evaluations=list(evaluations(root)),
        kernels=list(kernels(root, config)),
        events=log.events[-ROWS:],
        differences=list(differences(config)),
        compared=compared if len(read) > 1 else None,
        axes=[axes_of(run.config, run.log) for run in read],
        refresh=REFRESH if log.step < config.train.steps else 0,
        summary=log.summary(),
        nearest=nearest(root),
        environment=[(k, v) for k, v in log.sessions[-1].items() if v not in ("", {})]
        if log.sessions
        else [],
        yaml=to_yaml(config),
        names=metric_name,
        charts_of=charts_of,
        timedelta=datetime.timedelta,
    )

    write_text(path, text)


def axes_of(config: Config, log: Log) -> dict[str, Any]:
    """How steps of a run become images and hours: its batch size, and its clock as two lists."""
    clock = log.clock
    axes: dict[str, Any] = {"batch": config.train.batch_size, "steps": [], "hours": []}
    if not clock.x:
        return axes

    places = np.unique(np.linspace(0, len(clock.x) - 1, TICKS).round().astype(int)).tolist()
    return axes | {
        "steps": [0, *(clock.x[i] for i in places)],
        "hours": [0, *(round(clock.y[i], 5) for i in places)],
    }


def nearest(root: Path) -> dict[str, Any] | None:
    """The last preview with the nearest training image beside each sample, and how far they are;
    None if training did not compare them, or the files are damaged.
    """
    with contextlib.suppress(
        OSError, DataError, ValueError, KeyError, TypeError, OverflowError, RecursionError
    ):
        facts = json.loads(read_regular(root / runs.NEAREST_FACTS, MAX_FACTS))
        distances = [float(value) for value in facts["distances"]]
        if not all(map(math.isfinite, distances)):
            return None

        place = int(np.argmin(distances))
        return {
            "step": int(facts["step"]),
            "images": int(facts["images"]),
            "median": float(np.median(distances)),
            "least": distances[place],
            "place": place + 1,
            "url": picture_url(root / runs.NEAREST),
        }
    return None


def evaluations(root: Path) -> Iterator[dict[str, Any]]:
    """What `diffussm eval` has left in a run and its folders, the newest first; a damaged file is
    left out.
    """
    places = ("", "*/", f"{runs.CHECKPOINTS}/*/")
    files = [
        path for place in places for path in root.glob(f"{place}*{runs.RESULTS}") if path.is_file()
    ]

    for path in sorted(files, key=os.path.getmtime, reverse=True)[:EVALUATIONS]:
        with contextlib.suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
        ):
            result = json.loads(path.read_text(encoding="utf-8"))
            meta = result["meta"]
            values = {name: float(value) for name, value in result["metrics"].items()}
            yield {
                "file": path.relative_to(root),
                "time": datetime.datetime.fromtimestamp(
                    path.stat().st_mtime, datetime.timezone.utc
                ),
                "drawn": ", ".join(
                    f"{name} {meta[name]}" for name in DRAWN if meta.get(name) is not None
                ),
                "values": {
                    metric_name(name): value
                    for name, value in values.items()
                    if name != "kid_error"
                },
                "what": f"{result['num']} samples against {result['reference']}",
                "warnings": list(map(str, result["warnings"])),
            }


def compare(read: Sequence[ReadRun]) -> dict[str, Any]:
    """Several runs side by side.

    Returns:
        `names` of the runs; `summaries`, the `Log.summary` of each, and the same by rows for people
        as `facts`; `charts` for each curve of COMPARED and each metric, in which `runs` are the
        places of the runs of the lines; `rows` of fields that differ; the last `previews` at the
        newest `step` that all of them have.
    """
    roots = [run.root for run in read]
    names = [f"{i + 1} {root.resolve().name}" for i, root in enumerate(roots)]
    configs = [to_dict(run.config) for run in read]
    logs = [run.log for run in read]
    summaries = [log.summary() for log in logs]
    kinds = dict.fromkeys(name for summary in summaries for name in summary)

    # The curves that at least two of them have.
    charts = []
    titles = COMPARED | {n: metric_name(n) for log in logs for n in log.curves if is_metric(n)}
    for name, title in titles.items():
        places = [i for i, log in enumerate(logs) if name in log.curves]
        curves = {names[i]: logs[i].curves[name] for i in places}
        if len(places) > 1:
            noisy = name in NOISY
            charts.append(chart(title, curves, early=EARLY, averaged=noisy, runs=places))

    # The fields that differ.
    rows = []
    for section, fields in configs[0].items():
        for field in fields if isinstance(fields, dict) else ():
            values = [config[section][field] for config in configs]
            if any(value != values[0] for value in values) and field not in FOUND:
                rows.append((f"{section}.{field}", values))

    # Previews of a step have the same seeds in every run.
    steps = [{path.stem for path in (root / runs.SAMPLES).glob("step-*.png")} for root in roots]
    common = max(set.intersection(*steps), default="")
    pictures = [list(frames(root / runs.SAMPLES, f"{common}.png")) for root in roots]
    return {
        "names": names,
        "summaries": summaries,
        "facts": [(fact_name(k), [summary.get(k) for summary in summaries]) for k in kinds],
        "charts": charts,
        "rows": rows,
        "step": int(common.removeprefix("step-")) if common else None,
        "previews": [(name, found[0][1]) for name, found in zip(names, pictures) if found],
    }


def differences(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and usual value of each field that differs from the preset; from the defaults
    without a preset.
    """
    usual = to_dict(load_config(config.preset) if config.preset in preset_names() else Config())
    for section, fields in to_dict(config).items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if value != usual[section][name] and name not in FOUND:
                yield f"{section}.{name}", value, usual[section][name]


def frames(folder: Path, pattern: str = "step-*.png") -> Iterator[tuple[int, str]]:
    """Step and data URL of previews at evenly spread steps. A large picture is shrunk, a damaged
    one left out.
    """
    every = sorted(folder.glob(pattern))
    for i in np.unique(
        np.linspace(0, len(every) - 1, min(PICTURES, len(every))).round().astype(int)
    ):
        with contextlib.suppress(OSError, DataError, ValueError):
            yield int(every[i].stem.removeprefix("step-")), picture_url(every[i])


def picture_url(path: Path) -> str:
    """The data URL of a picture; a large one is shrunk. Raises OSError, DataError, ValueError."""
    with open_image(path) as image:
        kind, content = "png", path.read_bytes()

        if len(content) > LARGE:
            image.thumbnail((WIDTH, 10 * WIDTH))
            shrunk = io.BytesIO()
            image.convert("RGB").save(shrunk, "WEBP", quality=85)
            kind, content = "webp", shrunk.getvalue()

        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ------------------------------------------------------------------------------------------- curves
def charts_of(log: Log, chosen: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """A chart for every metric, with its further averages and its best point; then the chosen ones.

    `chosen` has labels by the name of a curve, by the title of the chart. What is not in the log is
    left out.
    """
    for name in [n for n in log.curves if is_metric(n) and "@" not in n]:
        averages = {
            n.partition("@")[2]: curve
            for n, curve in log.curves.items()
            if n.partition("@")[0] == name
        }
        curve, place = log.curves[name], log.best(name)
        best = curve.x[place], curve.y[place]
        yield chart(metric_name(name), averages, best, early=EARLY)

    for title, labels in chosen.items():
        if curves := {label: log.curves[n] for n, label in labels.items() if n in log.curves}:
            is_plan = "lr" in labels  # all of it is shown, its warm-up too
            noisy = len(labels) == 1 and NOISY.issuperset(labels)
            early = 0 if is_plan else EARLY
            yield chart(title, curves, early=early, linear=is_plan, averaged=noisy)


def metric_name(name: str) -> str:
    """A metric's name for people; the decay of a further average stays behind it."""
    short, at, decay = name.removeprefix("eval/").partition("@")
    return NAMES.get(short, short.replace("_", " ").capitalize()) + at + decay


def fact_name(name: str) -> str:
    """The name of a value of `Log.summary` for people."""
    best, _, metric = name.partition(" ")
    return f"{metric_name(metric)}, best" if metric else FACTS.get(best, best)


# ------------------------------------------------------------------------------------------ kernels
def kernels(root: Path, config: Config) -> Iterator[dict[str, Any]]:
    """Charts of the newest averaged weights: the first, middle and last SSM layer, a slow, median
    and fast channel.

    The mixer axial has kernels along rows and along columns; its steps are shown in tokens, as
    those of S4D are.
    """
    files = [(runs.step_of(path), path / runs.EMA) for path in runs.list_checkpoints(root)[-1:]]
    with contextlib.suppress(RunError):
        files.append((runs.read_state(root / runs.FINAL)["step"], root / runs.FINAL / runs.MODEL))
    H, W = config.data.grid
    H, W = H // config.model.patch_size, W // config.model.patch_size

    with (
        contextlib.suppress(OSError, SafetensorError, ValueError),
        safe_open(max(files)[1], "pt") as weights,
    ):
        layers = [name.removesuffix("log_dt") for name in weights.keys() if name.endswith("log_dt")]  # noqa: SIM118
        layers.sort(key=lambda name: [int(part) for part in name.split(".") if part.isdecimal()])
        for i in sorted({0, len(layers) // 2, len(layers) - 1}) if layers else ():
            parameters = [weights.get_tensor(layers[i] + name).float() for name in PARAMETERS]
            sequences: dict[str, tuple[list[Tensor], int]] = {"": (parameters, H * W)}
            if parameters[0].ndim == 3:
                log_dt, *others = parameters
                sequences = {
                    f" {words}": ([log_dt[axis] - math.log(S), *(p[axis] for p in others)], S)
                    for axis, (words, S) in enumerate((("along rows", W), ("along columns", H)))
                }
            for words, ((log_dt, log_A_real, A_imag, B, C), L) in sequences.items():
                # (2, D, L)
                taps = s4d_kernel(log_dt.exp(), -log_A_real.exp(), A_imag, B, C, min(TAPS, L))
                ranked = log_dt.mean(0).argsort().tolist()
                for k in (ranked[0], ranked[len(ranked) // 2], ranked[-1]):
                    dt = log_dt[:, k].exp().mean()
                    title = f"Layer {i + 1}{words}, channel {k}, dt {dt:.2g}"
                    yield chart(title, both_ways(taps[:, k].double().numpy()))


def both_ways(taps: np.ndarray) -> dict[str, Curve]:
    """The kernels of both directions, (2, L), by the offset of the token that is read; as far as
    99% of the energy.
    """
    energy = np.square(taps).sum(0).cumsum()
    n = max(8, 1 + int((energy < 0.99 * energy[-1]).sum()))
    offsets = np.arange(taps[:, :n].shape[1])
    return {
        "earlier tokens": Curve(-offsets[::-1], taps[0, :n][::-1]),
        "later tokens": Curve(offsets, taps[1, :n]),
    }
