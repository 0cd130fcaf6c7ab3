"""Tokenisers: text becomes ids of a vocabulary, and ids become text. 0 is padding everywhere; in kdbench's own
vocabularies 1 stands for what is unknown or masked."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kdbench.errors import UserError, nearest
from kdbench.files import read_object

PADDING, UNKNOWN = 0, 1
SEPARATOR = "\u241f"  # between the two texts of a pair, which tokenisers of pretrained networks take apart
KINDS = "bytes, characters, words, spaces, bpe, a tokenizer.json (or its folder), or a network of huggingface.co"
TOKENIZER = "tokenizer.json"  # beside a run's weights: `Tokeniser.kept` as JSON
LINE_END = "<eos>"
_SPECIAL = ("<pad>", "<unk>")  # how ids 0 and 1 are written
_WORD = re.compile(r"\w+|[^\w\s]")


class Tokeniser(Protocol):
    """What turns texts into ids. Equal names mean that equal ids stand for equal pieces of text."""

    name: str
    vocab_size: int  # ids are in [0, vocab_size)
    shift: int = 0  # what is added to the ids of the library's own file

    @property
    @abstractmethod
    def pieces(self) -> tuple[str, ...]:
        """[vocab_size] how each id is written."""

    @abstractmethod
    def ids(self, text: str) -> np.ndarray:
        """One text, whole: int64 [L] without padding, and without what marks its beginning and end."""

    @abstractmethod
    def text(self, ids: Sequence[int]) -> str:
        """What ids are written as, without padding; of a vocabulary of words what `ids` did not keep is lost."""

    @abstractmethod
    def kept(self) -> dict[str, object]:
        """All that makes it again (`kept_tokeniser`), as JSON: of the library's own the library's file."""

    def rows(self, texts: Sequence[str], most: int) -> list[np.ndarray]:
        """Each text as a network for classification reads it, cut to at most `most` ids."""
        return [self.ids(text)[:most] for text in texts]


class Bytes(Tokeniser):
    """UTF-8, byte b as b + 2: knows every text of every language."""

    name = "bytes"
    vocab_size = 258

    @property
    def pieces(self) -> tuple[str, ...]:
        return (*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)))

    def ids(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64) + 2

    def text(self, ids: Sequence[int]) -> str:
        return bytes(number - 2 for number in ids if number > UNKNOWN).decode("utf-8", "replace")

    def kept(self) -> dict[str, object]:
        return _own("bytes", "the bytes of UTF-8, each its value + 2", ())


class Characters(Tokeniser):
    """Single characters; those that are not in the vocabulary are UNKNOWN."""

    def __init__(self, vocabulary: Iterable[str]) -> None:
        self.known = np.array(sorted({ord(letter) for letter in vocabulary}), np.uint32)
        self.vocab_size = len(self.known) + 2
        self.name = f"characters {_digest(''.join(map(chr, self.known)))}"

    @classmethod
    def trained(cls, texts: Iterable[str], vocab_size: int) -> Characters:
        """The most frequent characters of the texts; of equally frequent ones the first in Unicode."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        return cls(sorted(counts, key=lambda letter: (-counts[letter], letter))[: vocab_size - 2])

    @property
    def pieces(self) -> tuple[str, ...]:
        return (*_SPECIAL, *map(chr, self.known))

    def ids(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        place = np.searchsorted(self.known, codes).clip(max=len(self.known) - 1)
        return np.where(self.known[place] == codes, place + 2, UNKNOWN).astype(np.int64)

    def text(self, ids: Sequence[int]) -> str:
        return "".join(_written(self.pieces, ids))

    def kept(self) -> dict[str, object]:
        return _own("characters", "single characters", self.pieces[2:])


class Words(Tokeniser):
    """Words and single signs in lower case; those that are not in the vocabulary are UNKNOWN."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.number = {word: number for number, word in enumerate(vocabulary, start=2)}
        self.vocab_size = len(vocabulary) + 2
        self.name = f"words {_digest(chr(0).join(vocabulary))}"

    @property
    def pieces(self) -> tuple[str, ...]:
        return (*_SPECIAL, *self.number)

    @classmethod
    def trained(cls, texts: Iterable[str], vocab_size: int) -> Words:
        """The most frequent words of the texts; of equally frequent ones the first by alphabet."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_words(text))
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([word for word, _ in ordered[: vocab_size - 2]])

    def ids(self, text: str) -> np.ndarray:
        return np.array([self.number.get(word, UNKNOWN) for word in _words(text)], np.int64)

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(_written(self.pieces, ids))

    def kept(self) -> dict[str, object]:
        return _own("words", f"in lower case, what matches {_WORD.pattern}", self.pieces[2:])


class Spaced(Tokeniser):
    """What stands between spaces, as it is, and LINE_END for every end of a line: Penn Treebank and WikiText, whose
    words are set apart already. The word "<unk>" of such texts is UNKNOWN, as are words outside the vocabulary."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.number = {word: number for number, word in enumerate(vocabulary, start=2)} | {_SPECIAL[UNKNOWN]: UNKNOWN}
        self.vocab_size = len(vocabulary) + 2
        self.name = f"spaces {_digest(chr(0).join(vocabulary))}"

    @classmethod
    def trained(cls, texts: Iterable[str], vocab_size: int) -> Spaced:
        """The most frequent words of the texts; of equally frequent ones the first by alphabet."""
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_spaced(text))
        counts.pop(_SPECIAL[UNKNOWN], None)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return cls([word for word, _ in ordered[: vocab_size - 2]])

    @property
    def pieces(self) -> tuple[str, ...]:
        return (*_SPECIAL, *(word for word, number in self.number.items() if number > UNKNOWN))

    def ids(self, text: str) -> np.ndarray:
        return np.fromiter((self.number.get(word, UNKNOWN) for word in _spaced(text)), np.int64)

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(_written(self.pieces, ids)).replace(f" {LINE_END} ", "\n").replace(f" {LINE_END}", "\n")

    def kept(self) -> dict[str, object]:
        return _own("spaces", f"what stands between spaces, and {LINE_END} for the end of a line", self.pieces[2:])


class Subwords(Tokeniser):
    """A tokeniser of the library `tokenizers`: byte pairs learnt here, or the one that a pretrained network came with.

    Its own ids count where its padding is 0 (BERT, T5). Otherwise (GPT-2, RoBERTa) they are shifted by `shift` = 1, and
    a network that was trained with them takes it off again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        padding = next((i for word in _PADDINGS if (i := tokenizer.token_to_id(word)) is not None), None)
        self.shift = 0 if padding == PADDING else 1
        self.vocab_size = tokenizer.get_vocab_size() + self.shift
        self.name = f"subwords {_digest(tokenizer.to_str())}"

    @classmethod
    def trained(cls, texts: Iterable[str], vocab_size: int) -> Subwords:
        """Byte-level byte pair encoding (Sennrich et al. 2016; bytes as in GPT-2), learnt from the texts."""
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @property
    def pieces(self) -> tuple[str, ...]:
        own = [self.tokenizer.id_to_token(number) or f"<{number}>" for number in range(self.vocab_size - self.shift)]
        return (_SPECIAL[PADDING], *own) if self.shift else tuple(own)

    def ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(_whole(text), add_special_tokens=False).ids, np.int64) + self.shift

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([number - self.shift for number in ids if number != PADDING]))

    def kept(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.tokenizer.to_str())
        return found

    def rows(self, texts: Sequence[str], most: int) -> list[np.ndarray]:
        self.tokenizer.enable_truncation(most)
        pairs = [tuple(text.split(SEPARATOR, 1)) if SEPARATOR in text else text for text in map(_whole, texts)]
        found = [np.array(row.ids, np.int64) + self.shift for row in self.tokenizer.encode_batch(pairs)]
        self.tokenizer.no_truncation()
        return found


_OWN: Mapping[str, Callable[[Sequence[str]], Tokeniser]] = {
    "bytes": lambda vocabulary: Bytes(), "characters": Characters, "words": Words, "spaces": Spaced,
}  # fmt: skip
_PADDINGS = ("[PAD]", "<pad>", "<|pad|>", "<PAD>")


class Encoded(NamedTuple):
    ids: Tensor  # int64 [N, L], 0 behind the end of a text
    cut: int  # texts that were longer


def encode(tokeniser: Tokeniser, texts: Sequence[str], length: int) -> Encoded:
    """Texts as one tensor that is as wide as the longest of them, but at most `length`.

    A text without any token becomes one UNKNOWN: networks have something to read in every row.
    """
    rows = tokeniser.rows(texts, length + 1)
    cut = sum(len(row) > length for row in rows)
    rows = tokeniser.rows(texts, length) if cut else rows  # anew: what marks a text's end stands there after a cut, too
    sizes = np.array([len(row) for row in rows])
    ids = np.full((len(rows), max(1, int(sizes.max(initial=0)))), PADDING, np.int64)
    ids[np.arange(ids.shape[1]) < sizes[:, None]] = np.concatenate(rows) if len(rows) else 0
    ids[sizes == 0, 0] = UNKNOWN
    return Encoded(torch.from_numpy(ids), cut)


def make_tokeniser(kind: str, texts: Callable[[], Iterable[str]], vocab_size: int, key: str) -> Tokeniser:
    """The tokeniser that `key` = `kind` names. `texts` gives those that a vocabulary of at most `vocab_size` is learnt
    from: the training texts alone. Raises UserError naming the key for what is no tokeniser, or cannot be had."""
    if kind == "bytes":
        return Bytes()
    if kind == "characters":
        return Characters.trained(texts(), vocab_size)
    if kind == "words":
        return Words.trained(texts(), vocab_size)
    if kind == "spaces":
        return Spaced.trained(texts(), vocab_size)
    if kind == "bpe":
        return Subwords.trained(texts(), vocab_size)
    return _read(kind, key)


def kept_tokeniser(kept: Mapping[str, object], source: str, key: str = "tokenizer") -> Tokeniser:
    """The tokeniser that `kept` was returned by. Raises UserError naming its `source` for what is none."""
    kind, vocabulary = str(kept.get("kind")), kept.get("vocabulary")
    if kind in _OWN:
        most = 1 if kind == "characters" else 2**16
        known: list[Any] = vocabulary if isinstance(vocabulary, list) else [None]
        if not all(isinstance(piece, str) and 0 < len(piece) <= most for piece in known):
            raise UserError(f"{source}: damaged: its vocabulary must be a list of {kind}")
        return _OWN[kind](known)
    library = _library(key, source)
    try:
        return Subwords(library.Tokenizer.from_str(json.dumps(kept)))
    except Exception as error:  # the library raises plain Exceptions
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: no tokenizer that can be read ({reason})") from error


def _own(kind: str, pieces: str, vocabulary: Sequence[str]) -> dict[str, object]:
    """A vocabulary of kdbench's as a stranger can use it."""
    rule = f"{pieces}; of the vocabulary the first is 2" if vocabulary else pieces
    return {"kind": kind, "rule": rule, "padding": PADDING, "unknown": UNKNOWN, "vocabulary": list(vocabulary)}


def _written(pieces: Sequence[str], ids: Sequence[int]) -> Iterable[str]:
    return (pieces[number] for number in ids if number != PADDING)


def _read(name: str, key: str) -> Tokeniser:
    place = Path(name)
    file = place / TOKENIZER if place.is_dir() else place
    library = None if file.is_file() else _library(key, name)
    try:
        if library is None:
            return _of_file(file, name, key)
        if place.exists() or name.endswith(".json") or name.startswith((".", "/")):
            raise UserError(key, name, KINDS, hint=f"There is no {file}")
        meant = "" if "/" in name else nearest(name, (*_OWN, "bpe"))
        if meant:  # not looked for on a network, which takes half a minute where there is none
            raise UserError(key, name, KINDS, hint=meant)
        return Subwords(library.Tokenizer.from_pretrained(name))
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exceptions for damaged files, networks fail in many ways
        reason = " ".join(str(error).split())[:200]
        raise UserError(key, name, KINDS, hint=f"It cannot be had: {reason}") from error


def _of_file(file: Path, name: str, key: str) -> Tokeniser:
    kept = read_object(file)
    if kept.get("kind") not in _OWN:
        _library(key, name)
    try:
        return kept_tokeniser(kept, str(file), key)
    except UserError as error:
        raise UserError(key, name, KINDS, hint=str(error)) from error


def _library(key: str = "dataset.tokenizer", value: str = "bpe") -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        needs = "bytes or words: others take the package tokenizers (pip install 'kdbench[text]')"
        raise UserError(key, value, needs) from error
    return tokenizers


def _spaced(text: str) -> Iterable[str]:
    lines = text.split("\n")
    for line in lines[:-1] if not lines[-1].strip() else lines:
        yield from line.split()
        yield LINE_END


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _whole(text: str) -> str:
    """Without halves of characters, which files in other encodings may leave and the library does not take."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
