"""The style of every figure: readable on a light and on a dark page, and at half its size.

The background is transparent. Text and lines have colours of medium luminance. `name_ends` writes the name of a curve
at its end, which reads better than a legend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GREY = "#808080"  # text and axes
#: Curves, in this order. Each has a contrast of at least 3 with white and with a dark page.
COLOURS = ("#1f77b4", "#d2600a", "#2a8f3c", "#d13438", "#8f63c0", "#9a6a45", "#c9489c", "#12848f", "#7d7f12", "#5c6f8a")

_FONT = 14  # points
_DPI = 120
_STYLE = {
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "axes.titlecolor": GREY, "text.color": GREY, "xtick.color": GREY,
    "ytick.color": GREY, "grid.color": GREY, "grid.alpha": 0.25, "axes.grid": True, "font.size": _FONT,
    "axes.titlesize": _FONT, "axes.titlelocation": "left", "axes.titlepad": 12, "axes.spines.top": False,
    "axes.spines.right": False, "savefig.transparent": True, "lines.linewidth": 2.0, "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.12, "figure.constrained_layout.h_pad": 0.12, "svg.hashsalt": "mru_kernels",
}  # fmt: skip

End = tuple[str, float, float, str]  # the name of a curve, its last point x and y, its colour


@contextmanager
def canvas(file: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 5.5)) -> Iterator[list[Any]]:
    """A context that gives the axes of a figure, row by row, and writes the figure of `size` inches to `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        yield list(axes.flat)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=_DPI)
        pyplot.close(figure)


def name_ends(axes: Any, ends: Sequence[End]) -> None:
    """Write the name of each curve to the right of its end, without overlap. Set the limits of the axes before."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((x, y))[1] for _, x, y, _ in ends]
    gap = 1.3 * _FONT / 72 / (axes.get_position().height * axes.figure.get_figheight())  # the height of a line of text
    for (name, x, y, colour), height in zip(ends, apart(heights, gap), strict=True):
        axes.annotate(
            name, (x, y), (1.03, height), textcoords="axes fraction", color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkB": 3},
        )  # fmt: skip


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved as little as needed for a distance of `gap` between neighbours, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[tuple[float, int]] = []  # centre and number of places that touch
    for i in order:
        centre, count = places[i], 1
        while groups and centre - (count - 1) * gap / 2 < groups[-1][0] + (groups[-1][1] + 1) * gap / 2:
            other, others = groups.pop()
            centre, count = (centre * count + other * others) / (count + others), count + others
        groups.append((centre, count))
    moved = [centre + (k - (count - 1) / 2) * gap for centre, count in groups for k in range(count)]
    found = dict(zip(order, moved, strict=True))
    return [found[i] for i in range(len(places))]
