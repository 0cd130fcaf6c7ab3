"""Comments of the configuration files: what a key means, in the words that stand beside it (no Hydra, no torch)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kdbench.configure.options import groups, options
from kdbench.errors import UserError, nearest
from kdbench.paths import CONFIG_DIR

_LINE = re.compile(r"^(?P<indent>\s*)(?P<key>[\w-]+):(?:\s+(?P<rest>.*))?$")
_COMMENT = re.compile(r"(?:^|\s)#\s?(.*)$")
_INNER = ("defaults", "_target_")  # for Hydra, not for people


class Comment(NamedTuple):
    """One key."""

    key: str  # dotted, as it is typed
    value: str  # what the file says, as text; "" for a mapping that follows
    text: str
    file: Path


def of_option(group: str, option: str, places: Sequence[Path], package: str = "") -> dict[str, Comment]:
    """Every key of an option of a group with its comment, those of the files that it is made of first."""
    found = options(group, places)
    if option not in found:
        hint = nearest(option, found, "Did you mean {}? ")
        raise UserError(f"{group}={option}: there is no such option. {hint}Options: {', '.join(found)}")
    return _of_file(found[option], package or group.replace("/", "."), places)


def of_root() -> dict[str, Comment]:
    """The keys of train.yaml that belong to no group."""
    return {line.key: line for line in _lines(Path(CONFIG_DIR) / "train.yaml", "")}


def usual(places: Sequence[Path]) -> dict[str, str]:
    """The option that train.yaml chooses in each group."""
    tree = _tree(Path(CONFIG_DIR) / "train.yaml")
    chosen = {key: str(value) for one in tree["defaults"] if isinstance(one, dict) for key, value in one.items()}
    return {group: chosen[group] for group in groups(places) if chosen.get(group, "None") != "None"}


def explain(key: str, chosen: dict[str, str], places: Sequence[Path]) -> list[Comment]:
    """What a dotted key means, or each key below it. `chosen`: options by group, in place of the usual ones.

    A key that only other options of its group have is explained by the first of these. Raises UserError for a key that
    there is not, with the nearest ones.
    """
    for inner in ("schedule", "optimizer"):  # the teacher's own recipe has the same keys
        if key == f"teacher.{inner}" or key.startswith(f"teacher.{inner}."):
            theirs = explain(key.removeprefix("teacher."), chosen, places)
            return [one._replace(key=f"teacher.{one.key}") for one in theirs]
    group, _, rest = key.partition(".")
    known = usual(places) | chosen
    if group not in known:
        root = of_root()
        below = [root[name] for name in root if name == key or name.startswith(f"{key}.")]
        if not below:
            inside = [f"{one}.{key}" for one in known if f"{one}.{key}" in _of_group(one, known[one], places)]
            close = nearest(group, [*root, *known], "Did you mean {}? ")
            hint = f"Did you mean {' or '.join(inside)}? " if inside else close
            raise UserError(f"{key}: there is no such key. {hint}Groups: {', '.join(known)}")
        return below
    found = _of_group(group, known[group], places)
    below = _matching(found, key)
    if below:
        return below
    for option in options(group, places):
        other = _matching(_of_group(group, option, places), key)
        if other:
            return [one._replace(text=f"(with {group}={option}) {one.text}") for one in other]
    for inner in groups(places):
        if "/" in inner and key.startswith(f"{inner.replace('/', '.')}."):
            for option in options(inner, places):
                other = _matching(of_option(inner, option, places), key)
                if other:
                    return [one._replace(text=f"(with {inner}={option}) {one.text}") for one in other]
    hint = nearest(rest, [name.partition(".")[2] for name in found], f"Did you mean {group}.{{}}? ")
    raise UserError(f"{key}: {group}={known[group]} has no such key. {hint}kdbench explain {group} lists them")


def _of_group(group: str, option: str, places: Sequence[Path]) -> dict[str, Comment]:
    found = of_option(group, option, places)
    if group == "teacher":  # a network's own keys, and those that every teacher has
        base = Path(CONFIG_DIR) / "teacher" / "shared" / "base.yaml"
        found = {**{line.key: line for line in _lines(base, "teacher")}, **found}
    return found


def _matching(found: dict[str, Comment], key: str) -> list[Comment]:
    """The key itself, what lies below it, or the key that it lies in, where that is written in one line."""
    exact = [found[name] for name in found if name == key or name.startswith(f"{key}.")]
    if exact:
        return exact
    above = key.rpartition(".")[0]
    inside = found.get(above)
    last = key.rpartition(".")[2]
    return [inside] if inside is not None and re.search(rf"[{{,]\s*{re.escape(last)}\s*:", inside.value) else []


def _tree(file: Path) -> Any:
    """What a file holds, read by libyaml where PyYAML has it: ten times as quick, and a key is looked for in many."""
    return yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _of_file(file: Path, package: str, places: Sequence[Path]) -> dict[str, Comment]:
    tree: Any = _tree(file) or {}
    found: dict[str, Comment] = {}
    for one in tree.get("defaults", ()) if isinstance(tree, dict) else ():
        for part, inner in _parts(one, file, package, places):
            found |= _of_file(part, inner, places)
    return found | {line.key: line for line in _lines(file, package)}


def _parts(default: Any, file: Path, package: str, places: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The files that an entry of a defaults list takes in, with the key that they stand under."""
    if isinstance(default, str) and default != "_self_":
        name = default.removesuffix("@_here_")
        group = file.parent.name
        part = next(
            (p for p in (file.parent / f"{name}.yaml", *(q / group / f"{name}.yaml" for q in places)) if p.is_file()),
            None,
        )
        if part is not None:
            yield part, package
    elif isinstance(default, dict):
        for key, value in default.items():
            group = str(key).removeprefix("override ").lstrip("/")
            part = file.parent / group / f"{value}.yaml"
            if part.is_file():
                yield part, f"{package}.{group}"


def _lines(file: Path, package: str) -> Iterator[Comment]:
    """The keys of one file in order."""
    stack: list[tuple[int, str]] = []
    last: Comment | None = None
    column = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        if last is not None and line.lstrip().startswith("#") and line.index("#") >= max(column - 2, 8):
            last = last._replace(text=f"{last.text} {line.strip().lstrip('#').strip()}".strip())
            continue
        if last is not None:
            yield last
        last = None
        match = _LINE.match(line)
        if match is None:
            continue
        indent, name, rest = len(match["indent"]), match["key"], match["rest"] or ""
        stack = [(depth, key) for depth, key in stack if depth < indent] + [(indent, name)]
        if any(key in _INNER for _, key in stack):
            continue
        comment = _COMMENT.search(rest)
        value = rest[: comment.start()].strip() if comment else rest.strip()
        key = ".".join([*([package] if package else []), *(key for _, key in stack)])
        column = line.index("#") if comment else 0
        last = Comment(key, value, comment[1].strip() if comment else "", file)
    if last is not None:
        yield last
