"""The log of a run, read as the curves, events and facts that its page shows."""

import json
import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffussm_cli.config import MANY, METRIC_FACTS
from diffussm_cli.pages import Curve

# what a line that is no record raises
DAMAGE = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
NAMED = 5  # damaged lines that are listed
AT_END = "seconds_at_end"  # in the last record of a session: its seconds with all that came later


class Log:
    """The records of a run.

    Attributes:
        curves: values by step, by name.
        events: the step and the text of each, in order.
        sessions: the facts of each start of training.
        step: the last one.
        seconds: of all sessions together, by kind of work.
        clock: hours since the run began, by step; pauses between two sessions do not count. Empty
            in logs of earlier versions.
        damaged: numbers of lines that are passed over, from 1.
    """

    def __init__(self, path: Path):
        self.curves: dict[str, Curve] = {}
        self.events: list[tuple[Any, str]] = []
        self.sessions: list[dict[str, Any]] = []
        self.step = 0
        self.seconds: dict[str, float] = {}
        self.clock = Curve(array("d"), array("d"))
        self.damaged: list[int] = []
        self._before: dict[str, float] = {}  # seconds of the sessions before this one

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
                self._before = dict(self.seconds)
            elif name == "left_out":
                self.events.append(
                    (step, f"not finite, left out: steps {', '.join(map(str, value))}")
                )
            elif name == "seconds" and isinstance(value, dict):
                self.seconds = self._together(value)
                self.clock.x.append(step)
                self.clock.y.append(sum(self.seconds.values()) / 3600)
            elif name == AT_END and isinstance(value, dict):
                self.seconds = self._together(value)
            elif isinstance(value, (int, float)) and math.isfinite(float(value)):
                x, y = self.curves.setdefault(name, Curve(array("d"), array("d")))
                x.append(step)
                y.append(value)

    def _together(self, seconds: Mapping[str, Any]) -> dict[str, float]:
        """The seconds of a session so far, with those of the sessions before. Raises ValueError,
        TypeError.
        """
        now = dict(self._before)
        for part, value in seconds.items():
            if not 0 <= value <= MANY:
                raise ValueError(f"{value!r:.40} are no seconds")
            now[part] = self._before.get(part, 0.0) + value
        return now

    def summary(self) -> dict[str, float]:
        """What a run has cost and reached, by name; what the log does not say is left out.

        Step, seconds, the median of images per second, the highest peak of memory in GiB, the last
        loss, and the best value of each metric.
        """
        values: dict[str, float] = {"step": self.step}

        # What it has cost.
        if self.seconds:
            values["seconds"] = sum(self.seconds.values())
        if rates := self.curves.get("images_per_second"):
            values["images_per_second"] = float(np.median(rates.y))
        if memory := self.curves.get("peak_memory_gib"):
            values["peak_memory_gib"] = max(memory.y)

        # What it has reached.
        if loss := self.curves.get("loss"):
            values["loss"] = loss.y[-1]
        for name in filter(is_metric, self.curves):
            values[f"best {name}"] = self.curves[name].y[self.best(name)]
        return values

    def best(self, name: str) -> int:
        """The place of the best value of a metric in its curve."""
        metric = METRIC_FACTS.get(name.removeprefix("eval/").partition("@")[0])
        higher = metric is not None and metric.higher_is_better  # a held-out loss is no metric
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
