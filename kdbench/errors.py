"""The one exception that a user's own mistake raises: printed as a message, never as a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user typed or pointed at cannot work. The message names the key, the value and what is allowed."""


def nearest(word: str, known: Iterable[str], question: str = "Did you mean {}?") -> str:
    """A sentence offering the known words closest to `word`, or "" if none is close."""
    names = list(dict.fromkeys(map(str, known)))
    lower = {name.lower(): name for name in names}
    close = get_close_matches(str(word), names, n=2, cutoff=0.55)
    close = close or [lower[name] for name in get_close_matches(str(word).lower(), lower, n=2, cutoff=0.55)]
    return question.format(" or ".join(close)) if close else ""


def traced() -> bool:
    """Whether the user asked for tracebacks (KDBENCH_TRACEBACK=1)."""
    return os.environ.get("KDBENCH_TRACEBACK", "0") not in ("", "0")
