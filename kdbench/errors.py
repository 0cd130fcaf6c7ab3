"""The one exception that a user's own mistake raises: printed as a message, never as a traceback."""

from __future__ import annotations

import os
import shlex
import traceback
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches

from kdbench.paths import is_yours

_LONGEST = 400  # characters of a value in a message
_CONTROL = ("Cc", "Cs")  # Unicode's control and surrogate characters
_BACKWARDS = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


class UserError(ValueError):
    """Something the user typed or pointed at cannot work: which key, the value it has, and what is allowed there.

    `said` instead: what is wrong with the key itself (there is none of this name). With one argument that is the whole
    message, for what is no key's value (a file that is not there, a command that does not exist).

    What refuses a value names it as it knows it, `tau`; what called it with the user's keys says below which key it
    stands (`under`), so that the message names `procedure.losses[0].tau`, as it was typed.
    """

    def __init__(self, key: str, value: object = None, allowed: str = "", hint: str = "", said: str = "") -> None:
        super().__init__(key, value, allowed, hint, said)
        self.key, self.value, self.allowed, self.hint, self.said = key, value, allowed, hint, said

    def __str__(self) -> str:
        if not self.allowed:
            return f"{self.key}: {self.said}" if self.said else self.key
        return f"{self.key} = {_brief(show(self.value))}: must be {self.allowed}{f'. {self.hint}' if self.hint else ''}"

    def move_under(self, prefix: str) -> None:
        """Say that its key stands below `prefix`; one that begins with it already stays as it is."""
        if self.key == prefix or (self.key.startswith(prefix) and self.key[len(prefix)] in ".[ :="):
            return
        if self.allowed or self.said:
            self.key = joined(prefix, self.key)
        else:
            self.key, self.said = prefix, self.key
        self.args = (self.key, self.value, self.allowed, self.hint, self.said)


def require(ok: bool, key: str, value: object, allowed: str) -> None:
    """Raise a UserError that names the key, the value and what is allowed, unless `ok`."""
    if not ok:
        raise UserError(key, value, allowed)


@contextmanager
def under(prefix: str) -> Iterator[None]:
    """What is refused in here stands below this key; any ValueError is a refusal."""
    try:
        yield
    except UserError as error:
        error.move_under(prefix)
        raise
    except ValueError as error:
        raise UserError(prefix, said=str(error)) from error


@contextmanager
def read_from(file: object) -> Iterator[None]:
    """What is refused in here was read from this file, and the message names it."""
    try:
        yield
    except UserError as error:
        if str(file) in str(error):
            raise
        raise UserError(f"{file}: {error}") from error


def split(key: str, line: str) -> list[str]:
    """The words of a command line as a shell parts them. Raises UserError, naming the key, for an open quote."""
    try:
        return shlex.split(line)
    except ValueError as error:  # shlex says which: no closing quotation, no escaped character
        raise UserError(key, line, f"words as a shell parts them: {str(error).lower()}") from error


def joined(prefix: str, key: str) -> str:
    """The key `key` below `prefix`: loss and tau, members and [1]."""
    return f"{prefix}{'' if not prefix or key.startswith('[') else '.'}{key}"


def show(value: object) -> str:
    """A value as the user would type it."""
    if isinstance(value, str):
        return value or "''"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{show(key)}: {show(item)}' for key, item in value.items())}}}"
    return str(value)


def some(names: Iterable[object], most: int = 12) -> str:
    """Names for a message: all of a few, of many the first ones."""
    words = list(map(str, names))
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def _brief(text: str) -> str:
    """A value may be a whole text, or a list of all classes."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


class Busy(UserError):
    """Another process is at work in a run folder: nothing is wrong, and nothing of it may be touched."""

    def __init__(self, folder: str) -> None:
        super().__init__(f"{folder}: another process is training here. Wait for it, or choose another folder.")
        self.folder = folder

    def __reduce__(self) -> tuple[type[Busy], tuple[str]]:
        return Busy, (self.folder,)  # from another process


def nearest(word: str, known: Iterable[str], question: str = "Did you mean {}?") -> str:
    """A sentence offering the known words closest to `word`, or "" if none is close."""
    names = list(dict.fromkeys(map(str, known)))
    lower = {name.lower(): name for name in names}
    close = get_close_matches(str(word), names, n=2, cutoff=0.55)
    close = close or [lower[name] for name in get_close_matches(str(word).lower(), lower, n=2, cutoff=0.55)]
    return question.format(" or ".join(close)) if close else ""


def printable(text: str) -> str:
    """Text that may be a stranger's for a terminal: what would steer it (escape codes, text that runs backwards) is
    shown as its code; line ends and tabs stay."""
    if text.isprintable():  # nearly every text, and a hundred times quicker: no character that steers is printable
        return text
    return "".join(_code(c) if c not in "\n\t" and _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _CONTROL or unicodedata.bidirectional(character) in _BACKWARDS


def _code(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def in_your_code(error: BaseException) -> str:
    """Where in code that is neither kdbench's nor installed an exception arose, ", in mine.py, line 7 (forward)"; ""
    if it passed through none: the innermost place, since that is where whoever wrote it has to look."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        with suppress(OSError, ValueError):  # a current folder that is gone, another drive of Windows
            file = os.path.abspath(frame.f_code.co_filename)
            if is_yours(file):
                found = f", in {os.path.relpath(file)}, line {line} ({frame.f_code.co_name})"
    return found


def told(error: BaseException) -> str:
    """An exception in one line: a UserError as it is, any other with its kind and, if it is the user's, its place."""
    if isinstance(error, (UserError, OSError)):
        return str(error)
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}".removesuffix(": ") + in_your_code(error)


def traced() -> bool:
    """Whether the user asked for tracebacks (KDBENCH_TRACEBACK=1)."""
    return os.environ.get("KDBENCH_TRACEBACK", "0") not in ("", "0")
