"""Source code outside kdbench that a configuration names: a digest for each module, of what would be imported.

Modules are found as `import` finds them, but none is run. Followed are the imports that a file states, as far as they
lead to other files of the user's; what it imports by a computed name, or reads, is not seen.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from kdbench.arguments.locate import current
from kdbench.arguments.trust import called

Code = dict[str, dict[str, str]]  # digests by module, by what is named: {"loss mine.Loss": {"mine": "9f..."}}
UNSEEN = "unseen"  # of what has no source, such as a class typed into a console
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_SYSTEM = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
_imported: dict[str, str] = {}  # of modules that this process has imported: what runs is the source of that time


def sources(node: Any) -> Code:
    """The code of every `_target_` (`reader`, `source`) in a node that is not kdbench's own."""
    found: Code = {}
    for key, path in called(node):
        modules = modules_of(current(path))
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
    return {} if spec.origin.startswith(_SYSTEM) and not _is_installed(spec.origin) else {name: _digest(name, spec)}


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
    return not _is_installed(path) and not path.startswith(_SYSTEM)


def _is_installed(path: str) -> bool:
    return any(place in path for place in _INSTALLED)
