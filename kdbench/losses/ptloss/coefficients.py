"""What `loss.epsilon` may be, turned into numbers: a number, a list, a table, "r/m", a file, search or gradient."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdbench.errors import UserError, require, show
from kdbench.losses.ptloss.functional import orders

METHODS = ("search", "gradient")
RATIO = re.compile(r"\s*([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)\s*/\s*m\s*")
ALLOWED = "a number, a list of M numbers, C such lists, a number over m (0.5/m), a file, search, gradient or null"


class Source(NamedTuple):
    """Where the coefficients come from."""

    method: str  # "given", "search" or "gradient"
    values: Tensor | None  # [M] or [C, M] float64, M = order; None until calibrated
    tau: float | None = None  # the temperature that a file's numbers were fitted at, if it says so


def source_of(epsilon: Any, order: int) -> Source:
    """Read `loss.epsilon`. A number alone is eps_1. Fewer than `order` numbers a row count as followed by zeros
    (the same loss), more are refused.

    Raises UserError for anything else than what ALLOWED names, for files that cannot be read and for non-finite
    numbers.
    """
    if epsilon is None:
        return Source("given", torch.zeros(order, dtype=torch.float64))
    if isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool):
        epsilon = [epsilon]
    if not isinstance(epsilon, str):
        return Source("given", _padded(_numbers(epsilon, epsilon), order, epsilon))
    if epsilon in METHODS:
        return Source(epsilon, None)
    ratio = RATIO.fullmatch(epsilon)
    if ratio:
        require(-1 <= float(ratio[1]) <= 1e6, "epsilon", epsilon, "-1/m or more: 1/m + eps_m must not be negative")
        return Source("given", float(ratio[1]) / orders(torch.zeros(order, dtype=torch.float64)))
    return _from_file(epsilon, order)


def _from_file(name: str, order: int) -> Source:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError("epsilon", name, ALLOWED, "There is no such file")
    read = {".json": _json, ".pt": _torch, ".npy": _numpy, ".csv": _csv}.get(path.suffix)
    if read is None:
        raise UserError("epsilon", name, "a file that ends in .json, .pt, .npy or .csv")
    try:
        content = read(path)
    except (OSError, ValueError, RuntimeError, EOFError, ImportError) as error:
        raise UserError("epsilon", name, f"readable: {str(error).splitlines()[0]}") from error
    except Exception as error:  # an unpickler's own errors
        raise UserError("epsilon", name, f"readable: {type(error).__name__}") from error
    tau = None
    if isinstance(content, dict):
        if "epsilon" not in content:
            raise UserError("epsilon", name, "a file with the key epsilon")
        tau, content = content.get("tau"), content["epsilon"]
    numbers = _padded(_numbers(content, name), order, name)
    return Source("given", numbers, tau if isinstance(tau, (int, float)) else None)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _numpy(path: Path) -> Any:
    import numpy

    return numpy.load(path, allow_pickle=False).tolist()


def _csv(path: Path) -> Any:
    """One row a class (a single row: shared), numbers separated by commas, no header."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [[float(cell) for cell in line.split(",")] for line in lines]
    return rows[0] if len(rows) == 1 else rows


def _numbers(value: Any, typed: Any) -> Tensor:
    """[M] or [C, M] float64 from nested sequences or a tensor. UserError if not; `typed`: what the user wrote."""
    if isinstance(value, Tensor):
        value = value.tolist()
    rows = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    nested = bool(rows) and all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows)
    table = [list(row) for row in rows] if nested else [rows]
    lengths = sorted({len(row) for row in table})
    numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for row in table for x in row)
    if not numeric or 0 in lengths:
        raise UserError("epsilon", _short(typed), ALLOWED)
    if len(lengths) > 1:
        raise UserError("epsilon", _short(typed), f"rows of one length, not of {lengths[0]} and {lengths[-1]} numbers")
    numbers = torch.tensor(table, dtype=torch.float64)
    bad = (~torch.isfinite(numbers)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        place = f"{f'row {row}, ' if nested else ''}eps_{column + 1}"
        raise UserError("epsilon", _short(typed), f"finite, and {place} is {table[row][column]}")
    return numbers if nested else numbers[0]


def _padded(numbers: Tensor, order: int, typed: Any) -> Tensor:
    width = numbers.shape[-1]
    missing = order - width
    allowed = f"at most order = {order} numbers a row; with {width} set order={width}"
    require(missing >= 0, "epsilon", _short(typed), allowed)
    return torch.nn.functional.pad(numbers, (0, missing))


def _short(value: Any) -> str:
    text = show(value)
    return text if len(text) <= 60 or isinstance(value, str) else text[:57] + "..."
