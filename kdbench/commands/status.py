"""What runs, what is done, what failed, and how long it will take: of a sweep, from any terminal or machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from kdbench.errors import UserError, require
from kdbench.results.status import STATES, Point, Status, read_status

SHOWN = 20  # points of a state that are listed


def main() -> int:
    arguments = _parse()
    paths = [Path(path) for path in arguments.paths]
    if arguments.json:
        print(json.dumps(read_status(paths).as_json(), indent=1))
        return 0
    width = None if sys.stdout.isatty() else 10_000
    console = Console(width=width, markup=False, highlight=False, soft_wrap=True)
    if arguments.watch is None:
        console.print(_shown(read_status(paths)))
        return 0
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = read_status(paths)
            live.update(_shown(status), refresh=True)
            if not status.of("running") and not status.sweeps:
                return 0
            time.sleep(arguments.watch)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdbench status", description=__doc__)
    parser.add_argument("paths", nargs="*", default=["outputs"], metavar="PATH", help="folders with runs (outputs)")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    said = "look again every SECONDS (2), until nothing runs any more"
    parser.add_argument("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help=said)
    arguments = parser.parse_intermixed_args()
    if arguments.watch is not None:
        require(0 < arguments.watch < 86400, "--watch", arguments.watch, "a number of seconds above 0")
        if arguments.json:
            raise UserError("--watch", said="has no --json; ask for it as often as you like")
    return arguments


def _shown(status: Status) -> Group:
    counts = [f"{len(found)} {state}" for state in STATES if (found := status.of(state))]
    head = f"{len(status.points)} run{'s' if len(status.points) != 1 else ''}: {', '.join(counts) or 'none'}"
    if status.left is not None:
        head += f"; about {_span(status.left)} left"
    elif (status.of("waiting") or status.of("stopped")) and not status.sweeps and not status.of("running"):
        head += "; nothing is at work on them: the same command goes on"
    name = Column("run", overflow="fold", ratio=1)  # names differ at their ends
    table = Table(name, "state", "epoch", "where", "an epoch", "left", box=None, header_style="bold", pad_edge=False)
    more = []
    for state in ("running", "failed", "stopped", "waiting"):
        found = status.of(state)
        for point in found[:SHOWN]:
            table.add_row(*_row(point))
        if len(found) > SHOWN:
            more.append(f"and {len(found) - SHOWN} more {state}")
    failures = [f"{_name(point.folder)}: {point.message}" for point in status.of("failed")[:SHOWN]]
    rows = [table] if table.row_count else []
    return Group(Text(head), *rows, *map(Text, more), *map(Text, failures))


def _row(point: Point) -> tuple[str, ...]:
    of = "" if point.epochs is None else f"/{point.epochs}"
    epoch = f"{point.stage} {point.epoch}{of}".strip() if point.epoch or of else ""
    where = f"{point.host}, {point.process}" if point.state == "running" and point.process else ""
    pace = "" if point.pace is None else f"{point.pace:.1f} s"
    left = "" if point.left is None else _span(point.left)
    return _name(point.folder), point.state, epoch, where, pace, left


def _name(folder: Path) -> str:
    """A run by its dataset and its own name, as in outputs/runs."""
    return str(Path(*folder.parts[-2:]))


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
