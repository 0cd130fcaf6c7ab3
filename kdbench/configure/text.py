"""What was typed, where Hydra's grammar would read something else: text that looks like a number, paths of any kind."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from kdbench.arguments import locate, parameters
from kdbench.configure.check import OPTIONS, PARTS, TEACHER, RunOptions
from kdbench.errors import UserError

_TOKEN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[{}\[\],:]|[^{}\[\],:'"]+|.""")
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
        raise UserError(_why_unreadable(os.fsencode(word))) from error
    key, equals, value = word.partition("=")
    if not equals or word.startswith(("-", "~")) or value[:1] in ("'", '"'):
        return word
    if not _READABLE.fullmatch(value) and value and os.path.exists(os.path.expanduser(value)):
        return f"{key}={quoted(value)}"
    return _HOME.sub(lambda match: quoted(match[0]), word)


def _why_unreadable(word: bytes) -> str:
    """Why a word cannot be kept: the locale cannot write it (LC_ALL=C), or it is no UTF-8."""
    shown = word.decode("utf-8", "replace")
    if shown.encode() != word:
        return f"{shown}: is no UTF-8 text, so a run could not keep it; rename the file or folder"
    encoding = sys.getfilesystemencoding()
    return f"{shown}: the locale's encoding ({encoding}) has not all of these characters: type LC_ALL=C.UTF-8 before it"


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
    other = re.search(r"[($\\]", value) or (":" in value and "{" not in value)  # a function, an interpolation, 12:30
    if other or not any(map(_looks_otherwise, _WORD.findall(value))):
        return word
    return f"{key}=" + "".join(_as_texts(key.lstrip("+"), value, cfg))


def _as_texts(key: str, value: str, cfg: DictConfig) -> Iterator[str]:
    """The tokens of a value (words, lists and mappings of them, several for a sweep), in quotes where that must be."""
    path = [key]  # of the key that a word is the value of: mappings that are open
    tokens = _TOKEN.findall(value)
    for token, following in zip(tokens, [*tokens[1:], ""]):
        word = token.strip()
        if token == "{":
            path.append("")
        elif token == "}":
            path = path[:-1] or [""]
        elif following == ":":
            path[-1] = word
        elif _WORD.fullmatch(word):
            token = token.replace(word, _as_text(word, _kinds(".".join(path), cfg)))
        yield token


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
    """What reads a key says what it takes; what reads a mapping says it of the keys in it."""
    owner, _, name = key.rpartition(".")
    if not owner:
        return get_type_hints(RunOptions, include_extras=True).get(name, Any)
    for target in _readers(owner, cfg):
        try:
            found = parameters(locate(target))
        except UserError:  # said when it is built
            continue
        if name in found:
            return found[name].annotation
    return _values(_annotation(owner, cfg))


def _readers(owner: str, cfg: DictConfig) -> Iterator[str]:
    """The functions and classes that read the node `owner`."""
    node = OmegaConf.select(cfg, owner) if owner.partition(".")[0] in cfg else None
    if owner in OPTIONS:
        yield OPTIONS[owner]
    if owner.startswith("dataset.") and owner[len("dataset.") :] in PARTS:
        yield PARTS[owner[len("dataset.") :]][0]
    if isinstance(node, DictConfig):
        yield from [TEACHER] if owner == "teacher" else []
        yield from (node[at] for at in ("_target_", "reader") if isinstance(node.get(at), str))


def _values(annotation: Any) -> Any:
    """What the values of a mapping are."""
    if get_origin(annotation) in (Union, UnionType):
        return next((found for part in get_args(annotation) if (found := _values(part)) is not Any), Any)
    if get_origin(annotation) in (dict, Mapping) and get_args(annotation):
        return get_args(annotation)[1]
    return Any
