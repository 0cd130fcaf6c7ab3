"""PNG of a plot, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kdbench.files import write_atomically
from kdbench.results.plots.plot import COLOURS, DASHES, Plot, Series


def write_png(folder: Path, plots: Sequence[Plot]) -> list[Path]:
    """A file for each plot; their paths."""
    from matplotlib.figure import Figure  # half a second

    paths = [folder / f"{plot.name}.png" for plot in plots]
    for path, plot in zip(paths, plots, strict=True):
        figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
        _draw(figure.add_subplot(), plot)
        write_atomically(path, partial(figure.savefig, format="png"))
    return paths


def _draw(axes: Any, plot: Plot) -> None:
    axes.set_title(_plain(plot.title), fontsize=10)
    axes.set_xlabel(_plain(plot.x.title))
    axes.set_ylabel(_plain(plot.y.title))
    if plot.cells is not None:
        axes.imshow(
            [[share**0.5 for share in row] for row in plot.cells.values], cmap="Blues", vmin=0, vmax=1, aspect="auto"
        )
        axes.set_xticks(range(len(plot.cells.columns)), map(_plain, plot.cells.columns), rotation=60, ha="right")
        axes.set_yticks(range(len(plot.cells.rows)), map(_plain, plot.cells.rows))
        return
    for one in plot.series:
        _add(axes, one, plot)
    for axis, place in ((axes.xaxis, plot.x), (axes.yaxis, plot.y)):
        axis.set_ticks([place.place(value) for value, _ in place.ticks], [_plain(text) for _, text in place.ticks])
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    if any(one.name for one in plot.series):
        axes.figure.legend(fontsize=7, loc="outside lower center")  # beside the data, never on it


def _add(axes: Any, one: Series, plot: Plot) -> None:
    """A series in shares of the axes: their logarithms, and what lies beyond, are the plot's own."""
    name = COLOURS[one.colour % len(COLOURS)] if one.colour >= 0 else "gray"
    colour = "black" if name == "ink" else name
    x, y = [plot.x.place(value) for value in one.x], [plot.y.place(value) for value in one.y]
    dash = DASHES[one.colour % len(DASHES)] if one.colour >= 0 else "2 3"
    style: Any = (0, tuple(map(float, dash.split()))) if dash else "-"
    style = style if one.kind in ("line", "marked") else "none"
    mark = {"marker": "o", "markersize": 4} if one.kind != "line" or len(x) == 1 else {}
    axes.plot(x, y, color=colour, label=_plain(one.name) or None, linestyle=style, **mark)
    if one.low is None or one.high is None:
        return
    along = plot.x if one.kind == "across" else plot.y
    low, high = ([along.place(value) for value in values] for values in (one.low, one.high))
    if one.kind == "line":
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    elif one.kind == "across":
        axes.hlines(y, low, high, color=colour, linewidth=1)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=1)


def _plain(text: str) -> str:
    """Text of runs is no formula of matplotlib's, and a name that begins with _ has a place in the legend."""
    return text.replace("$", r"\$").removeprefix("_")
