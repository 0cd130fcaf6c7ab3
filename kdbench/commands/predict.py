"""Predict with a run's student: a class for every picture of a folder, or every row of a table."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdbench.commands.evaluate import add_trust, find_run, trust_of
from kdbench.errors import UserError, printable, require
from kdbench.files import naming

if TYPE_CHECKING:
    from kdbench.deploy.prediction import Prediction

_SHOWN = 40  # characters of a file's name in the table


def main() -> int:
    arguments = _parse()
    folder = find_run(Path(arguments.run))
    from kdbench.deploy.prediction import predictions  # loads torch
    from kdbench.deploy.student import open_student

    named = Path(arguments.run).name if Path(arguments.run).is_file() else "student.safetensors"
    student = open_student(folder, named, trust_of(arguments))
    found = list(predictions(student, Path(arguments.input)))
    if arguments.csv:
        _write(arguments.csv, found, student.classes)
        print(f"{len(found):,} predictions: {arguments.csv}")
    else:
        _print(found, student.classes, arguments.top)
    broken = [one for one in found if one.probabilities is None]
    for one in broken:
        print(printable(f"left out: {one.problem}"), file=sys.stderr)
    return 1 if broken else 0


def _print(found: Sequence[Prediction], classes: Sequence[str], top: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("input", no_wrap=True)
    for place in range(min(top, len(classes))):
        table.add_column("class" if place == 0 else f"{place + 1}.", no_wrap=True)
        table.add_column("%", justify="right")
    for one in found:
        if one.probabilities is not None:
            values, places = one.probabilities.topk(min(top, len(classes)))
            pairs = [(classes[place], f"{100 * value:.1f}") for value, place in zip(values.tolist(), places.tolist())]
            table.add_row(*map(printable, (one.name, *(word for pair in pairs for word in pair))))
    Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False).print(table)


def _write(path: Path, found: Sequence[Prediction], classes: Sequence[str]) -> None:
    """One line an input: its name, the class, its probability, then each class's probability under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "class", "probability", *(f"p({name})" for name in classes), "problem"])
        for one in found:
            if one.probabilities is None:
                writer.writerow([one.name, "", "", *[""] * len(classes), one.problem])
                continue
            best = int(one.probabilities.argmax())
            values = [f"{value:.6g}" for value in one.probabilities.tolist()]
            writer.writerow([one.name, classes[best], values[best], *values, ""])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdbench predict", description=__doc__)
    parser.add_argument("run", help="a run folder, or a weights file in one (best.safetensors)")
    parser.add_argument("input", help="a folder of pictures, one picture, or a table (.csv, .npz, ...) of vectors")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write all classes' probabilities there instead")
    parser.add_argument("--top", metavar="K", type=int, default=3, help="classes to show (default: 3)")
    add_trust(parser)
    arguments = parser.parse_args()
    require(arguments.top >= 1, "--top", arguments.top, "1 or more")
    if arguments.csv is not None and arguments.csv.is_dir():
        raise UserError("--csv", str(arguments.csv), "a file")
    return arguments
