"""A comparison as text for people (percent, two decimals) or for machines (fractions, all digits)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from kdbench.errors import UserError, show
from kdbench.files import write_atomically
from kdbench.results.metrics import METRICS, Metric
from kdbench.results.rows import COSTS, Comparison, Figure, Row
from kdbench.results.statistics import FEWEST, LEVEL, Difference, Judged, Pool
from kdbench.results.verdicts import Verdicts, Versus

VERDICTS = ("verdict", "on this test set", "on such images")  # columns of sentences
WORDS = ("setting", "against", *VERDICTS)  # columns of words, to the left


def metric_title(name: str, comparison: Comparison) -> str:
    """What a column or an axis of a metric is called: "test top-1 (last)"."""
    when = {"last": "last", "best": "best by val"}.get(name)
    primary = comparison.task.primary
    return name if when is None else f"test {primary.words or primary.name} ({when})"


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text. A column that is empty in every row is left out."""
    columns = _columns(comparison)
    rows = [[show(row) for _, show in columns] for row in comparison.rows]
    kept = [i for i, (title, _) in enumerate(columns) if title == "n" or any(row[i] != "-" for row in rows)]
    return [columns[i][0] for i in kept], [[row[i] for i in kept] for row in rows]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str]) -> Table:
    """A table for the terminal; the columns in `words` are aligned to the left."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for title in header:
        made.add_column(title, justify="left" if title in words else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """A Markdown table; the columns in `words` are aligned to the left."""
    rule = ["---" if title in words else "---:" for title in header]
    escaped = [[text.replace("|", "\\|").replace("<", "&lt;") for text in line] for line in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def latex(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """A table with the rules of the package booktabs."""
    aligned = "".join("l" if title in words else "r" for title in header)
    lines = [" & ".join(map(_tex, line)) + r" \\" for line in [header, *rows]]
    head = [rf"\begin{{tabular}}{{{aligned}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}"])


_TEX = {
    "±": r"$\pm$",
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def verdict_cells(verdicts: Verdicts, columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparisons; differences and intervals as people read them."""
    metric = verdicts.kind
    several = len({id(one.baseline) for one in verdicts.versus}) > 1
    kept = any(one.images for one in verdicts.versus)
    many = verdicts.comparisons > 1
    rows = []
    for one in verdicts.versus:
        gap, judged = one.judged.difference, one.judged
        p = "-" if judged.p is None else f"{judged.p:.2g}"
        n = f"{gap.n} {'pairs' if gap.paired else 'runs'}"
        wins = "-" if gap.wins is None else f"{100 * gap.wins:.0f}"
        names = [setting(one.row, columns), *([setting(one.baseline, columns)] if several else [])]
        wider = [_interval(metric, one.images), sentence(one.images) if one.images else "-"] if kept else []
        alone = [_interval(metric, gap)] if many else []
        rows.append(
            [*names, _signed(metric, gap.mean), *alone, _interval(metric, judged), n, p, wins, _told(one), *wider]
        )
    unit = " %-points" if metric.unit == "%" else ""
    titles = ["setting", *(["against"] if several else []), f"difference{unit}", *(["alone"] if many else [])]
    titles += ["interval", "n", "p", "larger in %"]
    return [*titles, *(["on this test set", "interval", "on such images"] if kept else ["verdict"])], rows


def _interval(metric: Metric, of: Judged | Difference | None) -> str:
    return "-" if of is None or of.low is None else f"{_signed(metric, of.low)} to {_signed(metric, of.high)}"


def _told(one: Versus) -> str:
    """The verdict; of single runs also what may be said of these networks."""
    alone = "" if one.networks is None else f"; these networks on such images: p = {one.networks:.2g} (McNemar)"
    return sentence(one.judged) + alone


def heading(verdicts: Verdicts, columns: Sequence[str]) -> str:
    """What the verdicts are of, and how they were reached."""
    baselines = {id(one.baseline): one.baseline for one in verdicts.versus}
    one = f"against {setting(next(iter(baselines.values())), columns)}, " if len(baselines) == 1 else ""
    count = f"{verdicts.comparisons} comparison{'s' if verdicts.comparisons > 1 else ''}"
    level = f"{100 * (1 - LEVEL):.0f} % intervals"
    said = f"{one}{verdicts.metric}: {level} over seeds after Holm, {count}, on this test set"
    if verdicts.comparisons > 1:
        said += "; alone: the interval if this were the only comparison"
    if any(versus.images for versus in verdicts.versus):
        said += "; on such images: over seeds and test images"
    if verdicts.correlation is not None:
        said += f"; runs of one seed correlate by {round(verdicts.correlation, 2) + 0.0:.2f}"
    return said + _pooled(verdicts.pool)


def _pooled(pool: Pool | None) -> str:
    """What became of a pooled variance that was asked for."""
    if pool is None:
        return ""
    test = f"Bartlett's p = {pool.alike:.2g}"
    if pool.holds:
        return f"; one variance for all settings, {pool.freedom:.3g} degrees of freedom, as if all vary alike ({test})"
    return f"; settings do not vary alike ({test}): each pair's own variance, not a pooled one"


def setting(row: Row, columns: Sequence[str]) -> str:
    """A setting by what it differs in: "loss=kl, loss.tau=4"."""
    return ", ".join(f"{key}={_short(row.differs[key])}" for key in columns if key in row.differs) or "all runs"


def sentence(judged: Judged) -> str:
    """The verdict, and how many runs would do where too few are there."""
    if judged.verdict == "TOO FEW RUNS":
        return f"TOO FEW RUNS (a verdict takes {FEWEST})"
    if judged.verdict != "CANNOT BE TOLD":
        return judged.verdict
    if judged.runs is None and judged.difference.fixed:
        return "CANNOT BE TOLD (takes more test images)"
    return f"CANNOT BE TOLD ({judged.runs} seeds would do)" if judged.runs else "CANNOT BE TOLD (over 1,000 seeds)"


def _signed(metric: Metric, value: float | None) -> str:
    return "-" if value is None else f"{round(metric.scale * value, metric.digits) + 0.0:+.{metric.digits}f}"


def as_csv(comparison: Comparison) -> str:
    """One line a setting, figures as fractions with all their digits."""
    header, rows = _all_digits(comparison)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_cell(value) for value in line] for line in (header, *rows))
    return stream.getvalue()


def write_parquet(comparison: Comparison, path: Path) -> None:
    """What `as_csv` has, as a Parquet file; a column of several types is text. Raises UserError without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("--parquet: pyarrow writes it, and is not installed: pip install 'kdbench[parquet]'") from error
    header, rows = _all_digits(comparison)
    columns = {}
    for title, values in zip(header, zip(*rows, strict=True), strict=True):
        alike = {type(value) for value in values if value is not None} <= {int, float}
        columns[title] = list(values) if alike else [None if value is None else str(value) for value in values]
    write_atomically(path, lambda temporary: parquet.write_table(pyarrow.table(columns), temporary))


def _all_digits(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Header and rows as machines read them."""
    names = list(comparison.rows[0].metrics) if comparison.rows else []
    header = [*comparison.columns, "teacher", *(title for name in names for title in (name, f"{name} std"))]
    costs = [name for name in COSTS if any(row.cost[name].n for row in comparison.rows)]
    rows = []
    for row in comparison.rows:
        figures = [value for name in names for value in (row.metrics[name].mean, row.metrics[name].std)]
        differs = [row.differs.get(column) for column in comparison.columns]
        folders = " ".join(str(run.folder) for run in row.runs)
        cost = [row.cost[name].mean for name in costs]
        tail = [len(row.runs), row.agreement.mean, row.seconds.mean, *cost, folders]
        rows.append([*differs, row.teacher.mean, *figures, *tail])
    return [*header, "n", "agreement", "seconds", *costs, "folders"], rows


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula is kept from it by an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def as_json(comparison: Comparison, problems: Sequence[tuple[Any, str]], verdicts: Verdicts | None = None) -> str:
    """All of it, figures as fractions with all their digits; p values before and after Holm."""
    rows = [
        {
            **{"differs": row.differs, "teacher": row.teacher._asdict()},
            "metrics": {name: figure._asdict() for name, figure in row.metrics.items()},
            **{"agreement": row.agreement._asdict(), "seconds": row.seconds._asdict(), "n": len(row.runs)},
            "cost": {name: one._asdict() for name, one in row.cost.items() if one.n},
            "folders": [str(run.folder) for run in row.runs],
        }
        for row in comparison.rows
    ]
    left_out = {str(folder): reason for folder, reason in problems}
    whole: dict[str, object] = {"same": comparison.same, "rows": rows, "warnings": comparison.warnings}
    whole["left_out"] = left_out
    if verdicts is not None:
        told = [
            {
                **{"setting": one.row.differs, "against": one.baseline.differs, "verdict": one.judged.verdict},
                **{"p_holm": one.judged.p, "low": one.judged.low, "high": one.judged.high},
                **{"runs_needed": one.judged.runs, "alone": one.judged.difference._asdict()},
                **({"on_such_images": _on_images(one.images)} if one.images else {}),
                **({} if one.networks is None else {"mcnemar": one.networks}),
            }
            for one in verdicts.versus
        ]
        pool = verdicts.pool and {
            "holds": verdicts.pool.holds,
            "p": verdicts.pool.alike,
            "freedom": verdicts.pool.freedom,
        }
        about = {"metric": verdicts.metric, "comparisons": verdicts.comparisons, "pooled": pool}
        whole["verdicts"] = {**about, "seed_correlation": verdicts.correlation, "of": told}
    return json.dumps(_finite(whole), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON knows neither infinity, which is "inf" here, nor what is not a number, which is null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(_finite, value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _on_images(judged: Judged) -> dict[str, object]:
    told = {"verdict": judged.verdict, "p_holm": judged.p, "low": judged.low, "high": judged.high}
    return {**told, "alone": judged.difference._asdict()}


def figure(value: Figure, metric: Metric) -> str:
    """ "91.23 ± 0.40", without the deviation for a single run; "-" for nothing."""
    spread = "" if value.std is None else f" ± {metric.number(value.std)}"
    return f"{metric.number(value.mean)}{spread}"


def _columns(comparison: Comparison) -> list[tuple[str, Callable[[Row], str]]]:
    names = list(comparison.rows[0].metrics) if comparison.rows else []
    columns: list[tuple[str, Callable[[Row], str]]] = [(key, partial(_differing, key)) for key in comparison.columns]
    primary = comparison.task.primary
    columns.append((f"teacher{_percent(primary)}", lambda row: figure(_one(row.teacher), primary)))
    for name in names:
        kind = comparison.metric(name)
        columns.append((metric_title(name, comparison) + _percent(kind), partial(_metric, name, kind)))
    columns.append(("n", lambda row: str(len(row.runs))))
    columns.append(("agreement %", lambda row: figure(row.agreement, METRICS["agreement"])))
    columns.append(("seconds", lambda row: METRICS["seconds"].number(row.seconds.mean)))
    return columns + [(title, partial(_cost, name, unit)) for name, (title, unit) in _COSTS.items()]


# Titles and units of what runs cost; where none of them knows it there is no column.
_COSTS = {
    "cpu_seconds": ("CPU s", 1.0),
    "gpu_seconds": ("GPU s", 1.0),
    "energy": ("kJ", 1e3),
    "flops": ("MFLOPs", 1e6),
    "latency": ("ms an input", 1e-3),
}


def _cost(name: str, unit: float, row: Row) -> str:
    mean = row.cost[name].mean
    return "-" if mean is None else f"{mean / unit:.3g}" if mean < 1000 * unit else f"{mean / unit:,.0f}"


def _one(value: Figure) -> Figure:
    """A teacher that all runs of a row share has no deviation."""
    return value._replace(std=None) if not value.std else value


def _percent(metric: Metric) -> str:
    return " %" if metric.unit == "%" else ""


def _metric(name: str, metric: Metric, row: Row) -> str:
    return figure(row.metrics[name], metric)


def _differing(key: str, row: Row) -> str:
    value = row.differs.get(key)
    return "-" if value is None else _short(value)


def _short(value: Any) -> str:
    """A value as text; of objects (the parts of an augmentation) the names of their classes alone."""
    if isinstance(value, Mapping) and "_target_" in value:
        return str(value["_target_"]).rpartition(".")[2]
    if isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) for one in value):
        return " + ".join(map(_short, value))
    return show(value)
