"""Eight plays of Shakespeare, embedded: running text without a download."""

from __future__ import annotations

import lzma
from importlib import resources

from kdbench.arguments.ranges import Text
from kdbench.data.bundle import Source
from kdbench.data.corpus import Context, Predicted, Reading, corpus_of
from kdbench.data.readers.corpus import cut_off
from kdbench.data.texts import VocabSize

SHARE = 0.1  # of every play


def shakespeare(
    tokenizer: Text = "characters",
    vocab_size: VocabSize = 8192,
    context: Context = 64,
    predicted: Predicted = 64,
) -> Source:
    """The last tenth of every play is tested on, the tenth before it validates, the rest is learnt from: a million
    characters in all.

    The first lines of kdbench/data/embedded/shakespeare.txt.xz name origin and licence.
    """
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for play in plays():
        rest, test = cut_off(play, SHARE)
        train, val = cut_off(rest, SHARE / (1 - SHARE))
        for part, text in (("train", train), ("val", val), ("test", test)):
            parts[part].append(text)
    texts = {part: "".join(found) for part, found in parts.items()}
    return corpus_of(texts, Reading(tokenizer, vocab_size, context, predicted))


def plays() -> list[str]:
    """The text of each play; a line with "== " and its title stands before each in the file."""
    packed = resources.files("kdbench.data").joinpath("embedded/shakespeare.txt.xz").read_bytes()
    _, *found = lzma.decompress(packed).decode("utf-8").split("\n== ")
    return [play.split("\n", 1)[1] + "\n" for play in found]
