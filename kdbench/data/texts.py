"""Texts with labels, and how they become the token ids of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kdbench.arguments.ranges import Text, within
from kdbench.data.bundle import Reading, Source
from kdbench.data.tokenise import Encoded, Tokeniser, encode, make_tokeniser

log = logging.getLogger("kdbench")
MOST = 512  # ids of a text where dataset.length does not say

VocabSize = Annotated[int, within(3, 2**20)]
Length = Annotated[int, within(1, 2**16)]


class Texts(NamedTuple):
    """One part of a dataset."""

    texts: Sequence[str]
    labels: Tensor  # int64 [N]


class Tokens(NamedTuple):
    """What the keys of a dataset of texts say of their ids."""

    tokenizer: Text = "bytes"
    vocab_size: VocabSize = 8192
    length: Length | None = None
    teacher_tokenizer: Text | None = None
    trim: bool = True


def source_of(name: str, classes: tuple[str, ...], parts: Mapping[str, Texts], tokens: Tokens) -> Source:
    """The dataset of "train", "test" and perhaps "val". A vocabulary is learnt from the training texts alone.

    Raises UserError for a tokenizer that there is not.
    """
    read = _read(name, "tokenizer", tokens.tokenizer, parts, tokens)
    own = tokens.teacher_tokenizer
    taught = None if own is None else _read(name, "teacher_tokenizer", own, parts, tokens)
    val = None if read.val_inputs is None else (read.val_inputs, parts["val"].labels)
    return Source(
        classes, read.inputs, parts["train"].labels, read.test_inputs, parts["test"].labels, val=val,
        vocab_size=read.tokeniser.vocab_size, tokeniser=read.tokeniser,
        reading=taught if taught is None or taught.tokeniser.name != read.tokeniser.name else None, trim=tokens.trim,
    )  # fmt: skip


def _read(name: str, key: str, kind: str, parts: Mapping[str, Texts], tokens: Tokens) -> Reading:
    tokeniser = make_tokeniser(kind, lambda: parts["train"].texts, tokens.vocab_size, f"dataset.{key}")
    ids = _encoded(name, tokeniser, parts, tokens.length)
    return Reading(ids["train"], ids["test"], ids.get("val"), tokeniser)


def _encoded(name: str, tokeniser: Tokeniser, parts: Mapping[str, Texts], length: int | None) -> dict[str, Tensor]:
    """Ids of each part, all as wide as the longest text; what is longer than `length` is cut, and it is said."""
    found = {part: encode(tokeniser, held.texts, length or MOST) for part, held in parts.items()}
    width = max(encoded.ids.shape[1] for encoded in found.values())
    _tell_of_cut(name, found, width)
    return {part: F.pad(encoded.ids, (0, width - encoded.ids.shape[1])) for part, encoded in found.items()}


def _tell_of_cut(name: str, found: Mapping[str, Encoded], width: int) -> None:
    cut = {part: encoded.cut for part, encoded in found.items() if encoded.cut}
    if cut:
        listed = ", ".join(f"{count:,} of {len(found[part].ids):,} in {part}" for part, count in sorted(cut.items()))
        log.warning("%s: texts of more than %d tokens are cut there: %s (dataset.length)", name, width, listed)
