"""Plain values from a config, checked against a function's signature before it is called."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kdbench.errors import UserError


def locate(path: str, key: str) -> Callable[..., Any]:
    """The object that a dotted path names. Raises UserError naming `key` if there is none."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key} must be the dotted path of a function or class, got {path!r}: {error}") from error
    return found  # type: ignore[no-any-return]


def call(function: Callable[..., Any], key: str, options: Mapping[str, Any], **given: Any) -> Any:
    """function(**given, **options), after a check of the options' names and types.

    `given` comes from kdbench and is passed on only where the function has a parameter of that name.
    Raises UserError that names `key`.<option>.
    """
    parameters = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [name for name, p in parameters.items() if name not in given and p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)  # type: ignore[misc]
    for name, value in options.items():
        if name not in allowed and not open_ended:
            known = ", ".join(allowed) or "none"
            raise UserError(f"{key}.{name} is not an option of {function.__name__}; its options: {known}")
        if name in hints and not fits(value, hints[name]):
            raise UserError(f"{key}.{name} must be {words(hints[name])}, got {value!r}")
    passed = {name: value for name, value in given.items() if name in parameters or open_ended}
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        and name not in passed
        and name not in options
    ]
    if missing:
        raise UserError(f"{key}.{missing[0]} must be given for {function.__name__}")
    return function(**passed, **options)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand where `hint` is written; a hint that is not plain data accepts everything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments and type(value) in {type(option) for option in arguments}
    if origin is list:
        return isinstance(value, (list, tuple)) and all(fits(item, arguments[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, str) if hint is str else True


def words(hint: Any) -> str:
    """A type hint in a user's words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(words(option) for option in arguments)
    if origin is Literal:
        return " | ".join(str(option) for option in arguments)
    if origin is list:
        return f"a list of {words(arguments[0])}"
    plain = {type(None): "null", bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return plain.get(hint, getattr(hint, "__name__", str(hint)))
