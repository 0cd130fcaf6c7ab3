"""A node of the configuration against what it is for: a `_target_`'s signature, or a dataclass of options."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf

from kdbench.configure.fit import fit
from kdbench.errors import UserError, nearest

T = TypeVar("T")
Node = Mapping[str, Any]


def check_node(node: Node, target: Callable[..., T], prefix: str) -> T:
    """Call `target` (a dataclass of options, or any callable) with the node's keys, after checking them against it.

    Raises UserError: an unknown key (with the nearest one), a value of the wrong type, a key without a value, or what
    the constructor itself refuses; the message starts with the key as the user types it (`prefix.key`).
    """
    node = contents(node)
    arguments = fit_arguments(node, target, prefix)
    _refuse_incomplete(target, arguments, prefix)
    return _call(target, arguments, prefix)


def construct(node: Node, prefix: str, **given: Any) -> Any:
    """Build the object that a `_target_` node describes, and the nodes inside it; `given` are kdbench's own arguments.

    Raises UserError as `check_node` does, and if the target cannot be imported.
    """
    node = contents(node)
    target = locate(node.get("_target_"), prefix)
    for key in given.keys() & node.keys():
        raise UserError(f"{prefix}.{key}: kdbench sets this one itself; leave it out")
    arguments = {**fit_arguments(node, target, prefix), **given}
    _refuse_incomplete(target, arguments, prefix)
    return _call(target, {key: _build(value, f"{prefix}.{key}") for key, value in arguments.items()}, prefix)


def contents(node: Node) -> dict[str, Any]:
    """A node as plain containers, whether it comes as such or as OmegaConf's."""
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {str(key): value for key, value in plain.items()}  # type: ignore[union-attr]


def fit_arguments(node: Node, target: Callable[..., Any], prefix: str) -> dict[str, Any]:
    """The node's keys as arguments of `target`, converted to its annotations; UserError for what does not fit."""
    wanted = parameters(target)
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in wanted.values())
    names = {name for name, p in wanted.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    arguments = {}
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in names and not accepts_all:
            raise unknown_key(f"{prefix}.{key}", names, prefix)
        arguments[key] = fit(value, wanted[key].annotation, f"{prefix}.{key}") if key in names else value
    return arguments


def unknown_key(full_key: str, known: Collection[str], owner: str) -> UserError:
    """The error for a key that nothing reads."""
    hint = nearest(full_key.rsplit(".", 1)[-1], known, f"Did you mean {owner}.{{}}? " if owner else "Did you mean {}? ")
    keys = ", ".join(sorted(known)) or "none"
    return UserError(f"{full_key}: there is no such key. {hint}{f'Keys of {owner}' if owner else 'Keys'}: {keys}")


def parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a callable by name, annotations evaluated; one that cannot be evaluated allows anything."""
    function = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    scope = getattr(function, "__globals__", {})
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        found[name] = parameter.replace(annotation=_evaluate(parameter.annotation, scope))
    return found


def locate(path: object, prefix: str = "") -> Any:
    """The class or function at a dotted path; UserError if there is none. The current folder is on the path."""
    key = f"{prefix}._target_" if prefix else "_target_"
    if not isinstance(path, str) or not path:
        raise UserError(f"{key}: must be the dotted path of a class or function, got {path}")
    parts = path.split(".")
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
                raise UserError(f"{key} = {path}: {module_name} has no {name}. {nearest(name, vars(found))}".rstrip())
            found = getattr(found, name)
        return found
    raise UserError(f"{key} = {path}: must be a dotted path, e.g. package.module.Class")


def _evaluate(annotation: Any, scope: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any

    def holder() -> None: ...

    holder.__annotations__ = {"value": annotation}
    try:
        return get_type_hints(holder, globalns=scope)["value"]
    except Exception:  # a name that is only imported for type checkers
        return Any


def _refuse_incomplete(target: Callable[..., Any], arguments: Node, prefix: str) -> None:
    for name, p in parameters(target).items():
        named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if named and p.default is p.empty and name not in arguments:
            raise UserError(f"{prefix}.{name}: needs a value")


def _call(target: Callable[..., T], arguments: Node, prefix: str) -> T:
    try:
        return target(**arguments)
    except ValueError as error:  # UserError is one
        raise UserError(_with_prefix(str(error), prefix, arguments)) from error


def _with_prefix(message: str, prefix: str, arguments: Node) -> str:
    """Make a constructor's message start with the key as the user types it: "tau must be" -> "loss.tau: must be"."""
    subject, _, rest = message.partition(" ")
    last = prefix.rsplit(".", 1)[-1]
    if subject.startswith(f"{prefix}."):
        return message
    if subject.startswith(f"{last}."):
        return f"{prefix}{subject.removeprefix(last)} {rest}"
    if subject.split(".")[0].split("[")[0] in arguments:
        return f"{prefix}.{subject}{'' if rest.startswith('=') else ':'} {rest}"
    return f"{prefix}: {message}"


def _build(value: Any, prefix: str) -> Any:
    if isinstance(value, dict) and "_target_" in value:
        return construct(value, prefix)
    if isinstance(value, dict):
        return {key: _build(item, f"{prefix}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_build(item, f"{prefix}[{i}]") for i, item in enumerate(value)]
    return value
