"""From a dotted path to the class or function that it names."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from kdbench.errors import UserError, nearest

# Modules under the names that configurations of the first edition (0.1) give them: their run folders can still be read.
_FIRST_EDITION = {
    "kdbench.data.views.": "kdbench.data.augment.views.",
    "kdbench.data.strong.": "kdbench.data.augment.strong.",
}


def locate(path: object, key: str = "_target_") -> Any:
    """The class or function at a dotted path; the current folder is on the path. Raises UserError naming `key`."""
    parts = current(path).split(".") if isinstance(path, str) else []
    for length in range(len(parts) - 1, 0, -1):  # the longest importable module, then names inside it
        module_name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # whatever a user's own module raises while it is imported
            if isinstance(error, ModuleNotFoundError) and length > 1 and error.name == module_name:
                continue
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{key} = {path}: cannot import {module_name} ({reason})") from error
        for name in parts[length:]:
            if not hasattr(found, name):
                raise UserError(f"{key} = {path}: {module_name} has no {name}. {nearest(name, dir(found))}".rstrip())
            found = getattr(found, name)
        if _can_be_called(found):
            return found
        raise UserError(key, path, "the path of a class or function whose arguments have names")
    raise UserError(key, path, "the dotted path of a class or function, e.g. package.module.name")


def is_own(target: object) -> bool:
    """Whether a class or function is none of kdbench's."""
    return str(getattr(target, "__module__", "")).partition(".")[0] != "kdbench"


def _can_be_called(found: object) -> bool:
    """Whether values can be passed by name: some of what is written in C has no signature, or none with names."""
    if not callable(found):
        return False
    try:
        wanted = inspect.signature(found).parameters.values()
    except ValueError:
        return False
    return not any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in wanted)


def current(path: str) -> str:
    """The path by which a target is known now."""
    for old, new in _FIRST_EDITION.items():
        if path.startswith(old):
            return new + path.removeprefix(old)
    return path
