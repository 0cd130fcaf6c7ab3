"""Your own texts with labels: rows of files, or a folder of text files a class; and published benchmarks."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from kdbench.arguments import call
from kdbench.arguments.ranges import Amount, Text
from kdbench.data.bundle import Source
from kdbench.data.classes import numbered, refuse_measurements
from kdbench.data.readers.folders import PARTS
from kdbench.data.rows import ENDINGS, Rows, read_rows, read_text
from kdbench.data.sampling import count_of, order_keys, stratified
from kdbench.data.texts import Length, Texts, Tokens, VocabSize, source_of
from kdbench.data.tokenise import SEPARATOR
from kdbench.errors import UserError, require

log = logging.getLogger("kdbench")
HUB = "hf://datasets/"
# What columns are called where no key says so.
_TEXT = "text|sentence|review|content|document|comment|tweet|message|body"
_LABEL = "label|labels|class|category|target|sentiment|topic"
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class Files:
    """`dataset.files`: which files are which part, with * for any letters; null: by their names."""

    train: str | None = None
    test: str | None = None
    val: str | None = None


class Part:
    """Texts and labels as the files hold them."""

    def __init__(self, texts: Sequence[str], labels: np.ndarray) -> None:
        self.texts, self.labels = list(texts), labels

    def select(self, rows: np.ndarray) -> Part:
        return Part([self.texts[row] for row in rows], self.labels[rows])


def text(
    root: str | None,
    cache: str,
    download: bool = True,
    text: str | list[str] | None = None,
    label: str | None = None,
    files: Mapping[str, object] | None = None,
    test: Amount = 0.2,
    val: Amount = 0.0,
    tokenizer: Text = "bytes",
    vocab_size: VocabSize = 8192,
    length: Length | None = None,
    teacher_tokenizer: Text | None = None,
    trim: bool = True,
) -> Source:
    """A file (.csv, .tsv, .jsonl, .parquet), a folder of such files, a folder of class folders with one .txt a text, or
    hf://datasets/<owner>/<name>/<folder in it>.

    text: the column, or two that are a pair; label: the column of the classes, whole numbers or names. A part that is
    not there is set aside from the training set, always the same, stratified: a share or number of the texts, `test`
    and `val`. Where no test file has labels, as in GLUE, the validation set is the test set, and that is said.
    Raises UserError naming the key, or the file and what in it cannot be.
    """
    place = _place(root, cache, download)
    named = call(Files, files or {}, "dataset.files")
    parts = _class_folders(place) if _holds_classes(place, named) else _tables(place, named, text, label)
    for name, amount in (("test", test), ("val", val)):
        if name not in parts and (amount or name == "test"):
            parts["train"], parts[name] = _set_aside(parts["train"], amount, name)
    names, labels = numbered({name: part.labels for name, part in parts.items()}, "dataset.label")
    made = {name: Texts(part.texts, labels[name]) for name, part in parts.items()}
    return source_of(place.name, names, made, Tokens(tokenizer, vocab_size, length, teacher_tokenizer, trim))


def texts_in(path: Path, text: str | list[str] | None) -> list[str]:
    """The texts of a file's rows for a network that was trained on the column (or the two) `text`; labels need not be
    there. Of a .txt file every line that is not empty is one; of a pair a tab stands between the two.

    Raises UserError naming the file.
    """
    wanted = _columns(text)
    if path.suffix.lower() == ".txt":
        return lines_in(read_text(path), len(wanted) == 2)
    rows = read_rows(path, [word.strip() for word in "|".join([*(wanted or [_TEXT]), _LABEL]).split("|")])
    label = rows.find(_LABEL) or ""
    columns = [rows.known(name, "dataset.text") for name in wanted] or [_text_column(rows, label)]
    _tell_first(rows, columns, None)
    return _joined(rows, columns)


def lines_in(text: str, pairs: bool = False) -> list[str]:
    """The texts of lines; of `pairs` the tab between the two is what stands between them in training."""
    ends = text.replace("\r\n", "\n").split("\n")  # and no other: a text may hold a form feed, or what Unicode has
    lines = [line for line in ends if line.strip()]
    return [line.replace("\t", SEPARATOR, 1) for line in lines] if pairs else lines


def _place(root: str | None, cache: str, download: bool) -> Path:
    if root and root.startswith(HUB):
        return _from_hub(root, cache, download)
    place = Path(root or "")
    allowed = f"a file ({', '.join(ENDINGS)}), a folder of such files or of class folders, or {HUB}<owner>/<name>"
    require(bool(root) and place.exists(), "dataset.root", root, allowed)
    return place


def _from_hub(root: str, cache: str, download: bool) -> Path:
    """A dataset of huggingface.co, kept below `cache`."""
    owner, _, rest = root.removeprefix(HUB).partition("/")
    name, _, below = rest.partition("/")
    require(bool(owner and name), "dataset.root", root, f"{HUB}<owner>/<name>, or {HUB}<owner>/<name>/<folder in it>")
    from huggingface_hub import snapshot_download

    patterns = [f"{below or '**'}/*{ending}" for ending in ENDINGS] + ([] if below else [f"*{e}" for e in ENDINGS])
    try:
        folder = snapshot_download(
            f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns, cache_dir=Path(cache) / "hub",
            local_files_only=not download,
        )  # fmt: skip
    except Exception as error:  # networks and names fail in as many ways as there are libraries below
        reason = " ".join(str(error).split())[:200]
        raise UserError("dataset.root", root, "a dataset of huggingface.co that can be had", hint=reason) from error
    return Path(folder) / below


def _tables(place: Path, files: Files, text: str | list[str] | None, label: str | None) -> dict[str, Part]:
    found = _files(place, files)
    texts = _columns(text)
    parts = {}
    for name, paths in found.items():
        read = [_part(path, texts, label, name) for path in paths]
        if None not in read:
            known = [part for part in read if part is not None]
            parts[name] = Part([t for part in known for t in part.texts], np.concatenate([p.labels for p in known]))
    if "test" not in parts and "val" in parts:
        why = f"{found['test'][0].name} has no labels" if "test" in found else "there is no test file"
        log.warning("%s: %s: %s is the test set", place, why, found["val"][0].name)
        parts["test"] = parts.pop("val")
    return parts


def _columns(text: str | list[str] | None) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text or [])
    require(len(texts) <= 2 and all(texts), "dataset.text", text, "a column, or a list of one or two")
    return texts


def _files(place: Path, files: Files) -> dict[str, list[Path]]:
    """Files of each part; several of one part are pieces of one (train-00000-of-00002)."""
    if place.is_file():
        allowed = f"a file that ends in {', '.join(ENDINGS)}"
        require(place.suffix.lower() in ENDINGS, "dataset.root", str(place), allowed)
        return {"train": [place]}
    there = [path for folder in (place, place / "data") for path in _listed(folder)]
    found: dict[str, list[Path]] = {}
    for part in (field.name for field in fields(files)):
        wanted = getattr(files, part)
        mine = [p for p in there if (fnmatch.fnmatch(p.name, wanted) if wanted else _part_of(p) == part)]
        require(bool(mine) or not wanted, f"dataset.files.{part}", wanted, f"a file of {place}")
        stems = sorted({_SHARD.sub("", path.stem) for path in mine})
        if len(stems) > 1:
            both = f"{stems[0]} and {stems[1]}"
            raise UserError(f"dataset.files.{part}: {both} in {place} would both be the {part} set: name one of them")
        found |= {part: mine} if mine else {}
    if "train" not in found:
        names = ", ".join(path.name for path in there[:5]) or "none"
        raise UserError("dataset.root", str(place), "a folder with a train file, or class folders", f"Files: {names}")
    return found


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())


def _part_of(path: Path) -> str | None:
    words = re.split(r"[ ._-]+", path.stem.casefold())
    return next((part for word in words for part, known in PARTS.items() if word in known), None)


def _part(path: Path, texts: Sequence[str], label: str | None, name: str) -> Part | None:
    """Texts and labels of one file; None of a test file that has no labels."""
    usual = "|".join([*(texts or [_TEXT]), label or _LABEL]).split("|")
    rows = read_rows(path, [word.strip() for word in usual])
    own = rows.find(label or _LABEL)
    if own is None and name == "test":
        return None
    own = own or rows.known(label or _LABEL, "dataset.label")
    labels = rows.labels(own)
    if name == "test" and all(value in (-1, "-1", None) for value in labels.tolist()):
        return None
    columns = [rows.known(wanted, "dataset.text") for wanted in texts] or [_text_column(rows, own)]
    _tell_first(rows, columns, own)
    apart = len({*columns, own}) > len(columns)
    require(apart, "dataset.text", ", ".join(columns), f"columns that differ, and none of them the labels' ({own})")
    return Part(_joined(rows, columns), labels)


def _tell_first(rows: Rows, columns: Sequence[str], label: str | None) -> None:
    """Say how the first line of a file without a header is read; raise UserError where it is one by its looks."""
    if not rows.first:
        return
    usual = dict.fromkeys(columns, _TEXT) | ({label: _LABEL} if label else {})
    header = all(rows.first[int(column)].casefold() in names.split("|") for column, names in usual.items())
    said = f"the name of a column: the first line of {rows.path} has them ({', '.join(rows.first)})"
    require(not header, "dataset.text", ", ".join(columns), said)
    shown = ", ".join(f"{name} {rows.first[int(name)][:40]!r}" for name in usual)
    log.info("%s: its first line is a row like the others, and columns have numbers: %s", rows.path, shown)


def _joined(rows: Rows, columns: Sequence[str]) -> list[str]:
    return [SEPARATOR.join(pieces) for pieces in zip(*map(rows.texts, columns), strict=True)]


def _text_column(rows: Rows, label: str) -> str:
    others = [name for name in rows.names if name != label]
    return rows.find(_TEXT) or (others[0] if len(others) == 1 else rows.known(_TEXT, "dataset.text"))


def _holds_classes(place: Path, files: Files) -> bool:
    """Whether it holds folders and no file to train on."""
    if place.is_file() or files.train or not _folders(place):
        return False
    return not any(_part_of(path) == "train" for folder in (place, place / "data") for path in _listed(folder))


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folders(place: Path) -> dict[str, Part]:
    """place/<class>/*.txt, or place/<part>/<class>/*.txt."""
    below = _folders(place)
    parts = {part: folder for folder in below if (part := _part_of(folder)) is not None and _folders(folder)}
    found = {}
    for part, folder in (parts if "train" in parts else {"train": place}).items():
        texts: list[str] = []
        labels: list[str] = []
        for one in _folders(folder):
            files = sorted(one.glob("*.txt"))
            texts += [path.read_text(encoding="utf-8-sig", errors="replace") for path in files]
            labels += [one.name] * len(files)
        if not texts:
            inner = [one for one in _folders(folder) if any(_part_of(path) == "train" for path in _listed(one))]
            hint = f"{inner[0]} has a train file" if inner else ""
            raise UserError("dataset.root", str(folder), "a folder with class folders of .txt files", hint=hint)
        found[part] = Part(texts, np.array(labels, object))
    return found


def _set_aside(part: Part, amount: float, name: str) -> tuple[Part, Part]:
    """The rest, and a share or number of the texts, stratified by class."""
    count = count_of(amount, len(part.labels), f"dataset.{name}", whole=False)
    require(count > 0, f"dataset.{name}", amount, f"above 0 where the data has no {name} set")
    classes = torch.from_numpy(np.unique(part.labels.astype(str), return_inverse=True)[1])
    refuse_measurements(classes, "dataset.label")
    rows = stratified(classes, count, order_keys(len(classes), 0, f"text {name}"), leave=1)
    require(len(rows) == count, f"dataset.{name}", amount, f"at most {len(rows)}: each class keeps a text")
    held = np.isin(np.arange(len(classes)), rows.numpy())
    log.info(
        "no %s set in the data: %s of %s texts set aside for it, stratified by class, always the same (dataset.%s)",
        name, f"{int(held.sum()):,}", f"{len(held):,}", name,
    )  # fmt: skip
    return part.select(np.flatnonzero(~held)), part.select(np.flatnonzero(held))
