"""Plain values against the signature of what they are for; every refusal names the key as the user types it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, get_type_hints

from kdbench.arguments.fit import fit
from kdbench.errors import UserError, nearest, under

T = TypeVar("T")
K = TypeVar("K")
Values = Mapping[str, object]
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def call(
    target: Callable[..., T], options: Values, key: str, given: Values | None = None, beside: Collection[str] = ()
) -> T:
    """target(**options, **given), after a check of `options`: what the user typed below `key`.

    given: kdbench's own arguments, which cannot be typed. beside: keys below `key` that something else reads.
    Raises UserError: an unknown key (with the nearest one), a value of the wrong type, a key without a value, or what
    the target itself refuses with a ValueError; the message starts with `key`.
    """
    return run(target, bind(target, options, key, given, beside), key)


def bind(
    target: Callable[..., Any], options: Values, key: str, given: Values | None = None, beside: Collection[str] = ()
) -> dict[str, object]:
    """All arguments of `call`, checked and complete, without calling."""
    given = given or {}
    arguments = {**fit_arguments(target, options, key, given, beside), **given}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind in _NAMED and parameter.default is parameter.empty and name not in arguments:
            raise UserError(f"{key}.{name}", said="needs a value")
    return arguments


def run(target: Callable[..., T], arguments: Values, key: str) -> T:
    """target(**arguments); what it refuses with a ValueError is a UserError whose key stands below `key`."""
    with under(key):
        return target(**arguments)


def checked(target: T) -> T:
    """A class or function whose arguments are fitted to their annotations whoever calls it, ranges included.

    Raises UserError naming the argument. For what is built in Python as well as from a configuration.
    """
    if inspect.isclass(target):
        target.__init__ = checked(target.__init__)  # type: ignore[misc, method-assign]
        return target
    signature = inspect.signature(target)  # type: ignore[arg-type]
    wanted: dict[str, inspect.Parameter] = {}

    @functools.wraps(target)  # type: ignore[arg-type]
    def fitted(*args: Any, **kwargs: Any) -> Any:
        if not wanted:  # at the first call: an annotation may name what its module defines later
            wanted.update(parameters(target))  # type: ignore[arg-type]
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if wanted[name].kind in _NAMED:
                bound.arguments[name] = fit(value, wanted[name].annotation, name)
        return target(*bound.args, **bound.kwargs)  # type: ignore[operator]

    return fitted  # type: ignore[return-value]


def of_keys(kind: type[K]) -> Callable[[Callable[[K, Mapping[str, object]], T]], Callable[..., T]]:
    """Makes a function of a dataclass, whose fields are its keys, and of a mapping of all other keys one that is called
    with the keys themselves: a node with many keys is read into one object, and its signature still names them."""

    def decorate(function: Callable[[K, Mapping[str, object]], T]) -> Callable[..., T]:
        signature, names = inspect.signature(kind), keys(kind)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> T:
            own = {name: kwargs.pop(name) for name in names & kwargs.keys()}
            return function(kind(*args, **own), kwargs)

        others = inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD)
        called.__signature__ = signature.replace(parameters=[*signature.parameters.values(), others])  # type: ignore[attr-defined]
        return called

    return decorate


def fit_arguments(
    target: Callable[..., Any], options: Values, key: str, given: Collection[str] = (), beside: Collection[str] = ()
) -> dict[str, object]:
    """`options` as arguments of `target`, converted to its annotations; UserError for what does not fit."""
    wanted, typed = parameters(target), keys(target) - set(given)
    arguments = {}
    for name, value in options.items():
        if name in given:
            raise UserError(f"{key}.{name}", said="kdbench sets this one itself; leave it out")
        if name not in typed and not _takes_all(target):
            raise unknown_key(f"{key}.{name}", typed.union(beside), key)
        arguments[name] = fit(value, wanted[name].annotation, f"{key}.{name}") if name in typed else value
    return arguments


def refuse_foreign(target: Callable[..., Any], typed: Values, name: str, given: Collection[str] = ()) -> None:
    """Raise a UserError for an option that a foreign function does not take, naming those that it takes, and for a
    value of another type. `given`: what kdbench gives itself; `name`: the function as the user knows it."""
    wanted = parameters(target)
    known = sorted(keys(target).difference(given))
    for key, value in typed.items():
        if key in known:
            fit(value, wanted[key].annotation, key)
        elif not _takes_all(target):
            raise UserError(key, value, f"left out: {name} takes {', '.join(known)}", nearest(key, known))


def accepted(target: Callable[..., Any], given: Values) -> dict[str, object]:
    """Those of `given` that `target` has a parameter for."""
    names = given.keys() if _takes_all(target) else keys(target)
    return {name: value for name, value in given.items() if name in names}


def keys(target: Callable[..., Any]) -> set[str]:
    """The names of the arguments that can be passed by name."""
    return {name for name, p in inspect.signature(target).parameters.items() if p.kind in _NAMED}


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a callable by name, annotations evaluated; one that cannot be evaluated allows anything."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    scope = getattr(function, "__globals__", {})
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        found[name] = parameter.replace(annotation=_evaluate(parameter.annotation, scope))
    return found


def unknown_key(full_key: str, known: Collection[str], owner: str) -> UserError:
    """The error for a key that nothing reads."""
    hint = nearest(full_key.rsplit(".", 1)[-1], known, f"Did you mean {owner}.{{}}? " if owner else "Did you mean {}? ")
    names = ", ".join(sorted(known)) or "none"
    return UserError(full_key, said=f"there is no such key. {hint}{f'Keys of {owner}' if owner else 'Keys'}: {names}")


def _takes_all(target: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())


def _evaluate(annotation: Any, scope: dict[str, object]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any

    def holder() -> None: ...

    holder.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(holder, globalns=scope, include_extras=True)["value"]
    except Exception:  # a name that is only imported for type checkers
        return Any
