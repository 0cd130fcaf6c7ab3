"""Compare runs: one row a setting, mean and standard deviation over its seeds."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from kdbench.errors import UserError, nearest, printable, require
from kdbench.results.checklist import checklist
from kdbench.results.read import Found, Run, read_runs
from kdbench.results.render import (
    WORDS,
    as_csv,
    as_json,
    cells,
    heading,
    latex,
    markdown,
    table,
    verdict_cells,
    write_parquet,
)
from kdbench.results.rows import COSTS, Comparison, Row, by_task, compare, metric_names
from kdbench.results.selection import baseline, by, conditions, known_key, pivot, where
from kdbench.results.statistics import FEWEST
from kdbench.results.verdicts import Rule, Verdicts, against, best_against_others, every_pair

_FILES = ("report", "svg", "png", "parquet")


def main() -> int:
    arguments = _parse()
    found = read_runs([Path(path) for path in arguments.paths])
    runs = where(found.runs, conditions(",".join(arguments.where), "--where") if arguments.where else {})
    metrics = _measured([name for given in arguments.metric or [] for name in given.split(",")], runs)
    metrics = metrics or ["last", *(["best"] if any(run.result.best for run in runs) else [])]
    for named, members in _tables(runs, arguments):
        comparison = compare(members, metrics)
        comparison.rows.sort(key=_order(comparison, arguments.sort, metrics), reverse=arguments.reverse)
        if named and arguments.format in (None, "markdown", "latex"):
            print(f"% {named}" if arguments.format == "latex" else named)
        _print(comparison, arguments, metrics, found)
        _write(comparison, arguments, metrics, found)
        for warning in comparison.warnings if arguments.format != "json" else ():
            print(printable(f"warning: {warning}"), file=sys.stderr)
    for folder, reason in found.problems if arguments.format != "json" else ():
        print(printable(f"left out: {folder}: {reason}"), file=sys.stderr)
    return 0 if found.runs else 1


def print_runs(folders: Sequence[Path]) -> None:
    """The table of a sweep, the best setting first, and its warnings; nothing for fewer than two finished runs."""
    runs = read_runs(folders).runs
    if len(runs) < 2:
        return
    for members in by_task(runs).values():
        comparison = compare(members)
        comparison.rows.sort(key=_order(comparison, None, ["last"]))
        print()
        _print_table(comparison)
        _print_verdicts(best_against_others(comparison.rows, "last"), comparison)
        for warning in comparison.warnings:
            print(printable(f"warning: {warning}"), file=sys.stderr)


def _tables(runs: list[Run], arguments: argparse.Namespace) -> list[tuple[str, list[Run]]]:
    """The runs of each table under its heading: one for each value of --by, and for each task.

    Raises UserError for runs of several tasks where one table is asked for.
    """
    tasks = by_task(runs)
    asked = [arguments.format] if arguments.format in ("json", "csv") else []
    asked += [name for name in _FILES if getattr(arguments, name)]
    if len(tasks) > 1 and asked:
        one = " or ".join(f"--where task='{task}'" for task in tasks)
        raise UserError(f"--{asked[0]}: is one table, and these runs are of several tasks; add {one}")
    parts = by(runs, arguments.by) if arguments.by else {}
    named = {f"{arguments.by}={value}": members for value, members in parts.items()} or {"": runs}
    if len(tasks) < 2:
        return list(named.items())
    return [
        (", ".join(filter(None, (heading, f"task={task}"))), same)
        for heading, members in named.items()
        for task, same in by_task(members).items()
    ]


def _print(comparison: Comparison, arguments: argparse.Namespace, metrics: list[str], found: Found) -> None:
    """One comparison in the shape that was asked for."""
    verdicts = _verdicts(comparison, arguments, metrics[0])
    words = [*comparison.columns, *WORDS]
    written = {"markdown": markdown, "latex": latex}.get(arguments.format)
    if arguments.checklist:
        print("\n".join(f"{title}: {answer}" for title, answer in checklist(comparison)))
    elif arguments.rows:
        for key, option in ((arguments.rows, "--rows"), (arguments.columns, "--columns")):
            known_key([run for row in comparison.rows for run in row.runs], key, option)
        laid = pivot(comparison, arguments.rows, arguments.columns, metrics[0])
        if written:
            print(written(*laid, laid[0][:1]))
        else:
            _console().print(table(*laid, laid[0][:1]))
    elif arguments.format == "json":
        print(as_json(comparison, found.problems, verdicts))
    elif arguments.format == "csv":
        print(as_csv(comparison), end="")
    elif written:
        print(written(*cells(comparison), words))
        if arguments.against and verdicts.versus:
            print("\n" + written(*verdict_cells(verdicts, comparison.columns), words))
    elif comparison.rows:
        _print_table(comparison)
        _print_verdicts(verdicts, comparison)


def _verdicts(comparison: Comparison, arguments: argparse.Namespace, metric: str) -> Verdicts:
    named, margin = arguments.against, arguments.margin
    rule = Rule(None if margin is None else margin / comparison.metric(metric).scale, arguments.pooled)
    if named is None:
        return best_against_others(comparison.rows, metric, rule)
    if named == "all":
        return every_pair(comparison.rows, metric, rule)
    return against(comparison.rows, baseline(comparison, named), metric, rule)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kdbench compare",
        description=f"{__doc__} Only runs with a result.json count; accuracies are in percent.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="run folders, or folders with runs in them")
    _add_choices(parser)
    _add_shapes(parser)
    arguments = parser.parse_intermixed_args()
    _refuse_impossible(arguments)
    for name in ("report", "parquet"):
        file = getattr(arguments, name)
        require(not file or not file.exists() or file.is_file(), f"--{name}", file, "a file, or not there yet")
    for name in ("svg", "png"):
        folder = getattr(arguments, name)
        require(not folder or not folder.exists() or folder.is_dir(), f"--{name}", folder, "a folder, or not there yet")
    return arguments


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Which runs and figures, in which order, against which."""
    parser.add_argument("--sort", metavar="KEY", help="order the rows by a column, e.g. loss.tau, n, seconds")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument(
        "--metric",
        action="append",
        help="last and best (default: test accuracy or perplexity after the last epoch, and at the best one by "
        "validation), or any figure of result.json, e.g. test/nll; several with commas; the first one orders rows and "
        "gets verdicts; one with a ? behind it (gain/test/top1?) is left out where no run has it",
    )
    parser.add_argument(
        "--where", metavar="KEY=VALUE", action="append", help="only these runs, e.g. loss=kl,loss.tau=4"
    )
    parser.add_argument("--by", metavar="KEY", help="a table for each value of a key, e.g. student")
    parser.add_argument(
        "--against",
        metavar="SETTING",
        help="verdicts on all settings against this one, e.g. loss=ce, or `all` for every pair (default: against the "
        "best one, judged as strictly as all pairs are)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        help="a difference below it matters to nobody: NO DIFFERENCE SHOWN where the interval lies within it on both "
        "sides of 0; in points of accuracy (default: 0.5), or in the metric's own numbers (default: 0)",
    )
    parser.add_argument(
        "--pooled",
        action="store_true",
        help="one variance for all settings (Dunnett), for tables of many settings with few seeds: assumes that all of "
        "them vary alike, and falls back to each pair's own variance where they do not",
    )


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    """What is printed or written."""
    parser.add_argument("--rows", metavar="KEY", help="with --columns: one metric laid out by two keys")
    parser.add_argument("--columns", metavar="KEY", help="with --rows, e.g. --rows loss --columns student")
    parser.add_argument("--checklist", action="store_true", help="what a paper's checklist asks, answered by the runs")
    for name, kind, text in (
        ("report", "FILE", "write a page with tables, verdicts and plots, e.g. report.html: one file, no network"),
        ("svg", "DIR", "write the page's plots as single SVG files"),
        ("png", "DIR", "write the page's plots as single PNG files"),
        ("parquet", "FILE", "write what --csv has as a Parquet file (takes pyarrow)"),
    ):
        parser.add_argument(f"--{name}", metavar=kind, type=Path, help=text)
    shape = parser.add_mutually_exclusive_group()
    for name, text in (
        ("markdown", "a Markdown table"),
        ("latex", "a LaTeX table (booktabs)"),
        ("csv", "comma-separated, as fractions"),
        ("json", "JSON, as fractions"),
    ):
        shape.add_argument(f"--{name}", dest="format", action="store_const", const=name, help=text)


def _refuse_impossible(arguments: argparse.Namespace) -> None:
    """Options that say nothing together, before anything is read."""
    if bool(arguments.rows) != bool(arguments.columns):
        raise UserError("--rows and --columns go together, e.g. --rows loss --columns student")
    if arguments.by and arguments.format in ("json", "csv"):
        raise UserError(f"--by {arguments.by}: makes several tables, --{arguments.format} is one; use --where")
    if (arguments.rows or arguments.checklist) and arguments.format in ("json", "csv"):
        raise UserError(f"--{arguments.format}: a table for machines has all runs; leave out --rows and --checklist")
    if arguments.by and arguments.against not in (None, "all"):
        named = conditions(arguments.against, "--against")
        require(arguments.by not in named, "--by", arguments.by, "a key that --against does not name")
    margin = arguments.margin
    require(margin is None or 0 <= margin < math.inf, "--margin", margin, "a number of 0 or more")
    files = [name for name in _FILES if getattr(arguments, name)]
    if files and arguments.by:
        raise UserError(f"--by {arguments.by}: makes several tables, --{files[0]} is of one; use --where")


def _write(comparison: Comparison, arguments: argparse.Namespace, metrics: list[str], found: Found) -> None:
    """The files that were asked for, each named once it is there."""
    if arguments.parquet:
        write_parquet(comparison, arguments.parquet)
        print(f"written: {arguments.parquet}", file=sys.stderr)
    if not (arguments.report or arguments.svg or arguments.png):
        return
    from kdbench.results.page import plots_of, write_page  # a plain table waits for none of this
    from kdbench.results.plots.png import write_png
    from kdbench.results.plots.svg import write_svg

    verdicts = _verdicts(comparison, arguments, metrics[0])
    plots = plots_of(comparison, verdicts)
    if arguments.report:
        write_page(arguments.report, comparison, verdicts, plots, found.problems)
        print(f"written: {arguments.report}", file=sys.stderr)
    for folder, write in ((arguments.svg, write_svg), (arguments.png, write_png)):
        if folder:
            for path in write(folder, plots):
                print(f"written: {path}", file=sys.stderr)


def _measured(metrics: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The metrics that were asked for. Raises UserError for one that no run has; with a ? behind it it is left out."""
    known, found = metric_names(runs), []
    for asked in metrics:
        name = asked.removesuffix("?")
        if name in known or not runs:
            found.append(name)
        elif asked == name:
            hint = nearest(name, known, "Did you mean {}? ")
            raise UserError(f"--metric {name}: no run has this metric. {hint}Metrics: {', '.join(known)}")
        else:
            print(f"no run has {name}", file=sys.stderr)
    return found


def _order(comparison: Comparison, key: str | None, metrics: list[str]) -> Callable[[Row], tuple[int, float, str]]:
    """The sorting key of rows; without a wish, the best first."""
    known = [*comparison.columns, *metrics, "teacher", "n", "agreement", "seconds", *COSTS]
    if key is not None and key not in known:
        hint = nearest(key, known, "Did you mean {}? ")
        raise UserError(f"--sort {key}: there is no such column. {hint}Columns: {', '.join(known)}")
    name = key or metrics[0]
    sign = 1 if name in (*comparison.columns, *COSTS) else -comparison.metric(name).better

    def order(row: Row) -> tuple[int, float, str]:
        fixed = {"teacher": row.teacher.mean, "agreement": row.agreement.mean, "seconds": row.seconds.mean}
        cost = {k: figure.mean for k, figure in row.cost.items()}
        figures = {"n": len(row.runs), **fixed, **cost, **{k: figure.mean for k, figure in row.metrics.items()}}
        value = row.differs.get(name) if name in comparison.columns else figures[name]
        if isinstance(value, (int, float)):
            return 0, sign * value, ""
        return (1, 0.0, value) if isinstance(value, str) else (2, 0.0, "")

    return order


def _print_table(comparison: Comparison) -> None:
    console = _console()
    same = ", ".join(f"{name}={value}" for name, value in comparison.same.items())
    if same:
        console.print(f"the same in all: {same}", style="dim", markup=False)
    console.print(table(*cells(comparison), comparison.columns))


def _print_verdicts(verdicts: Verdicts, comparison: Comparison) -> None:
    """The verdicts under a table; a line if there are too few runs for any."""
    if not verdicts.versus:
        return
    print()
    if all(one.judged.verdict == "TOO FEW RUNS" and one.networks is None for one in verdicts.versus):
        print(f"TOO FEW RUNS to say which differences are more than chance: {FEWEST} seeds a setting, or more.")
        return
    print(heading(verdicts, comparison.columns))
    header, rows = verdict_cells(verdicts, comparison.columns)
    _console().print(table(header, rows, WORDS))
    for problem in verdicts.problems:
        print(printable(f"warning: {problem}"), file=sys.stderr)


def _console() -> Console:
    width = None if sys.stdout.isatty() else 10_000
    return Console(width=width, highlight=False, soft_wrap=False, markup=False)
