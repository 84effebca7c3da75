"""Figures of cost against resolution, readable in greyscale."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffussm_cli.config import Config
from diffussm_cli.errors import ConfigError, install, writing
from diffussm_cli.machine.files import check_output, whole_file
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.paper import named_model

FIGURE_3 = {  # label: name of the model
    "DiT-XL/2": "dit-xl/2",
    "DiT-XL/1": "dit-xl/1",
    "DiT-XL/1 M=2": "dit-xl/1-m2",
    "DiffuSSM-XL M=1": "xl/1-m1",
    "DiffuSSM-XL M=2": "xl/1-m2",
}
RESOLUTIONS = (256, 512, 768, 1024, 1536, 2048)
SUFFIXES = (".png", ".svg", ".pdf")
# A family of models shares a shade; its members differ in dash and marker.
SHADES = {"DiT": "#8c8c8c", "DiffuSSM": "#000000"}
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v")

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # by name: resolutions and values


def check_figure(path: Path) -> None:
    """Raises ConfigError for a file that cannot be drawn, or without matplotlib."""
    check_output(path, "--figure", SUFFIXES)
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as e:
        raise ConfigError(f"--figure: drawing needs matplotlib: {install('figures')}") from e


def figure_3() -> Curves:
    """Forward Gflops by resolution, as figure 3 of the paper compares them."""
    curves = {}
    for label, name in FIGURE_3.items():
        gflops = [cost(named_model(name, resolution)).gflops for resolution in RESOLUTIONS]
        curves[label] = (RESOLUTIONS, gflops)
    return curves


def panels(result: Mapping[str, Any], configs: Sequence[Config]) -> dict[str, Curves]:
    """Curves by title: figure 3, and time and memory if several resolutions were measured.

    Args:
        result: of `profile`, with its models in the order of `configs`.
    """
    measured: dict[str, dict[str, tuple[list[int], list[float]]]] = {}

    def add(title: str, model: str, side: int, value: float) -> None:
        x, y = measured.setdefault(title, {}).setdefault(model, ([], []))
        x.append(side)
        y.append(value)

    for entry, config in zip(result["models"], configs):
        height, width = config.data.size
        side = round((height * width) ** 0.5)
        for kind, values in entry.get("measured", {}).items():
            add(f"{kind} (seconds)", entry["name"], side, values["median_ms"] / 1e3)
            if values["peak_bytes"] is not None:
                gib = values["peak_bytes"] / 2**30
                add(f"peak memory of {kind} (GiB)", entry["name"], side, gib)

    curves_by_title: dict[str, Curves] = {"Gflops of a forward pass": figure_3()}
    for title, curves in measured.items():
        if all(len(set(x)) > 1 for x, _ in curves.values()):
            curves_by_title[title] = curves
    return curves_by_title


def draw(panels: Mapping[str, Curves], path: Path) -> None:
    """Draw one log-log panel per title: curves against resolution, labelled at their ends.

    Raises:
        ConfigError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (6.4 * len(panels), 4.6)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        _draw_curves(axis, curves)
        _draw_axes(axis, title, sorted({side for x, _ in curves.values() for side in x}))
    figure.tight_layout()
    try:
        message = f"--figure: cannot write {str(path)!r}"
        with writing(message, ConfigError), whole_file(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix("."), dpi=160)
    finally:
        pyplot.close(figure)


def _draw_curves(axis: Any, curves: Curves) -> None:
    # Lines.
    members = dict.fromkeys(SHADES, 0)
    labels = []
    for i, (name, (x, y)) in enumerate(curves.items()):
        family = "DiffuSSM" if name.startswith("DiffuSSM") else "DiT"
        axis.plot(
            x,
            y,
            color=SHADES[family],
            linestyle=DASHES[members[family] % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            linewidth=1.6,
        )
        members[family] += 1
        labels.append((math.log(y[-1]), x[-1], name, SHADES[family]))

    # Labels at their ends, from the lowest to the highest.
    logs = [math.log(value) for _, y in curves.values() for value in y]
    gap = 0.055 * (max(logs) - min(logs))
    labels.sort()
    heights = spread([height for height, *_ in labels], gap)
    for height, (_, side, name, shade) in zip(heights, labels):
        axis.annotate(
            name,
            (side, math.exp(height)),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=shade,
        )


def _draw_axes(axis: Any, title: str, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axis.set(xscale="log", yscale="log", xlabel="image resolution (pixels per side)", ylabel=title)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    # Room on the right for the labels of the curves.
    axis.set_xlim(ticks[0] / 1.05, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.42)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines["bottom"].set_bounds(ticks[0], ticks[-1])
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in ascending order, moved up where they would be closer than `gap`."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    return placed
