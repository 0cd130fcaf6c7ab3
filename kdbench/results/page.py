"""Page: a comparison as one HTML file that needs no network: table, verdicts, plots, and what a checklist asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from kdbench.files import write_atomically
from kdbench.results.checklist import checklist
from kdbench.results.plots.images import classes, confusion, reliability
from kdbench.results.plots.plot import MOST_SERIES, Plot
from kdbench.results.plots.runs import candidates, costs, curves, sweeps
from kdbench.results.plots.svg import STYLE, svg
from kdbench.results.render import WORDS, cells, heading, verdict_cells
from kdbench.results.rows import Comparison
from kdbench.results.verdicts import Verdicts

MOST_ROWS = 500  # of a table; a browser is slow to lay out more

_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#5f5f5f;--faint:#e2e2e2;--paper:#fff;--good:#00664a;--bad:#a34400}
@media (prefers-color-scheme:dark){
:root{--ink:#e8e8e8;--soft:#a8a8a8;--faint:#333;--paper:#161616;--good:#4fd1a5;--bad:#ff9a4d}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:80rem;background:var(--paper);color:var(--ink);
font:16px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p,figcaption,footer{color:var(--soft)}p{margin:.3rem 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}
th{position:sticky;top:0;background:var(--paper)}
.word{text-align:left}.told{white-space:normal;min-width:9rem}
tbody tr{background:var(--paper)}td:first-child{position:sticky;left:0;background:inherit}
.BETTER{color:var(--good);font-weight:600}.WORSE{color:var(--bad);font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.5rem}
figure{margin:0;break-inside:avoid}figure h3{font-size:1rem;margin:0 0 .3rem}
figcaption{font-size:.85rem}svg.plot{width:100%;height:auto;display:block}
dt{font-weight:600}dd{margin:0 0 .5rem;overflow-wrap:anywhere}li{overflow-wrap:anywhere}
@media print{:root{--ink:#000;--soft:#444;--faint:#ccc;--paper:#fff;--good:#000;--bad:#000}
body{max-width:none;padding:0;font-size:10pt}.wide{overflow:visible}th{position:static}
.plots{grid-template-columns:1fr 1fr}table{font-size:8pt}
th,td{white-space:normal;padding:.15rem .3rem}.told{min-width:0}}
"""


def plots_of(comparison: Comparison, verdicts: Verdicts) -> list[Plot]:
    """All plots that these runs have the data for. Curves and calibration are of the table's first settings, and of
    the one that the others are compared with."""
    rows, columns, metric = comparison.rows, comparison.columns, verdicts.metric
    named = [one.baseline for one in verdicts.versus][:1]
    first = rows[:MOST_SERIES]
    shown = first if not named or any(row is named[0] for row in first) else [*first[:-1], named[0]]
    return [
        *curves(shown, columns, metric),
        *sweeps(comparison, metric),
        *reliability(shown, columns),
        *classes(verdicts.versus, columns),
        *confusion(shown, columns),
        *costs(comparison, shown, metric),
        *candidates(rows, columns),
    ]


def write_page(
    path: Path, comparison: Comparison, verdicts: Verdicts, plots: Sequence[Plot], problems: Sequence[tuple[Path, str]]
) -> None:
    """One HTML file; `problems` are folders that were left out, and why."""
    parts = "\n".join(_parts(comparison, verdicts, plots, problems))
    write_atomically(path, lambda temporary: temporary.write_text(parts, encoding="utf-8", errors="replace"))


def _parts(
    comparison: Comparison, verdicts: Verdicts, plots: Sequence[Plot], problems: Sequence[tuple[Path, str]]
) -> Iterator[str]:
    runs = sum(len(row.runs) for row in comparison.rows)
    same = ", ".join(f"{name}={value}" for name, value in comparison.same.items())
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width,initial-scale=1">'
    yield f"<title>{escape(same) or 'runs'}</title><style>{_STYLE}{STYLE}</style></head><body>"
    yield f"<h1>{runs:,} runs of {len(comparison.rows):,} settings</h1>"
    yield f"<p>The same in all: {escape(same)}.</p>" if same else ""
    yield from _table(*cells(comparison), comparison.columns)
    if verdicts.versus:
        yield f"<h2>What may be said</h2><p>{escape(heading(verdicts, comparison.columns))}.</p>"
        yield from _table(*verdict_cells(verdicts, comparison.columns), WORDS)
    notes = [
        *comparison.warnings,
        *verdicts.problems,
        *(f"left out: {folder}: {reason}" for folder, reason in problems),
    ]
    if notes:
        yield f"<h2>Warnings</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes[:MOST_ROWS])}</ul>"
    if plots:
        yield "<h2>Plots</h2>"
        if len(comparison.rows) > MOST_SERIES:
            few = f"{MOST_SERIES} of the {len(comparison.rows):,} settings: the table's first, and the one that all"
            yield f"<p>Curves, calibration and confusion are of {few} are compared with.</p>"
        yield '<div class="plots">'
        for plot in plots:
            below = f"<figcaption>{escape(plot.note)}</figcaption>"
            yield f"<figure><h3>{escape(plot.title)}</h3>{svg(plot)}{below}</figure>"
        yield "</div>"
    yield "<h2>Checklist</h2><dl>"
    yield from (f"<dt>{escape(name)}</dt><dd>{escape(answer)}</dd>" for name, answer in checklist(comparison))
    yield "</dl><footer>Written by kdbench compare.</footer></body></html>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str]) -> Iterator[str]:
    """A table that scrolls by itself where it is too wide; columns of words are aligned to the left."""
    kinds = [f' class="word{" told" * (title in WORDS)}"' if title in words else "" for title in header]
    heads = "".join(f"<th{kind}>{escape(title)}</th>" for kind, title in zip(kinds, header, strict=True))
    yield f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>'
    for row in rows[:MOST_ROWS]:
        yield "<tr>" + "".join(_cell(kind, text) for kind, text in zip(kinds, row, strict=True)) + "</tr>"
    yield "</tbody></table></div>"
    if len(rows) > MOST_ROWS:
        yield f"<p>The first {MOST_ROWS} of {len(rows):,} lines; kdbench compare --csv has all.</p>"


def _cell(kind: str, text: str) -> str:
    if text in ("BETTER", "WORSE"):
        kind = f' class="word told {text}"'
    return f"<td{kind}>{escape(text)}</td>"
