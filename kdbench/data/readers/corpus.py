"""Running text of one's own: Penn Treebank, WikiText, any files of train, valid and test text, or one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from kdbench.arguments.ranges import Text, within
from kdbench.data.bundle import Source
from kdbench.data.corpus import Context, Predicted, Reading, corpus_of
from kdbench.data.rows import read_text
from kdbench.data.texts import VocabSize
from kdbench.errors import UserError

Cut = Annotated[float, within(0, 0.5)]
ENDINGS = (".txt", ".tokens", ".text", ".raw")
ROWS = (".csv", ".tsv", ".jsonl", ".parquet")  # endings of files that hold rows, not running text
_PARTS = {"train": "train", "val": "valid|validation|val|dev", "test": "test"}


def corpus(
    root: Text | None,
    tokenizer: Text = "spaces",
    vocab_size: VocabSize = 33_300,
    context: Context = 35,
    predicted: Predicted = 35,
    val: Cut = 0.05,
    test: Cut = 0.05,
) -> Source:
    """The text of `root`: a folder with a file of training text and perhaps others of validation and test text, told
    by "train", "valid" and "test" in their names (ptb.train.txt, wiki.valid.tokens), or one file.

    What there is no file of is cut off the end of the training text: the share `test` last, `val` before it (whole
    lines). Raises UserError naming what is missing, two files of one part, and what is no UTF-8.
    """
    if root is None:
        raise UserError("dataset.root", None, f"a text file, or a folder with text files ({', '.join(ENDINGS)})")
    if Path(root).suffix.lower() in ROWS:
        raise UserError("dataset.root", root, "a file of running text; dataset=text reads rows of texts with labels")
    files = find_parts(Path(root).expanduser())
    texts = {part: read_text(path) for part, path in files.items()}
    for part, share in (("test", test), ("val", val)):
        if part not in texts and share > 0:
            texts["train"], texts[part] = cut_off(texts["train"], share)
    if "test" not in texts:
        raise UserError("dataset.test", test, f"above 0: there is no file of test text beside {files['train']}")
    empty = next((part for part, text in texts.items() if not text.strip()), None)
    if empty is not None:
        raise UserError("dataset.root", root, f"a text with more lines: nothing is left for {empty}")
    return corpus_of(texts, Reading(tokenizer, vocab_size, context, predicted))


def find_parts(root: Path) -> dict[str, Path]:
    """The file of each part, by its name. Raises UserError."""
    if root.is_file():
        return {"train": root}
    if not root.is_dir():
        raise UserError("dataset.root", str(root), "a text file or a folder with text files; there is none here")
    files = sorted(path for path in root.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    found: dict[str, Path] = {}
    for part, words in _PARTS.items():
        named = [path for path in files if re.search(rf"(?<![a-z])({words})(?![a-z])", path.name.lower())]
        if len(named) > 1:
            listed = ", ".join(path.name for path in named)
            raise UserError("dataset.root", str(root), f"a folder with one file of {part} text; it has {listed}")
        if named:
            found[part] = named[0]
    if "train" not in found:
        if len(files) == 1:
            return {"train": files[0]}
        listed = ", ".join(path.name for path in files[:6]) or "no such file"
        allowed = f"a folder with a file whose name says train and ends in {', '.join(ENDINGS)}; it has {listed}"
        raise UserError("dataset.root", str(root), allowed)
    return found


def cut_off(text: str, share: float) -> tuple[str, str]:
    """A text without its last `share`, and that, at the end of a line."""
    place = text.find("\n", int(len(text) * (1 - share))) + 1
    return (text[:place], text[place:]) if place else (text, "")
