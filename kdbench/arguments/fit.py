"""Does a value fit a type annotation? Values come from YAML and the command line, annotations from constructors."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from kdbench.arguments.ranges import LARGEST, Range
from kdbench.errors import UserError, nearest, show

_LISTS = (list, tuple, set, frozenset, Sequence)
_MAPPINGS = (dict, Mapping)
_WORDS = {
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "true or false (bool)",
    str: "text (str)",
    type(None): "null",
    Path: "a path (text)",
}


class Misfit(Exception):
    """A value that does not fit: where inside it (".task", "[1]"), the part that does not, and what fits there."""

    def __init__(self, value: Any, expected: str, where: str = "", hint: str = "") -> None:
        super().__init__(expected)
        self.value, self.expected, self.where, self.hint = value, expected, where, hint


def fit(value: Any, annotation: Any, key: str) -> Any:
    """`value` as `annotation` wants it: an int becomes a float, a list a tuple, "inf" a number where that is asked for.

    `Annotated[float, above(0)]` wants a value in that range, too. Raises UserError naming `key`, the value and what is
    allowed. Annotations it does not know let everything pass.
    """
    try:
        return _fit(value, annotation)
    except Misfit as misfit:
        raise UserError(f"{key}{misfit.where}", misfit.value, misfit.expected, misfit.hint) from None


def words(annotation: Any) -> str:
    """What an annotation allows, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = [part.words for part in args[1:] if isinstance(part, Range)]
        kind = [words(args[0])] if args[0] in (int, float) or not ranges else []
        return ", ".join(kind + ranges)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(show(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(words(arg) for arg in args)
    if origin in _LISTS:
        items = [arg for arg in args if arg is not Ellipsis]
        return f"a list, each {words(items[0])}" if len(items) == 1 else "a list"
    if origin in _MAPPINGS or annotation in _MAPPINGS:
        return "a mapping {key: value}"
    if annotation in _LISTS:
        return "a list"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _fit(value: Any, annotation: Any) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _fit_range(value, args, annotation)
    if origin in (Union, types.UnionType):
        return _fit_union(value, annotation)
    if origin is Literal:
        return _fit_literal(value, args)
    if (origin or annotation) in _LISTS:
        return _fit_list(value, origin or annotation, args, annotation)
    if (origin or annotation) in _MAPPINGS:
        return _fit_mapping(value, args, annotation)
    if isinstance(annotation, type) and annotation is not object:
        return _fit_class(value, annotation)
    return value


def _fit_range(value: Any, args: Sequence[Any], annotation: Any) -> Any:
    try:
        fitted = _fit(value, args[0])
    except Misfit as misfit:
        raise misfit if misfit.where else Misfit(value, words(annotation), hint=misfit.hint) from None
    for part in args[1:]:
        if isinstance(part, Range) and not part.holds(fitted):
            huge = isinstance(fitted, float) and abs(fitted) > LARGEST
            raise Misfit(value, f"{part.words}{f', no larger than {LARGEST:g}' if huge else ''}")
    return fitted


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _fit_class(value: Any, wanted: type) -> Any:
    built = dataclasses.is_dataclass(wanted) or wanted is Path
    if wanted is float and isinstance(value, float) and math.isnan(value):
        raise Misfit(value, words(wanted))
    if type(value) is wanted or (built and isinstance(value, wanted)):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is float and number:
        return float(value)
    if wanted is float and isinstance(value, str) and _is_infinite(value):
        return float(value)
    if wanted is str and number:
        return str(value)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if issubclass(wanted, enum.Enum) and isinstance(value, str):
        return _fit_literal(value, tuple(member.name for member in wanted)) and wanted[value]
    if wanted in _WORDS or (dataclasses.is_dataclass(wanted) and not isinstance(value, dict)):
        raise Misfit(value, words(wanted))
    return value  # a class of its own: a nested node that is built later


def _is_infinite(text: str) -> bool:
    try:
        return math.isinf(float(text))
    except ValueError:
        return False


def _fit_literal(value: Any, allowed: Sequence[Any]) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise Misfit(value, words(Literal[tuple(allowed)]), hint=nearest(show(value), map(show, allowed)))
    return value


def _fit_union(value: Any, annotation: Any) -> Any:
    """An exact type first (3 stays an int in float | int), then what converts; text takes a number as a last resort."""
    members = get_args(annotation)
    exact = next((member for member in members if type(value) is _bare(member)), None)
    if exact is not None:
        try:
            return _fit(value, exact)
        except Misfit as misfit:
            others = [words(member) for member in members if member is not exact]
            raise Misfit(value, " or ".join([misfit.expected, *others])) from None
    deepest: Misfit | None = None
    for member in sorted(members, key=lambda member: _bare(member) is str):
        try:
            return _fit(value, member)
        except Misfit as misfit:
            deepest = misfit if misfit.where and deepest is None else deepest
    raise deepest or Misfit(value, words(annotation), hint=_hint(value, members))


def _hint(value: Any, members: Sequence[Any]) -> str:
    literals = [show(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    return nearest(show(value), literals)


def _fit_list(value: Any, kind: Any, args: Sequence[Any], annotation: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise Misfit(value, words(annotation))
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise Misfit(list(value), f"a list of {len(args)}")
        kinds: Sequence[Any] = args
    else:
        kinds = [args[0] if args else Any] * len(value)
    items = [_inside(f"[{i}]", item, wanted) for i, (item, wanted) in enumerate(zip(value, kinds))]
    return kind(items) if kind in (tuple, set, frozenset) else items


def _fit_mapping(value: Any, args: Sequence[Any], annotation: Any) -> Any:
    if not isinstance(value, Mapping):
        raise Misfit(value, words(annotation))
    wanted = args[1] if len(args) == 2 else Any
    return {key: _inside(f".{key}", item, wanted) for key, item in value.items()}


def _inside(where: str, value: Any, annotation: Any) -> Any:
    try:
        return _fit(value, annotation)
    except Misfit as misfit:
        raise Misfit(misfit.value, misfit.expected, where + misfit.where, misfit.hint) from None
