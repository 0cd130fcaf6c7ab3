"""The groups and options that the configuration folders offer, read from the files alone (no Hydra, no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from kdbench.paths import CONFIG_DIR

_NO_GROUPS = {"hydra", "shared", ".hydra"}  # Hydra's settings, and parts that options are made of
_COMMENT = re.compile(r"^#(?!\s*@package)\s*(.+)")


def folders(arguments: Sequence[str] = ()) -> list[Path]:
    """Where options are looked for: kdbench's own folder, then the user's (`--config-dir`, hydra.searchpath).

    The order is Hydra's: of two files for one option the first counts.
    """
    found = [CONFIG_DIR]
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word in ("--config-dir", "-cd"):
            found.append(following)
        elif word.startswith("--config-dir="):
            found.append(word.partition("=")[2])
        elif word.startswith("hydra.searchpath="):
            found += re.findall(r"file://([^,\]'\"]+)", word)
    return [Path(place) for place in found]


def groups(places: Iterable[Path]) -> list[str]:
    """The names of all groups ("loss", "dataset/augment") in alphabetical order, Hydra's own left out."""
    found = {file.parent.relative_to(place) for place in places for file in place.glob("*/**/*.yaml")}
    return sorted(group.as_posix() for group in found if not _NO_GROUPS & set(group.parts))


def options(group: str, places: Iterable[Path]) -> dict[str, Path]:
    """The options of a group and their files. Every network of `student` is an option of `teacher` too."""
    sources = [group, "student"] if group == "teacher" else [group]
    found: dict[str, Path] = {}
    for source in sources:
        for place in places:
            for file in sorted((place / source).glob("*.yaml")):
                found.setdefault(file.stem, file)
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def summary(group: str, places: Sequence[Path]) -> str:
    """The options of a group in one line."""
    found = options(group, places)
    if group == "teacher":
        own = [name for name, file in found.items() if file.parent.name == "teacher"]
        return ", ".join([*own, "and every network of student"])
    return ", ".join(found)


def headline(file: Path) -> str:
    """What an option is: the first sentence of the file's first comment, without the option's own name in front."""
    for line in file.read_text(encoding="utf-8").splitlines():
        comment = _COMMENT.match(line)
        if comment:
            return re.split(r"\.\s+(?=[A-Z])", comment.group(1).removeprefix(f"{file.stem}: "))[0].rstrip(".")
        if line.strip() and not line.startswith("#"):
            break
    return ""


def _natural(name: str) -> list[tuple[int, str]]:
    """resnet8 before resnet20."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def has_key(file: Path, path: Sequence[str]) -> bool:
    """Whether a configuration file itself has the key at this path."""
    node: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True
