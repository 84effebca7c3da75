"""Figures of cost against resolution, readable in greyscale."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffussm_cli.errors import ConfigError, writing
from diffussm_cli.machine.files import check_output, whole_file
from diffussm_cli.profiling.flops import cost
from diffussm_cli.profiling.models import display_name, named_model

FIGURE_3 = ("dit-xl/2", "dit-xl/1", "dit-xl/1-m2", "xl/1-m1", "xl/1-m2")
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
        raise ConfigError("--figure: drawing needs matplotlib: pip install 'diffussm[figures]'") from e


def figure_3() -> Curves:
    """Forward Gflops by resolution, as figure 3 of the paper compares them."""
    curves = {}
    for name in FIGURE_3:
        configs = [named_model(name, resolution) for resolution in RESOLUTIONS]
        label = display_name(configs[0])
        curves[label if "M=" in label or "DiT" in label else f"{label} M=2"] = (
            RESOLUTIONS,
            [cost(config).gflops for config in configs],
        )
    return curves


def draw(panels: Mapping[str, Curves], path: Path) -> None:
    """Draw one log-log panel per title. Each curve shows a quantity against resolution and is labelled at its end.

    Raises:
        ConfigError: if the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, NullLocator

    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.6), squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        _draw_panel(axis, curves)
        ticks = sorted({r for x, _ in curves.values() for r in x})
        axis.set(xscale="log", yscale="log", xlabel="image resolution (pixels per side)", ylabel=title)
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(ticks[0] / 1.05, ticks[-1] * (ticks[-1] / ticks[0]) ** 0.42)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines["bottom"].set_bounds(ticks[0], ticks[-1])
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    figure.tight_layout()
    try:
        with writing(f"--figure: cannot write {str(path)!r}", ConfigError), whole_file(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix("."), dpi=160)
    finally:
        pyplot.close(figure)


def _draw_panel(axis, curves: Curves) -> None:
    ends = []
    members = dict.fromkeys(SHADES, 0)
    for i, (name, (x, y)) in enumerate(curves.items()):
        family = "DiffuSSM" if name.startswith("DiffuSSM") else "DiT"
        style = {"color": SHADES[family], "linestyle": DASHES[members[family] % 4], "marker": MARKERS[i % 5]}
        axis.plot(x, y, markersize=4.5, linewidth=1.6, **style)
        members[family] += 1
        ends.append((math.log(y[-1]), x[-1], name, SHADES[family]))
    for height, (_, at, name, shade) in zip(_spread([e[0] for e in sorted(ends)], _span(curves) * 0.055), sorted(ends)):
        axis.annotate(
            name, (at, math.exp(height)), (9, 0), textcoords="offset points", va="center", fontsize=9, color=shade
        )


def _span(curves: Curves) -> float:
    values = [math.log(v) for _, y in curves.values() for v in y]
    return max(values) - min(values)


def _spread(heights: list[float], gap: float) -> list[float]:
    """Heights in ascending order, moved up where labels would overlap."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    return placed
