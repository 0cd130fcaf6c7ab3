"""Texts of one's own for language models: how well they are predicted, and how they go on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data.blocks import Blocks, next_tokens
from kdbench.data.readers.corpus import ROWS
from kdbench.data.readers.text import texts_in
from kdbench.data.rows import read_text
from kdbench.data.tokenise import UNKNOWN, Spaced, Subwords, Words
from kdbench.deploy.student import Student
from kdbench.engine.evaluate import PIECE, evaluating, in_float32
from kdbench.errors import UserError
from kdbench.models.generate import generate
from kdbench.types import CorpusInfo

COLUMNS = ("input", "tokens", "unknown", "nll", "ppl", "problem")


class Perplexity(NamedTuple):
    """How well a language model predicts one text, every token of it once."""

    name: str  # the file, or the text
    tokens: int = 0
    unknown: int = 0  # of these, those that its vocabulary lacks
    nll: float = math.nan  # nats a token
    problem: str = ""  # why it could not be read

    @property
    def ppl(self) -> float:
        return math.exp(min(self.nll, 700.0))

    def values(self) -> list[object]:
        """In the order of COLUMNS."""
        if self.problem:
            return [self.name, "", "", "", "", self.problem]
        return [self.name, self.tokens, self.unknown, round(self.nll, 6), round(self.ppl, 6), ""]


def perplexities(student: Student, texts: Mapping[str, str] | Path) -> Iterator[Perplexity]:
    """Of texts by name, of one text file, of every .txt file in or below a folder, or of every row of a table; in
    order. A file that cannot be read is a Perplexity with its problem. Raises UserError for a place that is none."""
    if isinstance(texts, Path) and texts.suffix.lower() in ROWS:
        texts = {f"row {row}": text for row, text in enumerate(texts_in(texts, None))}
    if not isinstance(texts, Path):
        yield from (perplexity(student, name, text) for name, text in texts.items())
        return
    for path in text_files(texts):
        try:
            yield perplexity(student, str(path), read_text(path))
        except UserError as error:
            yield Perplexity(str(path), problem=str(error))


def text_files(place: Path) -> list[Path]:
    """The .txt files in or below a folder, in order, or the one file. Raises UserError where there is none."""
    if not place.exists():
        raise UserError(f"{place}: there is no such folder or file")
    found = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    if not found:
        raise UserError(f"{place}: no .txt files in it")
    return found


def perplexity(student: Student, name: str, text: str) -> Perplexity:
    """Of one text, cut into blocks as in evaluation: each prediction sees `context` tokens before it, or all that there
    are. Raises UserError for a text without any token."""
    info, ids = _of_text(student, text)
    blocks = Blocks(info.context, info.predicted)
    windows, total = blocks.of_evaluation(ids), 0.0
    together = max(1, PIECE // (info.predicted * info.num_classes))
    with evaluating(student.network), in_float32():
        for part in windows.split(together):
            inputs, label = next_tokens(part, info.predicted)
            logits = student.network(inputs).logits.float()
            total += float(F.cross_entropy(logits, label, ignore_index=-1, reduction="sum"))
    unknown = 0 if isinstance(student.speaks(), Subwords) else int((ids == UNKNOWN).sum())
    return Perplexity(name, len(ids), unknown, total / len(ids))


def continued(student: Student, text: str, count: int) -> str:
    """The `count` tokens that a language model takes for the most probable after a text, each after the one before; as
    they are written behind it. Raises UserError for a text without any token."""
    info, ids = _of_text(student, text)
    words = isinstance(student.speaks(), Words | Spaced)
    if isinstance(student.speaks(), Spaced) and not text.endswith("\n"):
        ids = ids[:-1]  # the line goes on
    before = F.pad(ids, (max(0, info.context + 1 - len(ids)), 0))[None]
    with evaluating(student.network), in_float32():
        found = generate(student.network, before, count, most=info.context + info.predicted)
    return (" " if words and not text[-1:].isspace() else "") + student.speaks().text(found[0].tolist())


def _of_text(student: Student, text: str) -> tuple[CorpusInfo, Tensor]:
    assert isinstance(student.info, CorpusInfo)
    ids = torch.from_numpy(student.speaks().ids(text))
    if not len(ids):
        raise UserError("input", text, "a text with at least one token")
    return student.info, ids
