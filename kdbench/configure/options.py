"""The groups and options that the configuration folders offer, read from the files alone (no Hydra, no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdbench.paths import CONFIG_DIR

_COMMENT = re.compile(r"^#(?!\s*@package)\s*(.+)")


def folders(arguments: Sequence[str] = ()) -> list[Path]:
    """Where options are looked for: the user's folders (`--config-dir`, hydra.searchpath) first, kdbench's own last."""
    found = []
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word in ("--config-dir", "-cd"):
            found.append(following)
        elif word.startswith("--config-dir="):
            found.append(word.partition("=")[2])
        elif word.startswith("hydra.searchpath="):
            found += re.findall(r"file://([^,\]'\"]+)", word)
    return [*map(Path, found), Path(CONFIG_DIR)]


def groups(places: Iterable[Path]) -> list[str]:
    """The names of all groups, in alphabetical order; Hydra's own settings are none."""
    found = {path.name for place in places if place.is_dir() for path in place.iterdir() if path.is_dir()}
    return sorted(name for name in found - {"hydra"} if not name.startswith((".", "_")))


def options(group: str, places: Iterable[Path]) -> dict[str, Path]:
    """The options of a group and their files. Every network of `student` is an option of `teacher` too."""
    sources = [group, "student"] if group == "teacher" else [group]
    found: dict[str, Path] = {}
    for source in sources:
        for place in places:
            for file in sorted((place / source).glob("*.yaml")):
                found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def headline(file: Path) -> str:
    """The first comment of a configuration file: what it is, in a line."""
    for line in file.read_text(encoding="utf-8").splitlines():
        comment = _COMMENT.match(line)
        if comment:
            return comment.group(1)
        if line.strip() and not line.startswith("#"):
            break
    return ""


def has_key(file: Path, path: Sequence[str]) -> bool:
    """Whether a configuration file itself has the key at this path."""
    node: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True
