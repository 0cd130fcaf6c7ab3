"""Arrays of a file by name: .npz, .pt, .safetensors, or the columns of .csv, .tsv, .parquet. Nothing in it is run."""

from __future__ import annotations

import csv
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kdbench.errors import UserError, nearest, some

ENDINGS = (".npz", ".pt", ".pth", ".safetensors", ".csv", ".tsv", ".parquet")
_BROKEN = (
    OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
    pickle.UnpicklingError, SafetensorError, csv.Error, UnicodeError,
)  # fmt: skip


@dataclass(frozen=True)
class Arrays:
    """Named arrays. Of a table (`table`) each is a column [N]."""

    path: Path
    named: Mapping[str, Any]
    table: bool = False

    @property
    def names(self) -> list[str]:
        return list(self.named)

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """[N, D]: arrays [N, d] or [N] beside each other. Raises UserError for what is no number, or another shape."""
        parts = [self._numbers(name) for name in names]
        if len({len(part) for part in parts}) > 1:
            sizes = ", ".join(f"{name} {len(part)}" for name, part in zip(names, parts, strict=True))
            raise UserError(f"{self.path}: arrays that are joined must have as many rows as each other ({sizes})")
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def words(self, name: str) -> np.ndarray:
        """[N] numbers or text. Raises UserError for another shape."""
        array = self._array(name)
        array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
        if array.ndim != 1:
            raise UserError(f"{self.path}: {name} has the shape {list(array.shape)}; one number or name a sample: [N]")
        return array

    def _numbers(self, name: str) -> np.ndarray:
        array = self._array(name)
        if array.dtype.kind not in "biuf":
            held = "text" if array.dtype.kind in "USO" else str(array.dtype)
            others = "; dataset.keys.inputs lists the columns that are numbers" if self.table else ""
            raise UserError(f"{self.path}: {name} holds {held}, no numbers{others}")
        array = array[:, None] if array.ndim == 1 and (self.table or len(array)) else array
        if array.ndim != 2 or not array.size:
            raise UserError(
                f"{self.path}: {name} has the shape {list(array.shape)}; vectors are [samples, dimensions]"
                + (", so flatten each sample" if array.ndim > 2 else "")
            )
        return array

    def _array(self, name: str) -> np.ndarray:
        with readable(self.path, f" ({name})"):
            found = self.named[name]
            return found if isinstance(found, np.ndarray) else np.asarray(found)


@dataclass(frozen=True)
class TextTable:
    """A .csv or .tsv file with the names of its columns in its first line; columns are read when they are asked for."""

    path: Path
    names: list[str]
    separator: str
    table: bool = True

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """[N, D] float64. Raises UserError naming row and column of what is no number."""
        return self._read(names, np.float64)

    def words(self, name: str) -> np.ndarray:
        """[N] text."""
        return np.char.strip(self._read([name], np.str_)[:, 0])

    def _read(self, names: Sequence[str], kind: type) -> np.ndarray:
        columns = [self.names.index(name) for name in names]
        with readable(self.path, "; dataset.keys.inputs lists the columns that are numbers"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file without rows, which is refused below
            found: np.ndarray = np.loadtxt(
                self.path, kind, delimiter=self.separator, skiprows=1, usecols=columns, quotechar='"', comments=None,
                encoding="utf-8-sig", ndmin=2,
            )  # fmt: skip
        if not found.size:
            raise UserError(f"{self.path}: no rows below the names of the columns")
        return found


File = Arrays | TextTable


def read_arrays(path: Path) -> File:
    """The arrays of a file. Raises UserError naming it if it is of no known kind or cannot be read."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError("dataset.root", str(path), f"a file that ends in {', '.join(ENDINGS)}")
    with readable(path):
        found = reader(path)
    if not found.names:
        raise UserError(f"{path}: it holds no arrays")
    return found


@contextmanager
def readable(path: Path, where: str = "") -> Iterator[None]:
    """What a damaged or foreign file raises in here is a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        pickled = isinstance(error, pickle.UnpicklingError) or "allow_pickle" in reason
        if pickled:
            reason = "it holds Python objects (pickled), which could run code; save numbers, and names as text"
        raise UserError(f"{path}: cannot be read{where}: {reason}") from error


def known(file: File, name: str, key: str) -> str:
    """`name`, if the file has it. Raises UserError naming the key and what there is."""
    if name not in file.names:
        what = "a column" if file.table else "an array"
        raise UserError(key, name, f"{what} of {file.path}: {some(file.names)}", hint=nearest(name, file.names))
    return name


def _npz(path: Path) -> Arrays:
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError("it is no archive of arrays")
    return Arrays(path, found)


def _torch(path: Path) -> Arrays:
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"it holds {type(found).__name__}, no dict of tensors by name")
    return Arrays(path, {name: _plain(value) for name, value in found.items()})


def _safetensors(path: Path) -> Arrays:
    return Arrays(path, {name: _plain(value) for name, value in load_file(path).items()})


def _plain(value: Any) -> Any:
    """A tensor as numpy has it, which knows no bfloat16."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def _text(path: Path) -> TextTable:
    with path.open(encoding="utf-8-sig", newline="") as file:
        line = file.readline(2**20)
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=line.count)
    names = [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
    twice = next((name for i, name in enumerate(names) if name in names[:i] or not name), None)
    if twice is not None:
        raise ValueError(f"its first line must name each column by a name of its own; {twice or 'one'!r} is not")
    if names and all(_is_number(name) for name in names):
        raise ValueError(f"its first line must name the columns, and holds numbers ({', '.join(names[:3])}, ...)")
    return TextTable(path, names, separator)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> Arrays:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet takes pyarrow: pip install 'kdbench[parquet]'") from error
    read = pq.read_table(path)
    named = {}
    for name in read.column_names:
        column = read[name]
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
            named[name] = column.to_numpy()  # what is missing becomes NaN
        else:
            named[name] = np.array(column.to_pylist())
    return Arrays(path, named, table=True)


_READERS: dict[str, Callable[[Path], File]] = {
    ".npz": _npz, ".pt": _torch, ".pth": _torch, ".safetensors": _safetensors, ".csv": _text, ".tsv": _text,
    ".parquet": _parquet,
}  # fmt: skip
