"""Predict with a run's student: a class for every picture, row or text; the perplexity of texts, and how they go on."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdbench.commands.evaluate import add_trust, find_run, trust_of
from kdbench.errors import UserError, printable, require
from kdbench.files import naming

if TYPE_CHECKING:
    from kdbench.deploy.prediction import Prediction
    from kdbench.deploy.student import Student
    from kdbench.deploy.texts import Perplexity

_STDIN = "-"


def main() -> int:
    arguments = _parse()
    folder = find_run(Path(arguments.run))
    from kdbench.deploy.student import open_student  # loads torch
    from kdbench.types import CorpusInfo

    named = Path(arguments.run).name if Path(arguments.run).is_file() else "student.safetensors"
    student = open_student(folder, named, trust_of(arguments))
    speaks = isinstance(student.info, CorpusInfo)
    require(
        speaks or arguments.generate is None,
        "--generate",
        arguments.generate,
        f"left out: {folder} is no language model",
    )
    problems = _language_model(student, arguments) if speaks else _classifier(student, arguments)
    for problem in problems:
        print(printable(f"left out: {problem}"), file=sys.stderr)
    return 1 if problems else 0


def _classifier(student: Student, arguments: argparse.Namespace) -> list[str]:
    from kdbench.data.readers.text import lines_in
    from kdbench.deploy.prediction import columns, predictions

    given: Path | list[str] = arguments.text
    if not given:
        stdin = arguments.input == _STDIN
        given = lines_in(_typed(), student.pairs) if stdin else Path(arguments.input)
    if student.embeds:
        there = (arguments.csv or arguments.jsonl) is not None
        require(there, "--csv", None, f"a file: {student.folder} answers with embeddings, which go there")
    found = list(predictions(student, given))
    if student.embeds:
        _written(arguments, ["input", *student.classes, "problem"], [one.embedding(student.classes) for one in found])
    elif not _written(arguments, columns(student.classes), [one.values(student.classes) for one in found]):
        _print_classes(found, student.classes, arguments.top)
    return [one.problem for one in found if one.probabilities is None]


def _language_model(student: Student, arguments: argparse.Namespace) -> list[str]:
    from kdbench.deploy.texts import COLUMNS, continued, perplexities

    if arguments.generate is not None:
        texts = arguments.text or [_typed() if arguments.input == _STDIN else _one_file(Path(arguments.input))]
        for text in texts:
            print(text + continued(student, text, arguments.generate))
        return []
    typed = {_STDIN: _typed()} if arguments.input == _STDIN else {text: text for text in arguments.text}
    found = list(perplexities(student, typed or Path(arguments.input)))
    if not _written(arguments, COLUMNS, [one.values() for one in found]):
        _print_perplexities(found)
    return [one.problem for one in found if one.problem]


def _typed() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("input", _STDIN, "text in UTF-8") from error


def _one_file(path: Path) -> str:
    from kdbench.data.rows import read_text

    return read_text(path)


def _print_classes(found: Sequence[Prediction], classes: Sequence[str], top: int) -> None:
    heads = [("class" if place == 0 else f"{place + 1}.", "%") for place in range(min(top, len(classes)))]
    rows = []
    for one in found:
        if one.probabilities is not None:
            values, places = one.probabilities.topk(len(heads))
            pairs = [(classes[place], f"{100 * value:.1f}") for value, place in zip(values.tolist(), places.tolist())]
            rows.append([one.name, *(word for pair in pairs for word in pair)])
    _print(["input", *(word for head in heads for word in head)], rows)


def _print_perplexities(found: Sequence[Perplexity]) -> None:
    known = [one for one in found if not one.problem]
    rows = [[one.name, f"{one.tokens:,}", f"{one.unknown:,}", f"{one.nll:.4f}", f"{one.ppl:.2f}"] for one in known]
    _print(["input", "tokens", "unknown", "nll", "perplexity"], rows)


def _print(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose columns but of names are numbers; on a terminal a long name is cut."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, head in enumerate(heads):
        names = place == 0 or head == "class" or head.endswith(".")
        table.add_column(head, justify="left" if names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(printable(cell.replace("\n", " ").replace("\t", " ")) for cell in row))
    Console(width=None if sys.stdout.isatty() else 10_000, highlight=False, markup=False).print(table)


def _written(arguments: argparse.Namespace, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
    """Whether a file was asked for: --csv has a line an input, --jsonl an object, with the same names."""
    for path, write in ((arguments.csv, _write_csv), (arguments.jsonl, _write_jsonl)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with naming(path), path.open("w", newline="", encoding="utf-8") as file:
                write(file, heads, rows)
            print(f"{len(rows):,} predictions: {path}")
    return (arguments.csv or arguments.jsonl) is not None


def _write_csv(file: Any, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    csv.writer(file).writerows([heads, *rows])


def _write_jsonl(file: Any, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """What is not known is left out."""
    for row in rows:
        named = {head: value for head, value in zip(heads, row) if value != ""}
        file.write(json.dumps(named, ensure_ascii=False) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdbench predict", description=__doc__)
    parser.add_argument("run", help="a run folder, or a weights file in one (best.safetensors)")
    parser.add_argument(
        "input", nargs="?", help="a folder of pictures, one picture, a table (.csv, .npz, ...) of vectors or texts, a "
        "file with a text a line (of a language model: one text), a folder of .txt files, or - for standard input"
    )  # fmt: skip
    parser.add_argument(
        "--text", metavar="TEXT", action="append", default=[], help="a text itself; several times: several"
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write all classes' probabilities there instead")
    parser.add_argument("--jsonl", metavar="FILE", type=Path, help="the same as lines of JSON")
    parser.add_argument("--top", metavar="K", type=int, default=3, help="classes to show (default: 3)")
    parser.add_argument(
        "--generate", metavar="N", type=int, help="of a language model: print the text and its N most probable tokens"
    )
    add_trust(parser)
    arguments = parser.parse_intermixed_args()
    require(arguments.top >= 1, "--top", arguments.top, "1 or more")
    require(arguments.generate is None or arguments.generate >= 1, "--generate", arguments.generate, "1 or more")
    one = (arguments.input is None) != (not arguments.text)
    require(one, "input", arguments.input, "one file or folder, or - for standard input, or --text TEXT in its place")
    for name in ("csv", "jsonl"):
        path, given = getattr(arguments, name), Path(arguments.input or "")
        if path is None:
            continue
        require(not path.is_dir(), f"--{name}", str(path), "a file")
        own = path.exists() and given.exists() and path.samefile(given)
        require(not own, f"--{name}", str(path), "another file than the input, which it would replace")
    return arguments
