"""SVG of a plot: its colours follow the page, or the reader's light or dark; text of runs is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from textwrap import wrap

from kdbench.files import write_atomically
from kdbench.results.plots.plot import COLOURS, DASHES, Axis, Cells, Plot, Series

WIDTH, HEIGHT = 480, 300  # of the axes and what is around them; the legend comes below
_LEFT, _RIGHT, _TOP, _BOTTOM, _LINE = 68, 14, 10, 46, 19
_LETTERS = 18  # of a class' name beside an axis, and
_ALONG = 56  # of a line of the legend

_COLOURS = "".join(f".c{i}{{--c:{'var(--ink)' if colour == 'ink' else colour}}}" for i, colour in enumerate(COLOURS))
STYLE = f"""
svg.plot{{--ink:#1a1a1a;--faint:#d9d9d9;--soft:#8a8a8a;--paper:#fff;--heat:#0072b2;
font:13px system-ui,sans-serif;color:var(--ink)}}
@media (prefers-color-scheme:dark){{
svg.plot{{--ink:#e8e8e8;--faint:#3d3d3d;--soft:#9a9a9a;--paper:#161616;--heat:#56b4e9}}}}
@media print{{svg.plot{{--ink:#000;--faint:#ccc;--soft:#777;--paper:#fff;--heat:#0072b2}}}}
.plot text{{fill:var(--ink);stroke:none}}
.plot .grid{{stroke:var(--faint);stroke-width:1}}
.plot .frame{{stroke:var(--soft);stroke-width:1;fill:none}}
.plot .line{{stroke:var(--c);stroke-width:2;fill:none;stroke-linejoin:round}}
.plot .bar{{stroke:var(--c);stroke-width:1.3;fill:none}}
.plot .band{{fill:var(--c);fill-opacity:.15;stroke:none}}
.plot .dot{{fill:var(--c);stroke:var(--paper);stroke-width:1}}
.plot .cell{{fill:var(--heat)}}
.plot .gray{{--c:var(--soft)}}
{_COLOURS}"""


def svg(plot: Plot, alone: bool = False) -> str:
    """The plot as an element of a page; `alone`: as a file of its own, with its style."""
    named = [(one, _lines(one.name)) for one in plot.series if one.name]
    below = HEIGHT + (_under(plot.cells) if plot.cells else 0)
    height = below + _LINE * sum(len(lines) for _, lines in named) + (6 if named else 0)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {height}" role="img"'
    parts = [f'{head} aria-label="{escape(plot.title)}"><title>{escape(plot.title)}</title>']
    parts += [f"<style>{STYLE}svg{{background:var(--paper)}}</style>"] if alone else []
    if plot.cells is not None:
        parts += _cells(plot.cells, plot)
    else:
        parts += [*_axes(plot), *(part for one in plot.series for part in _series(one, plot))]
    for one, lines in named:
        parts += _legend(one, lines, below + 6)
        below += _LINE * len(lines)
    return "\n".join([*parts, "</svg>"])


def write_svg(folder: Path, plots: Sequence[Plot]) -> list[Path]:
    """A file for each plot; their paths."""
    paths = [folder / f"{plot.name}.svg" for plot in plots]
    for path, plot in zip(paths, plots, strict=True):
        write_atomically(path, partial(_write, svg(plot, alone=True)))
    return paths


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")


def _left(plot: Plot) -> float:
    """Where the axes begin: the names of an axis of names have room."""
    longest = max((len(text) for _, text in plot.y.ticks), default=0)
    return _LEFT + 6.2 * max(0, min(longest, _LETTERS) - 7)


def _x(plot: Plot, value: float) -> float:
    left = _left(plot)
    return left + (WIDTH - left - _RIGHT) * plot.x.place(value)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * axis.place(value)


def _axes(plot: Plot) -> Iterator[str]:
    left, right, bottom = _left(plot), WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for value, text in plot.x.ticks:
        x = _x(plot, value)
        yield f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>'
    for value, text in plot.y.ticks:
        y = _y(plot.y, value)
        yield f'<path class="grid" d="M{left:.1f} {y:.1f}H{right}"/>'
        small = ' style="font-size:11px"' if len(text) > 6 else ""  # beside the axis' title
        about = f'x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end"'
        yield f"<text {about}{small}>{escape(_cut(text, _LETTERS))}</text>"
    yield f'<path class="frame" d="M{left:.1f} {_TOP}H{right}V{bottom}H{left:.1f}Z"/>'
    yield from _titles(plot, left)


def _titles(plot: Plot, left: float, under: float = 0) -> Iterator[str]:
    x, y = (left + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    yield f'<text x="{x:.1f}" y="{HEIGHT + under - 8:.1f}" text-anchor="middle">{escape(_cut(plot.x.title, 60))}</text>'
    turned = f'transform="translate(13 {y}) rotate(-90)" text-anchor="middle"'
    yield f"<text {turned}>{escape(_cut(plot.y.title, 36))}</text>"


def _series(one: Series, plot: Plot) -> Iterator[str]:
    kind, dash = _classes(one)
    at = [(_x(plot, x), _y(plot.y, y)) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y) and x == x]
    yield from _spread(one, plot, kind)
    if one.kind in ("line", "marked") and len(at) > 1:
        yield f'<path class="line {kind}"{dash} d="M{_way(at)}"/>'
    if one.kind != "line" or len(at) == 1:
        yield "".join(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in at)


def _spread(one: Series, plot: Plot, kind: str) -> Iterator[str]:
    """The band of a line, or the bars of points."""
    places = zip(one.x, one.y, one.low or (), one.high or (), strict=False)
    known = [place for place in places if math.isfinite(place[2]) and math.isfinite(place[3])]
    if not known:
        return
    if one.kind == "across":
        bars = [f"M{_x(plot, low):.1f} {_y(plot.y, y):.1f}H{_x(plot, high):.1f}" for _, y, low, high in known]
        yield f'<path class="bar {kind}" d="{"".join(bars)}"/>'
        return
    ends = [(_x(plot, x), _y(plot.y, low), _y(plot.y, high)) for x, _, low, high in known]
    if one.kind == "line":
        way = [*((x, high) for x, _, high in ends), *((x, low) for x, low, _ in reversed(ends))]
        yield f'<path class="band {kind}" d="M{_way(way)}Z"/>'
    else:
        bars = [f"M{x:.1f} {low:.1f}V{high:.1f}" for x, low, high in ends]
        yield f'<path class="bar {kind}" d="{"".join(bars)}"/>'


def _classes(one: Series) -> tuple[str, str]:
    """The class of a series' colour, and its dashes."""
    if one.colour < 0:
        return "gray", ' stroke-dasharray="2 3"'
    dash = DASHES[one.colour % len(DASHES)]
    return f"c{one.colour % len(COLOURS)}", f' stroke-dasharray="{dash}"' if dash else ""


def _lines(name: str) -> list[str]:
    """A name in the legend, on as many lines as it takes: what tells two settings apart may be its end."""
    return wrap(name.replace(",", ", ").replace(",  ", ", "), _ALONG, break_on_hyphens=False) or [name]


def _legend(one: Series, lines: Sequence[str], top: float) -> Iterator[str]:
    kind, dash = _classes(one)
    y = top + 9
    if one.kind in ("line", "marked"):
        yield f'<path class="line {kind}"{dash} d="M{_RIGHT} {y}h34"/>'
    if one.kind != "line":
        yield f'<circle class="dot {kind}" cx="{_RIGHT + 17}" cy="{y}" r="4"/>'
    for number, line in enumerate(lines):
        yield f'<text x="{_RIGHT + 42}" y="{y + 4 + _LINE * number}">{escape(line)}</text>'


def _beside(cells: Cells) -> int:
    """Letters of the longest name of a row or column, as far as there is room for it."""
    return min(_LETTERS, max(map(len, [*cells.rows, *cells.columns]), default=0))


def _under(cells: Cells) -> float:
    """What the turned names of columns need below the plot, beyond those of six letters."""
    return 6.0 * max(0, _beside(cells) - 6)


def _cells(cells: Cells, plot: Plot) -> Iterator[str]:
    letters = _beside(cells)
    left = 35 + 6.6 * max(letters, 8)
    width = (WIDTH - left - _RIGHT) / max(len(cells.columns), 1)
    height = (HEIGHT - _TOP - 78) / max(len(cells.rows), 1)
    small = f' style="font-size:{10 if len(cells.rows) > 10 else 12}px"'
    for i, (name, values) in enumerate(zip(cells.rows, cells.values, strict=True)):
        y = _TOP + i * height
        at = f'x="{left - 5:.1f}" y="{y + height / 2 + 4:.1f}" text-anchor="end"'
        yield f"<text {at}{small}>{escape(_cut(name, letters))}</text>"
        for j, share in enumerate(values):
            about = escape(f"{name} / {cells.columns[j]}: {100 * share:.1f} %")
            place = f'x="{left + j * width:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}"'
            shade = f'fill-opacity="{0.03 + 0.97 * math.sqrt(share):.3f}"'
            yield f'<rect class="cell" {place} {shade}><title>{about}</title></rect>'
    foot = HEIGHT - 62
    for j, name in enumerate(cells.columns):
        x = left + (j + 0.5) * width
        turned = f'transform="translate({x + 4:.1f} {foot}) rotate(-60)" text-anchor="end"'
        yield f"<text {turned}{small}>{escape(_cut(name, letters))}</text>"
    yield from _titles(plot, left, _under(cells))


def _way(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
