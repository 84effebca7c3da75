"""HTML pages that need no network: their frame with its styles (page.html), and charts as inline SVG.

A page is a template of Jinja that extends page.html. All text is escaped.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

POINTS = 500  # most points of a curve
LEFT, RIGHT, TOP, BOTTOM = 44, 354, 12, 150  # where a chart lies in its picture


class Curve(NamedTuple):
    """Values by step, as two sequences of numbers or arrays."""

    x: Any
    y: Any


def render(template: str, script: str = "", **content: Any) -> str:
    """A page from the template at a path in the package, with its `title` and a script, which alone may run."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(content, script=script, script_hash=digest)


def chart(
    title: str, curves: Mapping[str, Curve], best: tuple[float, float] | None = None, marks: Sequence[float] = ()
) -> dict[str, Any]:
    """What the page draws: lines, ticks and the best point, placed in the picture.

    Positive values that differ by more than 30 times get a log scale. So does x if its ticks are given, `marks`; they
    begin and end the axis, which otherwise begins at 0.
    """
    thinned = [thin(curve) for curve in curves.values()]
    every = np.concatenate([y for _, y in thinned])
    log = every.min() > 0 and every.max() > 30 * every.min()
    low, high = (math.log10(v) if log else float(v) for v in (every.min(), every.max()))
    margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
    scale, label = (np.log, "{:g}") if marks else (np.asarray, "{:,.0f}")
    if not marks:
        first, last = min(0.0, *(x[0] for x, _ in thinned)), max(1.0, *(x[-1] for x, _ in thinned))
        marks = (first, (first + last) / 2, last)
    start, *_, end = scale(marks)

    def across(x: Any) -> Any:
        return LEFT + (RIGHT - LEFT) * (scale(x) - start) / (end - start)

    def down(y: Any) -> Any:
        y = np.log10(y) if log else y
        return BOTTOM - (BOTTOM - TOP) * (y - low + margin) / (high - low + 2 * margin)

    ticks = [10.0**tick if log else tick for tick in round_values(low - margin, high + margin, whole=bool(log))]
    return {
        "title": title,
        "lines": [" ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(x, y)) for x, y in thinned],
        "legend": list(zip(curves, (curve.y[-1] for curve in curves.values()))),
        "rows": [(down(tick), number(tick) if abs(tick) < 1e5 else f"{tick:.0e}") for tick in ticks],
        "columns": [(across(x), label.format(x)) for x in marks],
        "best": best and {"x": across(best[0]), "y": down(best[1]), "step": best[0], "value": best[1]},
    }


def thin(curve: Curve) -> Curve:
    """At most POINTS points: the lowest and the highest value of every stretch, so that spikes remain."""
    x, y = np.asarray(curve.x), np.asarray(curve.y)
    if len(y) <= POINTS:
        return Curve(x, y)
    stretches = np.array_split(np.arange(len(y)), POINTS // 2)
    kept = np.unique([(s[y[s].argmin()], s[y[s].argmax()]) for s in stretches])
    return Curve(x[kept], y[kept])


def round_values(low: float, high: float, whole: bool) -> list[float]:
    """Two to seven round numbers between two numbers, or whole ones."""
    most = (high - low) / 2.5
    size = 10.0 ** math.floor(math.log10(most))
    step = max(size * m for m in (1, 2, 5) if size * m <= most)
    step = max(1, round(step)) if whole else step
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def number(value: float) -> str:
    """A number for people to read, with three digits or more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
