"""Corpora: running text as the dataset of a language model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from kdbench import world
from kdbench.arguments.ranges import Text, within
from kdbench.data.augment.views import Identity
from kdbench.data.blocks import Blocks, Offset
from kdbench.data.bundle import Bundle, Source, Split, outside
from kdbench.data.sampling import count_of
from kdbench.data.texts import VocabSize
from kdbench.data.tokenise import Tokeniser, make_tokeniser
from kdbench.errors import UserError
from kdbench.results.metrics import LANGUAGE_MODELLING

Context = Annotated[int, within(1, 2**16)]
Predicted = Annotated[int, within(1, 2**16)]


class Reading(NamedTuple):
    """What the keys of a dataset of running text say of its tokens."""

    tokenizer: Text
    vocab_size: VocabSize
    context: Context
    predicted: Predicted


def corpus_of(texts: Mapping[str, str], reading: Reading) -> Source:
    """The dataset of the texts "train", "test" and perhaps "val". A vocabulary is learnt from the training text alone.

    Its inputs are windows of tokens (`data.blocks`), its classes the vocabulary. Raises UserError for a tokenizer that
    there is not, and for a training text of less than three blocks.
    """
    train = texts["train"]
    kind, most = reading.tokenizer, reading.vocab_size
    tokeniser = make_tokeniser(kind, lambda: train.splitlines(keepends=True), most, "dataset.tokenizer")
    blocks = Blocks(reading.context, reading.predicted)
    tokens = _tokens(tokeniser, train)
    windows, test = blocks.of_training(tokens), blocks.of_evaluation(_tokens(tokeniser, texts["test"]))
    held = blocks.of_evaluation(_tokens(tokeniser, texts["val"])) if "val" in texts else None
    return Source(
        tokeniser.pieces, windows, blocks.labels(windows), test, blocks.labels(test),
        val=None if held is None else (held, blocks.labels(held)),
        fingerprint=hashlib.sha256(f"{blocks}{tokeniser.name}".encode() + tokens.numpy().tobytes()).hexdigest(),
        vocab_size=tokeniser.vocab_size, tokeniser=tokeniser, task=LANGUAGE_MODELLING, blocks=blocks,
    )  # fmt: skip


def _tokens(tokeniser: Tokeniser, text: str) -> Tensor:
    return torch.from_numpy(tokeniser.ids(text))


def corpus_bundle(name: str, source: Source, subset: float | None, others: Mapping[str, object]) -> Bundle:
    """A corpus ready for training: `subset` is a share (or number) of its blocks, from the beginning of the text.

    `others` are the keys that only data of separate samples know. Raises UserError for one that is set.
    """
    assert source.blocks is not None
    world.refuse_several("dataset", name, "a process has rows of a batch, and these are blocks of many")
    _refuse_of_samples(others)
    inputs, labels, blocks = source.inputs, source.labels, source.blocks
    count = len(labels) if subset is None else count_of(subset, len(labels), "dataset.subset", whole=True)
    assert isinstance(inputs, Tensor) and isinstance(source.fingerprint, str)
    train = Split(inputs[:count], labels[:count], torch.arange(count))
    val = None if source.val is None else outside(*source.val)
    return Bundle(
        name, source.classes, (), (), train, train, val, outside(source.test_inputs, source.test_labels),
        source.fingerprint, (len(labels) + 1) * blocks.predicted, Offset(blocks), Offset(blocks),
        vocab_size=source.vocab_size, tokeniser=source.tokeniser, task=source.task, blocks=blocks,
    )  # fmt: skip


def _refuse_of_samples(others: Mapping[str, object]) -> None:
    for key, value in others.items():
        if value not in (None, "none", 0, Identity()):
            allowed = "left as it is for running text, which is no set of separate samples"
            allowed = "0: dataset.val sets the end of a text aside" if key == "validation" else allowed
            shown = type(value).__name__ if key in ("augment", "teacher_augment") else value
            raise UserError(f"dataset.{key}", shown, allowed)
