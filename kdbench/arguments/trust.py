"""Which code a configuration that lies in a run folder may name: the folder may be a stranger's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdbench.arguments.locate import current
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR

_CODE = ("_target_", "reader", "source")  # keys whose value is the dotted path of what is called
_NAMED = re.compile(r"""^[\s-]*(?:_target_|reader|source):\s*["']?([\w.]+)""", re.MULTILINE)
_GROUPS = ("student", "dataset")  # of kdbench's own configurations: what a run folder is read for
# Networks that procedures and losses make of others.
_EXTENDED = ("kdbench.models.extended.reused", "kdbench.models.extended.expanded")
_MADE = ("kdbench.procedures.mutual.peers_from", *_EXTENDED)
_WAY = "If you trust where it comes from: --trust, in a training teacher.trust=true, or a --config-dir that names it"


@dataclass(frozen=True)
class Trust:
    """`allowed`: the dotted paths that may be named; None: any, by the user's word."""

    allowed: frozenset[str] | None

    def check(self, node: Any, source: str) -> None:
        """Raise a UserError for the first thing in a node, however deep, that would run code that is not allowed.

        Exact paths only: a kdbench module is not allowed for what it imports, nor kdbench for all that it has.
        """
        if self.allowed is None:
            return
        try:
            wrong = next(((k, path) for k, path in called(node) if current(path) not in self.allowed), None)
        except RecursionError as error:
            raise UserError(f"{source}: nested too deeply") from error
        if wrong is not None:
            raise UserError(f"{source}: {wrong[0]} = {wrong[1]} is not kdbench's own, and would be run. {_WAY}")


def trusting(*folders: str | Path, nodes: Iterable[Any] = ()) -> Trust:
    """Trust in kdbench's own networks and datasets, in what the user's configuration `folders` name, and in what the
    user's own configuration `nodes` name. Costs reading kdbench's YAML files of two groups: a few milliseconds."""
    places = [*(Path(CONFIG_DIR) / group for group in _GROUPS), *map(Path, folders)]
    named = {path for place in places for path in _named_in(place)}
    named |= {path for node in nodes for _, path in called(node)}
    return Trust(frozenset(map(current, named)) | set(_MADE))


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
