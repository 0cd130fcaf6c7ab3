"""Range checks of what a user may set on a loss: one line each, naming the key as it is typed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdbench.errors import UserError


def positive(name: str, value: float) -> float:
    """A finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise UserError(f"loss.{name} must be a finite number > 0, got {value}")
    return float(value)


def finite(name: str, value: float, low: float = -math.inf) -> float:
    """A finite number, at least `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        raise UserError(f"loss.{name} must be a finite number{'' if low == -math.inf else f' >= {low:g}'}, got {value}")
    return float(value)


def share(name: str, value: float) -> float:
    """A share of the training, in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise UserError(f"loss.{name} must be a share of the training in [0, 1], got {value}")
    return float(value)


def inside(name: str, value: float) -> float:
    """A number strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1.0:
        raise UserError(f"loss.{name} must be in (0, 1), got {value}")
    return float(value)


def choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """One of the words allowed."""
    if value not in allowed:
        raise UserError(f"loss.{name} must be one of {', '.join(allowed)}, got {value}")
    return value


def count(name: str, value: int) -> int:
    """A whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"loss.{name} must be a whole number >= 1, got {value}")
    return value


def temperature_or_limit(value: float | str) -> float:
    """A temperature in [0, inf], both ends included; the text "inf" or ".inf" counts as the number that it says."""
    text = str(value).strip().lower()
    try:
        tau = math.inf if text in ("inf", ".inf", "+.inf") else float(text)
    except ValueError:
        tau = math.nan
    if not tau >= 0.0:
        raise UserError(f"loss.tau must be a number > 0, or 0 or inf for the limits, got {value}")
    return tau
