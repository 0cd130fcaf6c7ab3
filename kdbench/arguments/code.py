"""Code that a configuration names by dotted paths: importing it, whether a run folder may name it, and its source.

Sources are found as `import` finds modules, but none is run. Followed are the imports that a file states, as far as
they lead to other files of the user's; what it imports by a computed name, or reads, is not seen.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from kdbench.errors import UserError, in_your_code, nearest
from kdbench.paths import CONFIG_DIR, is_installed, is_pythons

# Modules under the names that configurations of the first edition (0.1) give them: their run folders can still be read.
_FIRST_EDITION = {
    "kdbench.data.views.": "kdbench.data.augment.views.",
    "kdbench.data.strong.": "kdbench.data.augment.strong.",
}


def locate(path: object, key: str = "_target_") -> Any:
    """The class or function at a dotted path; the current folder is on the path. Raises UserError naming `key`."""
    parts = current_path(path).split(".") if isinstance(path, str) else []
    for length in range(len(parts) - 1, 0, -1):  # the longest importable module, then names inside it
        module_name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # whatever a user's own module raises while it is imported
            if isinstance(error, ModuleNotFoundError) and length > 1 and error.name == module_name:
                continue
            reason = f"{type(error).__name__}: {error}{in_your_code(error)}"
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


def current_path(path: str) -> str:
    """The path by which a target is known now."""
    for old, new in _FIRST_EDITION.items():
        if path.startswith(old):
            return new + path.removeprefix(old)
    return path


_CODE = ("_target_", "reader", "source")  # keys whose value is the dotted path of what is called
_NAMED = re.compile(r"""^[\s-]*(?:_target_|reader|source):\s*["']?([\w.]+)""", re.MULTILINE)
_GROUPS = ("student", "dataset")  # of kdbench's own configurations: what a run folder is read for
# Networks that procedures and losses make of others.
_EXTENDED = ("kdbench.models.extended.reused", "kdbench.models.extended.expanded")
_MADE = ("kdbench.procedures.mutual.peers_from", *_EXTENDED)
_WAY = "If you trust where it comes from: --trust, in a training teacher.trust=true, or a --config-dir that names it"


@dataclass(frozen=True)
class Trust:
    """`allowed`: the dotted paths that may be named, or what finds them; None: any, by the user's word."""

    allowed: frozenset[str] | Callable[[], frozenset[str]] | None

    def check(self, node: Any, source: str) -> None:
        """Raise a UserError for the first thing in a node, however deep, that would run code that is not allowed.

        Exact paths only: a kdbench module is not allowed for what it imports, nor kdbench for all that it has.
        """
        if self.allowed is None:
            return
        allowed = self.allowed() if callable(self.allowed) else self.allowed
        try:
            wrong = next(((k, path) for k, path in called(node) if current_path(path) not in allowed), None)
        except RecursionError as error:
            raise UserError(f"{source}: nested too deeply") from error
        if wrong is not None:
            raise UserError(f"{source}: {wrong[0]} = {wrong[1]} is not kdbench's own, and would be run. {_WAY}")


def trusting(*folders: str | Path, nodes: Sequence[Any] = ()) -> Trust:
    """Trust in kdbench's own networks and datasets, in what the user's configuration `folders` name, and in what the
    user's own configuration `nodes` name. Asked first it reads kdbench's YAML files of two groups, 15 ms: most runs
    name nothing that a run folder brings."""
    places = [*(Path(CONFIG_DIR) / group for group in _GROUPS), *(Path(folder).absolute() for folder in folders)]

    @functools.cache
    def allowed() -> frozenset[str]:
        named = {path for place in places for path in _named_in(place)}
        named |= {path for node in nodes for _, path in called(node)}
        return frozenset(map(current_path, named)) | set(_MADE)

    return Trust(allowed)


def called(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted path in a node that is called, with its key; also in JSON text, in which networks of networks keep
    theirs, and timm's `checkpoint_path`, which may be a pickle that runs code."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            code = key in _CODE and value is not None and not isinstance(value, Mapping)
            if code or (key == "checkpoint_path" and value):
                yield f"{prefix}{key}", str(value)
            else:
                yield from called(value, f"{prefix}{key}.")
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from called(item, prefix)
    elif isinstance(node, str) and node.lstrip().startswith(("{", "[")):
        try:
            yield from called(json.loads(node), prefix)
        except ValueError:  # plain text: nothing reads it as a configuration
            return


def _named_in(folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.yaml")):
        yield from _NAMED.findall(file.read_text(encoding="utf-8", errors="replace"))


Code = dict[str, dict[str, str]]  # digests by module, by what is named: {"loss mine.Loss": {"mine": "9f..."}}
UNSEEN = "unseen"  # of what has no source, such as a class typed into a console
_imported: dict[str, str] = {}  # of modules that this process has imported: what runs is the source of that time


def sources(node: Any) -> Code:
    """The code of every `_target_` (`reader`, `source`) in a node that is not kdbench's own."""
    found: Code = {}
    for key, path in called(node):
        modules = modules_of(current_path(path))
        if modules:
            found[f"{key.removesuffix('._target_')} {path}"] = modules
    return found


def modules_of(path: str) -> dict[str, str]:
    """Digests of a target's module and of the user's modules that it imports; of an installed package, of the module
    alone. {} for kdbench's own, for Python's own, and for what is no dotted path."""
    if path.partition(".")[0] == "kdbench" or not all(part.isidentifier() for part in path.split(".")):
        return {}
    name = _module_name(path)
    if name is None:
        return _live(path)
    spec = _spec(name)
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        return {}
    if _is_own(spec.origin):
        found: dict[str, str] = {}
        _follow(name, found)
        return dict(sorted(found.items()))
    return {} if is_pythons(spec.origin) else {name: _digest(name, spec)}


def code_of(thing: object) -> dict[str, str]:
    """The same of an object's class, of the user's own code alone."""
    kind = thing if inspect.isclass(thing) else type(thing)
    found: dict[str, str] = {}
    _follow(kind.__module__, found)
    return dict(sorted(found.items())) or (
        {} if _spec(kind.__module__) else _live(f"{kind.__module__}.{kind.__name__}")
    )


def _follow(name: str, found: dict[str, str]) -> None:
    """Add a module of the user's, the packages that it lies in, and what these import."""
    spec = _spec(name)
    if name in found or name.partition(".")[0] == "kdbench" or spec is None:
        return
    if spec.origin is None or not os.path.isfile(spec.origin) or not _is_own(spec.origin):
        return
    found[name] = _digest(name, spec)
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    about = os.stat(spec.origin)
    for one in (name.rpartition(".")[0], *_imports(spec.origin, about.st_size, about.st_mtime_ns, package)):
        if one:
            _follow(one, found)


@functools.cache
def _imports(path: str, _size: int, _changed: int, package: str) -> list[str]:
    """The modules that a file may import, wherever in it; also names that may be no modules."""
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):  # compiled, or it says so itself when it is imported
        return []
    return list(dict.fromkeys(name for node in ast.walk(tree) for name in _named(node, package)))


def _named(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        if base:
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _module_name(path: str) -> str | None:
    """The longest part of a dotted path that is a module with a file."""
    parts = path.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if (spec := _spec(name)) is not None and spec.origin is not None), None)


def _spec(name: str) -> ModuleSpec | None:
    """Where a module would be imported from, without running the packages that it lies in."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # __main__, or made by hand
        return None
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _live(path: str) -> dict[str, str]:
    """Of a module without a file, such as a notebook's: the source of the class itself, if it is known."""
    module, _, rest = path.partition(".")
    found = sys.modules.get(module)
    for name in rest.split(".") if found is not None else ():
        found = getattr(found, name, None)
    if found is None:
        return {}
    try:
        return {module: _hashed(inspect.getsource(found).encode())}  # type: ignore[arg-type]
    except (OSError, TypeError):
        return {module: UNSEEN}


def _digest(name: str, spec: ModuleSpec) -> str:
    """Of the file as it was when this process first asked, once the module is imported: that code is what runs."""
    assert spec.origin is not None
    if name not in sys.modules or spec.origin not in _imported:
        with open(spec.origin, "rb") as file:
            _imported[spec.origin] = _hashed(file.read())
    return _imported[spec.origin]


def _hashed(source: bytes) -> str:
    return hashlib.sha256(source.replace(b"\r\n", b"\n")).hexdigest()[:16]


def _is_own(path: str) -> bool:
    return not (is_installed(path) or is_pythons(path))
