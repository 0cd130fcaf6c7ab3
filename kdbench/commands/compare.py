"""Compare runs: one row a setting, mean and standard deviation over its seeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from kdbench.errors import UserError, nearest, printable
from kdbench.results.metrics import metric_of
from kdbench.results.read import Run, read_runs
from kdbench.results.render import as_csv, as_json, markdown, table
from kdbench.results.rows import Comparison, Row, compare, metric_names


def main() -> int:
    arguments = _parse()
    found = read_runs([Path(path) for path in arguments.paths])
    metrics = [name for given in arguments.metric or ["last"] for name in given.split(",")]
    _refuse_unknown(metrics, found.runs)
    comparison = compare(found.runs, metrics)
    comparison.rows.sort(key=_order(comparison, arguments.sort, metrics), reverse=arguments.reverse)
    if arguments.format == "json":
        print(as_json(comparison, found.problems))
        return 0
    if arguments.format == "csv":
        print(as_csv(comparison), end="")
    elif arguments.format == "markdown":
        print(markdown(comparison))
    elif found.runs:
        _print_table(comparison)
    for warning in comparison.warnings:
        print(printable(f"warning: {warning}"), file=sys.stderr)
    for folder, reason in found.problems:
        print(printable(f"left out: {folder}: {reason}"), file=sys.stderr)
    return 0


def print_runs(folders: Sequence[Path]) -> None:
    """The table of a sweep, the best setting first; nothing for fewer than two finished runs."""
    runs = read_runs(folders).runs
    if len(runs) < 2:
        return
    comparison = compare(runs)
    comparison.rows.sort(key=_order(comparison, None, ["last"]))
    print()
    _print_table(comparison)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdbench compare",
        description=f"{__doc__} Only runs with a result.json count; accuracies are in percent.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="run folders, or folders with runs in them")
    parser.add_argument("--sort", metavar="KEY", help="order the rows by a column, e.g. loss.tau, n, seconds")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument(
        "--metric",
        action="append",
        help="last (default), best (the best epoch by validation), or a metric of result.json, e.g. test/nll; "
        "several with commas",
    )
    shape = parser.add_mutually_exclusive_group()
    for name, text in (
        ("markdown", "a Markdown table"),
        ("csv", "comma-separated, as fractions"),
        ("json", "JSON, as fractions"),
    ):
        shape.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=text)
    return parser.parse_args()


def _refuse_unknown(metrics: list[str], runs: list[Run]) -> None:
    known = metric_names(runs)
    for name in metrics:
        if runs and name not in known:
            hint = nearest(name, known, "Did you mean {}? ")
            raise UserError(f"--metric {name}: no run has this metric. {hint}Metrics: {', '.join(known)}")


def _order(comparison: Comparison, key: str | None, metrics: list[str]) -> Callable[[Row], tuple[int, float, str]]:
    """The sorting key of rows; without a wish, the best first."""
    known = [*comparison.columns, *metrics, "teacher", "n", "agreement", "seconds"]
    if key is not None and key not in known:
        raise UserError(f"--sort {key}: there is no such column. {nearest(key, known)} Columns: {', '.join(known)}")
    name = key or metrics[0]
    sign = 1 if name in comparison.columns else -metric_of(name).better

    def order(row: Row) -> tuple[int, float, str]:
        fixed = {"teacher": row.teacher.mean, "agreement": row.agreement.mean, "seconds": row.seconds.mean}
        figures = {"n": len(row.runs), **fixed, **{k: figure.mean for k, figure in row.metrics.items()}}
        value = row.differs.get(name) if name in comparison.columns else figures[name]
        if isinstance(value, (int, float)):
            return 0, sign * value, ""
        return (1, 0.0, value) if isinstance(value, str) else (2, 0.0, "")

    return order


def _print_table(comparison: Comparison) -> None:
    width = None if sys.stdout.isatty() else 10_000
    console = Console(width=width, highlight=False, soft_wrap=False, markup=False)
    same = ", ".join(f"{name}={value}" for name, value in comparison.same.items())
    if same:
        console.print(f"the same in all: {same}", style="dim", markup=False)
    console.print(table(comparison))
