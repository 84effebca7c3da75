"""HTML pages that need no network: their frame (page.html), and charts as inline SVG.

A page is a template of Jinja that extends page.html. All text is escaped.
"""

import base64
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

POINTS = 500  # most points of a curve
LEFT, RIGHT, TOP, BOTTOM = 44, 354, 12, 150  # where a chart lies in its picture
LEAST = 1e-300  # what stands for zero on a log scale
LEAST_RANGE = 0.02  # of a chart, as a share of its highest value
# A mean at each value of a curve: of this share of all values on either side, but not of more than
# so many; none of a curve with fewer values than LONG.
SHARE, MOST, LONG = 0.05, 500, 40


class Curve(NamedTuple):
    """Values by step, as two sequences of numbers or arrays."""

    x: Any
    y: Any


class _Line(NamedTuple):
    """A line of a chart: a curve, or the mean of one; both have the place of the curve."""

    name: str
    curve: Curve
    place: int
    is_mean: bool = False


def render(template: str, script: str = "", **content: Any) -> str:
    """A page from a template in the package. No script but the given one may run on it."""
    # The page's security policy admits the script with this hash and no other.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(template).render(content, script=script, script_hash=digest)


@functools.cache
def _environment() -> jinja2.Environment:
    """It keeps the templates that it has compiled: a run writes its page again and again."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = number
    return environment


def chart(
    title: str,
    curves: Mapping[str, Curve],
    best: tuple[float, float] | None = None,
    *,
    early: float = 0.0,
    linear: bool = False,
    averaged: bool = False,
    runs: Sequence[int] = (),
) -> dict[str, Any]:
    """What the page draws: lines, ticks and the best point (step, value), placed in the picture.

    The axis of steps begins at 0. Positive values that differ by more than 30 times get a log
    scale.

    Args:
        early: the share at the beginning of each curve that does not count for the range of the
            values. What lies outside of the range is cut off, and the legend says where a curve
            begins.
        linear: never a log scale.
        averaged: whether each long curve is faint below a line of its moving mean.
        runs: of several runs on a page, those of the curves.
    """
    lines = [_Line(name, curve, i) for i, (name, curve) in enumerate(curves.items())]
    means = [mean for line in lines if (mean := _mean_of(line))] if averaged else []
    faint = {mean.place for mean in means}
    lines += means  # on top
    thinned = [thin(line.curve) for line in lines]

    # The range of the values, with a margin.
    values = np.concatenate([_late(curve, early) for curve in thinned])
    if best:
        values = np.append(values, best[1])
    log = not linear and values.min() > 0 and values.max() > 30 * values.min()
    low = math.log10(values.min()) if log else float(values.min())
    high = math.log10(values.max()) if log else float(values.max())
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    if not log:  # so wide that ticks of three digits differ
        margin = max(margin, (LEAST_RANGE * abs(high) - (high - low)) / 2)
    low -= margin
    high += margin

    # The range of the steps.
    start = min(0.0, *(x[0] for x, _ in thinned))
    end = max(1.0, *(x[-1] for x, _ in thinned))

    def across(x: Any) -> Any:
        return LEFT + (RIGHT - LEFT) * (np.asarray(x) - start) / (end - start)

    def down(y: Any) -> Any:
        y = np.log10(np.maximum(y, LEAST)) if log else y
        return BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low)

    def is_outside(y: float) -> bool:
        return not TOP <= down(y) <= BOTTOM

    ticks = [10.0**tick if log else tick for tick in round_values(low, high, integers=bool(log))]
    steps = (start, (start + end) / 2, end)
    return {
        "title": title,
        "lines": [_points(across(x), down(y)) for x, y in thinned],
        "runs": [runs[line.place] if runs else 0 for line in lines],
        "colours": [line.place for line in lines],
        "faint": [line.place in faint and not line.is_mean for line in lines],
        "data": [(_numbers(x, 7), _numbers(y, 4)) for x, y in thinned],
        "legend": [(line.name, line.curve.y[-1]) for line in lines],
        "begins": [
            y[0] if is_outside(y[0]) and not line.is_mean else None
            for line, (_, y) in zip(lines, thinned)
        ],
        "rows": [(down(y), number(y) if abs(y) < 1e5 else f"{y:.0e}") for y in ticks],
        "columns": [(across(x), f"{x:,.0f}") for x in steps],
        "best": best
        and {"x": across(best[0]), "y": down(best[1]), "step": best[0], "value": best[1]},
    }


def _mean_of(line: _Line) -> _Line | None:
    """The line of the means of another one, if that is long enough."""
    curve, size = moving_mean(line.curve)
    name = f"{line.name}, mean of {size} records".removeprefix(", ")
    return _Line(name, curve, line.place, is_mean=True) if size > 1 else None


def _late(curve: Curve, early: float) -> Any:
    """The values of a curve after a share of its steps; all, if there are none."""
    x, y = curve
    late = y[x > early * x[-1]]
    return late if early and len(late) else y


def _numbers(values: Any, digits: int) -> str:
    """Numbers with some digits, as the script of a page reads them."""
    return " ".join(f"{value:.{digits}g}" for value in values)


def _points(x: Any, y: Any) -> str:
    """Coordinates as SVG writes the points of a line."""
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))


def moving_mean(curve: Curve) -> tuple[Curve, int]:
    """The mean around each value of a curve, and of how many values it is: an odd number, or 1 for
    a short curve. Near the beginning it is of as many on either side as there are, because a loss
    falls there; near the end, of all that are left.
    """
    y = np.asarray(curve.y, dtype=float)
    n = len(y)
    side = min(int(SHARE * n), MOST) if n >= LONG else 0
    size = 2 * side + 1

    means = y.copy()
    means[side : n - side] = np.lib.stride_tricks.sliding_window_view(y, size).mean(1)
    for i in range(side):
        means[i] = y[: 2 * i + 1].mean()
        means[n - 1 - i] = y[n - 1 - i - side :].mean()
    return Curve(curve.x, means), size


def thin(curve: Curve) -> Curve:
    """At most POINTS points: the lowest and highest of every stretch, so that spikes remain."""
    x, y = np.asarray(curve.x), np.asarray(curve.y)
    if len(y) <= POINTS:
        return Curve(x, y)
    stretches = np.array_split(np.arange(len(y)), POINTS // 2)
    extremes = np.unique([(s[y[s].argmin()], s[y[s].argmax()]) for s in stretches])
    return Curve(x[extremes], y[extremes])


def round_values(low: float, high: float, integers: bool) -> list[float]:
    """Two to seven round numbers between two numbers; on request only integers."""
    # The largest of 1, 2 and 5 times a power of ten that fits at least two and a half times.
    longest = (high - low) / 2.5
    size = 10.0 ** math.floor(math.log10(longest))
    step = max(size * m for m in (1, 2, 5) if size * m <= longest)
    if integers:
        step = max(1, round(step))

    first = math.ceil(low / step)
    last = math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number for people to read, with three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
