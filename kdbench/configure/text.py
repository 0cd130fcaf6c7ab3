"""What was typed, where Hydra's grammar would read something else: text that looks like a number, paths of any kind."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from kdbench.arguments import locate, parameters
from kdbench.configure.check import OPTIONS, TEACHER, RunOptions
from kdbench.errors import UserError

_PLAIN_VALUES = re.compile(r"[\w.+\-,\[\]]+")  # words, lists of them, several for a sweep: no quotes, no functions
_WORD = re.compile(r"[\w.+\-]+")
_READABLE = re.compile(r"[\w./+@%-]+", re.ASCII)  # what Hydra takes as text without quotes, whatever it says
_HOME = re.compile(r"(?<=[=,\[])~(?:/[^,\]]*)?(?=[,\]]|$)")


def readable(word: str) -> str:
    """A word of the command line as Hydra can read it: a path that is there, or one in ~, needs no quotes.

    Raises UserError for what is no UTF-8 text: it could not be kept in any of a run's files.
    """
    try:
        word.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(word).decode("utf-8", "replace")
        raise UserError(f"{shown}: is no UTF-8 text, so a run could not keep it; rename the file or folder") from error
    key, equals, value = word.partition("=")
    if not equals or word.startswith(("-", "~")) or value[:1] in ("'", '"'):
        return word
    if not _READABLE.fullmatch(value) and value and os.path.exists(os.path.expanduser(value)):
        return f"{key}={quoted(value)}"
    return _HOME.sub(lambda match: quoted(match[0]), word)


def quoted(text: str) -> str:
    """A text as Hydra and OmegaConf read it back: in quotes, interpolations escaped."""
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    return "'" + re.sub(r"(\\+)$", lambda match: match[1] * 2, text) + "'"


def in_quotes(word: str, cfg: DictConfig) -> str:
    """An override with quotes around what would be read as another text's number, where its key takes text.

    `cfg` is the composed configuration: it says what reads the key.
    """
    key, _, value = word.partition("=")
    if not _PLAIN_VALUES.fullmatch(value) or not any(map(_looks_otherwise, _WORD.findall(value))):
        return word
    leaves = _kinds(key.lstrip("+"), cfg)
    return f"{key}=" + _WORD.sub(lambda match: _as_text(match[0], leaves), value)


def _as_text(word: str, kinds: set[Any]) -> str:
    value = _read(word)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = (float in kinds and number) or (type(value) in kinds and _spelled(value) == word)
    return f"'{word}'" if kinds & {str, Path} and not fits and _looks_otherwise(word) else word


def _looks_otherwise(word: str) -> bool:
    """Whether Hydra reads a word as a number or a truth value that is written otherwise."""
    value = _read(word)
    return isinstance(value, bool) or (isinstance(value, (int, float)) and _spelled(value) != word)


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(word: str) -> Any:
    if not re.match(r"[-+\d.]|true$|false$|inf$|nan$", word, re.IGNORECASE):
        return word
    return OverridesParser.create().parse_override(f"k={word}").value()


def _kinds(key: str, cfg: DictConfig) -> set[Any]:
    """The types that a key takes; of a list, those of its items."""
    if key.startswith("paths."):
        return {str}
    annotation = _annotation(key, cfg)  # loads what reads the key
    return set() if annotation is Any else set(_flat(annotation))


def _flat(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Union, UnionType, list, tuple):
        for part in get_args(annotation):
            yield from _flat(part)
    elif hasattr(annotation, "__metadata__"):  # Annotated
        yield from _flat(get_args(annotation)[0])
    else:
        yield annotation


def _annotation(key: str, cfg: DictConfig) -> Any:
    owner, _, name = key.rpartition(".")
    if not owner:
        return get_type_hints(RunOptions).get(name, Any)
    node = OmegaConf.select(cfg, owner) if owner.partition(".")[0] in cfg else None
    targets = [OPTIONS[owner]] if owner in OPTIONS else []
    if isinstance(node, DictConfig):
        targets += [TEACHER] if owner == "teacher" else []
        targets += [node[at] for at in ("_target_", "reader") if isinstance(node.get(at), str)]
    for target in targets:
        try:
            found = parameters(locate(target))
        except UserError:  # said when it is built
            continue
        if name in found:
            return found[name].annotation
    return Any
