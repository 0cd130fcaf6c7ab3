"""Rows of text files as people keep them: .csv, .tsv, .jsonl, .parquet, with the columns that are asked for."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from kdbench.data.arrays import Arrays, read_arrays, readable
from kdbench.errors import UserError, nearest, some

ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")


class Rows(NamedTuple):
    """A file's columns by name; by their numbers, from 0, where the file does not name them."""

    path: Path
    names: list[str]
    column: Callable[[str], list[Any]]
    size: int
    first: Sequence[str] = ()  # the first line of a file that does not name them

    def find(self, wanted: str) -> str | None:
        """The column that is called so in any case; "a|b": a, or else b. None if there is none."""
        for name in wanted.split("|"):
            found = next((own for own in self.names if own.casefold() == name.strip().casefold()), None)
            if found is not None:
                return found
        return None

    def known(self, wanted: str, key: str) -> str:
        """The same; raises UserError naming `key` and the columns that there are."""
        found = self.find(wanted)
        if found is None:
            there = some(self.names)
            if self.first:
                top = some(word[:40] for word in self.first)
                there += f" by number, since its first line names none that is looked for ({top})"
            raise UserError(key, wanted, f"a column of {self.path}: {there}", hint=nearest(wanted, self.names))
        return found

    def texts(self, name: str) -> list[str]:
        """A column as text; nothing is an empty one."""
        return ["" if _is_nothing(value) else str(value) for value in self.column(name)]

    def labels(self, name: str) -> np.ndarray:
        """A column as whole numbers or text; what is nothing stays as None."""
        values = [None if _is_nothing(value) else value for value in self.column(name)]
        if all(isinstance(value, int) for value in values):  # true and false, too
            return np.array(values, np.int64)
        return np.array([value if value is None else str(value).strip() for value in values], object)


def read_rows(path: Path, wanted: Sequence[str]) -> Rows:
    """A file's rows. `wanted`: names of columns, of which a file without a header has none in its first line.

    In .tsv and .txt files, which have tabs, quotation marks are part of the text, as in GLUE's. Raises UserError naming
    the file for what cannot be read, and the line of a row that has more or fewer columns than the first.
    """
    with readable(path):
        try:
            rows = _READERS[path.suffix.lower()](path, wanted)
        except UnicodeDecodeError as error:
            raise no_utf8(path) from error
    if not rows.size:
        raise UserError(f"{path}: it holds no rows")
    return rows


def read_text(path: Path) -> str:
    """A whole text file. Raises UserError naming it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise no_utf8(path) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def no_utf8(path: Path) -> UserError:
    """What is said of a text file in another encoding: which one it seems to be, and what makes it UTF-8."""
    with path.open("rb") as file:
        start = file.read(2**16)
    wide = start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start
    guess, known = ("UTF-16", "UTF-16") if wide else ("Windows-1252 (Latin-1)", "WINDOWS-1252")
    other = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return UserError(
        f"{path}: cannot be read as UTF-8 text: it looks like {guess}. iconv -f {known} -t UTF-8 {path} > {other} "
        "makes one that can be"
    )


def _table(path: Path, wanted: Sequence[str]) -> Rows:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    tabs = path.suffix.lower() != ".csv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline(2**24)
        file.seek(0)
        separator = "\t" if tabs else max(",;\t", key=first.count)
        lines = [(number, row) for number, row in _split(path, file, separator, quotes=not tabs) if row]
    wide = len(lines[0][1]) if lines else 0
    for number, row in lines:
        if len(row) != wide:
            raise UserError(f"{path}: line {number} has {len(row)} columns, the first one {wide}")
    top = [name.strip() for name in lines[0][1]] if lines else []
    named = {name.casefold() for name in top} & {name.casefold() for name in wanted if not name.isdigit()}
    names = _different(path, top) if named else [str(number) for number in range(wide)]
    places, body = {name: place for place, name in enumerate(names)}, [row for _, row in lines[bool(named) :]]
    unnamed = [] if named else top
    return Rows(path, names, lambda name: [row[places[name]] for row in body], len(body), unnamed)


def _split(path: Path, file: Iterable[str], separator: str, quotes: bool) -> Iterator[tuple[int, list[str]]]:
    """Rows, each with the number of its last line. A row of several lines must be written by the rules of .csv: a mark
    that opens a field, and is closed by the next one that opens another, would make one row of all between them."""
    seen: list[str] = []  # lines of the row that is being read

    def noted() -> Iterator[str]:
        for line in file:
            seen.append(line)
            yield line

    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(noted(), delimiter=separator, quoting=quoting)
    for row in reader:
        if len(seen) > 1:
            try:
                list(csv.reader(seen, delimiter=separator, strict=True))
            except csv.Error as error:
                first = reader.line_num - len(seen) + 1
                raise UserError(
                    f"{path}: lines {first} to {reader.line_num} would be one row, since quotation marks in them do "
                    f'not pair; in a text between quotation marks each is written twice ("")'
                ) from error
        seen.clear()
        yield reader.line_num, row


def _different(path: Path, names: list[str]) -> list[str]:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise UserError(f"{path}: two of its columns are called {twice!r}")
    return names


def _json_lines(path: Path, wanted: Sequence[str]) -> Rows:
    found: list[dict[str, object]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number} is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is no object with names and values")
            found.append(row)
    names = list(dict.fromkeys(name for row in found for name in row))
    return Rows(path, names, lambda name: [row.get(name) for row in found], len(found))


def _parquet(path: Path, wanted: Sequence[str]) -> Rows:
    arrays = read_arrays(path)
    assert isinstance(arrays, Arrays)
    count = len(next(iter(arrays.named.values())))
    return Rows(path, arrays.names, lambda name: arrays.named[name].tolist(), count)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


_READERS: dict[str, Callable[[Path, Sequence[str]], Rows]] = {
    ".csv": _table, ".tsv": _table, ".txt": _table, ".jsonl": _json_lines, ".parquet": _parquet,
}  # fmt: skip
