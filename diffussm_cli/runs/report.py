"""RUN/report.html: what a run is and how it goes, in one file that needs no network, and a script
only for a slider.

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
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffussm_cli import runs
from diffussm_cli.config import MANY, Config, load_config, preset_names, to_dict, to_yaml
from diffussm_cli.data.images import open_image
from diffussm_cli.errors import DataError, RunError
from diffussm_cli.machine.files import write_text
from diffussm_cli.model.s4d.kernel import s4d_kernel
from diffussm_cli.pages import Curve, chart, render

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
HIGHER_IS_BETTER = ("is", "precision", "recall")
NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception score",
    "kid": "KID",
    "held_out": "Held-out loss",
}
COMPARED = {"loss": "Loss", "images_per_second": "Images per second"}  # beside the metrics
# what a line that is no record raises
DAMAGE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
NAMED = 5  # damaged lines that are listed
PARAMETERS = ("log_dt", "log_A_real", "A_imag", "B", "C")


def write_report(root: Path | str, against: Sequence[Path | str] = ()) -> Path:
    """Write RUN/report.html from the files of a run, finished or not, and return its path.

    Args:
        against: other runs, whose curves, configuration and last previews are shown beside those of
            this one.

    Raises:
        RunError: if a folder has no readable configuration.
        OSError: if the file cannot be written.
    """
    root = Path(root)
    config, log = runs.read_config(root), Log(root / runs.LOG)

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
        compared=compare([root, *map(Path, against)]) if against else None,
        yaml=to_yaml(config),
        names=metric_name,
        charts_of=charts_of,
        timedelta=datetime.timedelta,
    )

    write_text(root / runs.REPORT, text)
    return root / runs.REPORT


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


def compare(roots: Sequence[Path]) -> dict[str, Any]:
    """Several runs side by side: their names, a chart for each curve of COMPARED and each metric,
    rows of fields that differ, and the last previews at the newest step that all of them have.

    Raises:
        RunError: if a folder has no readable configuration.
    """
    names = [f"{i + 1} {root.resolve().name}" for i, root in enumerate(roots)]
    logs = [Log(root / runs.LOG) for root in roots]
    configs = [to_dict(runs.read_config(root)) for root in roots]

    # The curves that at least two of them have.
    titles = COMPARED | {n: metric_name(n) for log in logs for n in log.curves if is_metric(n)}
    curves = {
        title: {name: log.curves[n] for name, log in zip(names, logs) if n in log.curves}
        for n, title in titles.items()
    }

    # The fields that differ.
    rows = []
    for section, fields in configs[0].items():
        for field in fields if isinstance(fields, dict) else ():
            values = [config[section][field] for config in configs]
            if any(value != values[0] for value in values) and field != "class_names":
                rows.append((f"{section}.{field}", values))

    # Previews of a step have the same seeds in every run.
    steps = [{path.stem for path in (root / runs.SAMPLES).glob("step-*.png")} for root in roots]
    common = max(set.intersection(*steps), default="")
    pictures = [list(frames(root / runs.SAMPLES, f"{common}.png")) for root in roots]
    return {
        "names": names,
        "charts": [chart(title, lines) for title, lines in curves.items() if len(lines) > 1],
        "rows": rows,
        "step": int(common.removeprefix("step-")) if common else None,
        "previews": [(name, found[0][1]) for name, found in zip(names, pictures) if found],
    }


class Log:
    """The records of a run: curves by name, events in order, the facts of each session, and the
    last step.
    """

    def __init__(self, path: Path):
        self.curves: dict[str, Curve] = {}
        self.events: list[tuple[Any, str]] = []  # step and text
        self.sessions: list[dict[str, Any]] = []
        self.step = 0
        self.damaged: list[int] = []  # numbers of lines that are passed over, from 1

        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        self._add(json.loads(line))
                    except DAMAGE:
                        if line.endswith("\n"):  # otherwise it is only unfinished
                            self.damaged.append(number)

        if self.damaged:
            some = ", ".join(map(str, self.damaged[:NAMED])) + (
                ", ..." if len(self.damaged) > NAMED else ""
            )
            self.events.append(
                (self.step, f"{path.name}: lines passed over, because they are damaged: {some}")
            )

    def _add(self, record: dict[str, Any]) -> None:
        step = step_in(record)
        self.step = step

        for name, value in record.items():
            if name == "session":
                what = "training continued" if value["from_step"] else "training began"
                self.events.append(
                    (value["from_step"], f"{what} at {value['time']} on {value['processor']}")
                )
                self.sessions.append(value)
            elif name == "left_out":
                self.events.append(
                    (step, f"not finite, left out: steps {', '.join(map(str, value))}")
                )
            elif isinstance(value, (int, float)) and math.isfinite(float(value)):
                x, y = self.curves.setdefault(name, Curve(array("d"), array("d")))
                x.append(step)
                y.append(value)

    def best(self, name: str) -> int:
        """The place of the best value of a metric in its curve."""
        higher = name.removeprefix("eval/").partition("@")[0] in HIGHER_IS_BETTER
        return int(np.argmax(self.curves[name].y) if higher else np.argmin(self.curves[name].y))


def step_in(record: Mapping[str, Any]) -> int:
    """The step of a record. Raises ValueError, KeyError or TypeError if it is missing or cannot be
    one.
    """
    step = record["step"]
    if type(step) is not int or not 0 <= step <= MANY:
        raise ValueError(f"{step!r:.40} is no step")
    return step


def is_metric(name: str) -> bool:
    """Whether a curve measures the averaged weights, so that its best point is worth a mark."""
    return (
        name.startswith(("eval/", "held_out")) and "/q" not in name and not name.endswith("_error")
    )


def differences(config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and usual value of each field that differs from the preset; from the defaults
    without a preset.
    """
    usual = to_dict(load_config(config.preset) if config.preset in preset_names() else Config())
    for section, fields in to_dict(config).items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            if value != usual[section][name] and name != "class_names":
                yield f"{section}.{name}", value, usual[section][name]


def frames(folder: Path, pattern: str = "step-*.png") -> Iterator[tuple[int, str]]:
    """Step and data URL of previews at evenly spread steps. A large picture is shrunk, a damaged
    one left out.
    """
    every = sorted(folder.glob(pattern))
    for i in np.unique(
        np.linspace(0, len(every) - 1, min(PICTURES, len(every))).round().astype(int)
    ):
        with contextlib.suppress(OSError, DataError, ValueError), open_image(every[i]) as image:
            kind, content = "png", every[i].read_bytes()

            if len(content) > LARGE:
                image.thumbnail((WIDTH, 10 * WIDTH))
                shrunk = io.BytesIO()
                image.convert("RGB").save(shrunk, "WEBP", quality=85)
                kind, content = "webp", shrunk.getvalue()

            url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
            yield int(every[i].stem.removeprefix("step-")), url


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
        yield chart(metric_name(name), averages, (curve.x[place], curve.y[place]))
    for title, labels in chosen.items():
        if curves := {label: log.curves[n] for n, label in labels.items() if n in log.curves}:
            yield chart(title, curves)


def metric_name(name: str) -> str:
    """A metric's name for people; the decay of a further average stays behind it."""
    short, at, decay = name.removeprefix("eval/").partition("@")
    return NAMES.get(short, short.replace("_", " ").capitalize()) + at + decay


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
