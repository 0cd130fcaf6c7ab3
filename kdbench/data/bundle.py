"""What a dataset is once it is read: images, labels, and where each image came from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kdbench.data.augment.mix import Mix
from kdbench.data.augment.views import Augment, Identity
from kdbench.data.blocks import Blocks
from kdbench.data.content import Content, Part
from kdbench.data.pixels import RGB, WHITE
from kdbench.data.stamp import Stamp
from kdbench.data.tokenise import Tokeniser
from kdbench.errors import UserError
from kdbench.results.metrics import CLASSIFICATION, Task
from kdbench.types import CorpusInfo, ImageInfo, Info, TokenInfo, VectorInfo

_DECODING = "decode 2"  # raised when other pixels come out of the same files


@dataclass(frozen=True)
class Pack:
    """Where the pixels of decoded images lie in one file: uint8 [H, W, C] from a byte on."""

    path: str
    start: np.ndarray  # int64 [N]
    shapes: np.ndarray  # int32 [N, 2]: height, width


@dataclass(frozen=True)
class ImageFiles:
    """Image files that are decoded when a batch needs them: shorter side to `resize` pixels, then a `size` crop."""

    paths: np.ndarray  # [N] of dtype bytes: no object per path, so forked workers share the memory
    size: int  # pixels a side of what reaches the network
    resize: int  # pixels of the shorter side before the centre crop
    channels: int  # 1: gray, 3: colour
    background: RGB = WHITE  # what transparent images are laid on
    value_range: tuple[float, float] | None = None  # black and white of gray images of more than 8 bits
    pack: Pack | None = None  # the images decoded and resized already, row for row

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.paths), self.channels, self.size, self.size)

    def path(self, row: int) -> str:
        return os.fsdecode(bytes(self.paths[row]))

    def __getitem__(self, rows: Tensor) -> ImageFiles:
        at = rows.cpu().numpy()
        pack = None if self.pack is None else replace(self.pack, start=self.pack.start[at], shapes=self.pack.shapes[at])
        return replace(self, paths=self.paths[at], pack=pack)

    def of(self, paths: np.ndarray) -> ImageFiles:
        """Other files [N], read in the same way, but from no pack."""
        return replace(self, paths=paths, pack=None)


Inputs = Tensor | ImageFiles  # images uint8 [N, C, H, W] or files, vectors float [N, D], token ids int64 [N, L]


def are_images(inputs: Inputs) -> bool:
    return isinstance(inputs, ImageFiles) or inputs.dtype == torch.uint8


@dataclass(frozen=True)
class Split:
    """Inputs with labels.

    labels int64 [N], -1 where unlabelled; of a running text [N, predicted], -1 for padding; rows int64 [N], each
    sample's row in the dataset's original training set, stable under subsets and validation splits (unlabelled extras
    continue the count, samples that are not of the training set have -1); clean int64 [N], the true labels where label
    noise was applied.
    """

    inputs: Inputs
    labels: Tensor
    rows: Tensor
    clean: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def wanted(self) -> Tensor:
        """[N] the labels of all predictions that count: of a running text those of its tokens, in order."""
        return self.labels if self.labels.ndim == 1 else self.labels[self.labels >= 0]

    def select(self, places: Tensor) -> Split:
        """The samples at places [n] of this split, in that order; the same object if they are all in order."""
        if len(places) == len(self) and torch.equal(places, torch.arange(len(self))):
            return self
        clean = None if self.clean is None else self.clean[places]
        return Split(self.inputs[places], self.labels[places], self.rows[places], clean)

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on the device. Batches made of one moved split share its memory."""
        inputs = self.inputs.to(device) if isinstance(self.inputs, Tensor) else self.inputs
        clean = None if self.clean is None else self.clean.to(device)
        return replace(self, inputs=inputs, labels=self.labels.to(device), rows=self.rows.to(device), clean=clean)


class Reading(NamedTuple):
    """The same samples as a teacher with a tokenizer of its own reads them: token ids int64 [N, L]."""

    inputs: Tensor  # of the original training set
    test_inputs: Tensor
    val_inputs: Tensor | None  # where the dataset brings a validation set of its own
    tokeniser: Tokeniser


def outside(inputs: Inputs, labels: Tensor) -> Split:
    """Samples that are not of the training set: row -1, which no table of training samples holds."""
    return Split(inputs, labels, torch.full((len(labels),), -1))


class Source(NamedTuple):
    """What a reader returns: the whole dataset as it is published, in a fixed order, before any split of ours."""

    classes: tuple[str, ...]
    inputs: Inputs  # the training set
    labels: Tensor  # int64 [N]
    test_inputs: Inputs
    test_labels: Tensor
    val: tuple[Inputs, Tensor] | None = None  # only where the dataset brings a validation set of its own
    fingerprint: str | None = None  # where the reader knows it already
    stats: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and std, where the reader knows them
    files: ImageFiles | None = None  # the training images as files, where they are files: read or to be streamed
    vocab_size: int = 0  # of token ids
    tokeniser: Tokeniser | None = None  # what made the token ids of texts
    reading: Reading | None = None  # the teacher's, where it has another tokenizer
    published: tuple[int, int] | None = None  # training and test images that the set is known to have
    posterior: nn.Module | None = None  # inputs [N, ...] -> logits [N, C] of the true p*(class | input), where known
    task: Task = CLASSIFICATION  # what networks are asked to do with it
    blocks: Blocks | None = None  # of a running text, whose inputs are windows of it (kdbench.data.blocks)
    trim: bool = False  # whether a student may leave out what is padding in a whole batch
    columns: tuple[str, ...] = ()  # names of a table's inputs in order, before neighbours are joined to them


@dataclass(frozen=True)
class Bundle:
    """A dataset ready for training.

    `train` is what a teacher trains on, `transfer` what the student trains on: the same object unless
    `dataset.transfer` or a noise for only one of the two is set. `fingerprint` names the original training images (not
    the labels), so tables of teacher logits are keyed by it; `num_rows` bounds Split.rows: such a table has that many.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # of pixel / 255, one a channel; of a vector's dimensions; () for token ids
    std: tuple[float, ...]
    train: Split
    transfer: Split
    val: Split | None
    test: Split
    fingerprint: str
    num_rows: int
    augment: Augment = field(default_factory=Identity)  # of what the student trains on
    teacher_augment: Augment = field(default_factory=Identity)  # of the teacher's own training
    mix: Mix | None = None  # mixes pairs of inputs as the student trains
    workers: int = 0  # processes that decode streamed images
    vocab_size: int = 0  # of token ids
    resize: int | None = None  # pixels of an image file's shorter side before the middle is cut out
    posterior: nn.Module | None = None  # as in Source
    task: Task = CLASSIFICATION  # as in Source
    blocks: Blocks | None = None  # as in Source
    stamp: Stamp | None = None  # of the files that were read
    tokeniser: Tokeniser | None = None  # as in Source
    reading: Reading | None = None  # as in Source
    trim: bool = False  # as in Source
    columns: tuple[str, ...] = ()  # as in Source

    @property
    def vocabulary(self) -> str:
        """What token ids mean: the tokeniser's name."""
        return "" if self.tokeniser is None else self.tokeniser.name

    def read_by_teacher(self) -> Bundle:
        """The same samples with the teacher's own token ids; this bundle where it reads what the student reads."""
        own = self.reading
        if own is None:
            return self
        val = None if self.val is None else _reread(self.val, own.inputs, own.val_inputs)
        return replace(
            self, train=_reread(self.train, own.inputs), transfer=_reread(self.transfer, own.inputs), val=val,
            test=replace(self.test, inputs=own.test_inputs), fingerprint=fingerprint(own.inputs),
            vocab_size=own.tokeniser.vocab_size, tokeniser=own.tokeniser, reading=None,
        )  # fmt: skip

    def for_teacher(self) -> Bundle:
        """The same data for the teacher's own training: its augmentation, and no mixing of images."""
        return replace(self, augment=self.teacher_augment, mix=None)

    def posterior_of(self, split: Split) -> Tensor | None:
        """p* [N, C] of a split's inputs, on the CPU; None where the true probabilities are not known."""
        if self.posterior is None or not isinstance(split.inputs, Tensor):
            return None
        with torch.no_grad():
            return self.posterior(split.inputs.cpu()).softmax(1)

    @cached_property
    def content(self) -> Content:
        """What the bundle holds, to be kept beside results and compared (kdbench.data.content.differences).

        No training image is read: the fingerprint names them. Held-out images of the set's own are hashed once.
        """
        train = _part(self.train)
        return Content(
            name=self.name,
            inputs=self.fingerprint,
            rows=self.num_rows,
            class_count=len(self.classes),
            classes=digest(self.classes),
            train=train,
            transfer=train if self.transfer is self.train else _part(self.transfer),
            test=_part(self.test),
            val=None if self.val is None else _part(self.val),
        )

    @property
    def info(self) -> Info:
        inputs, classes = self.train.inputs, len(self.classes)
        if self.blocks is not None:
            return CorpusInfo(classes, self.blocks.context, self.blocks.predicted, self.classes)
        if isinstance(inputs, Tensor) and inputs.dtype == torch.int64:
            return TokenInfo(classes, self.vocab_size, inputs.shape[1])
        if len(inputs.shape) == 2:
            return VectorInfo(classes, inputs.shape[1])
        return ImageInfo(classes, inputs.shape[1], inputs.shape[-1])


def _reread(split: Split, inputs: Tensor, outside: Tensor | None = None) -> Split:
    """A split with inputs of the original training set's rows; `outside` where it is none of that set."""
    if outside is None or bool((split.rows >= 0).all()):
        return replace(split, inputs=inputs[split.rows])
    return replace(split, inputs=outside)


def _part(split: Split) -> Part:
    """Rows name samples of the original training set; others are named by their own fingerprint."""
    own = bool((split.rows >= 0).all())
    return Part(len(split), digest(split.rows) if own else fingerprint(split.inputs)[:32], digest(split.labels))


def digest(values: Tensor | Sequence[str]) -> str:
    """32 hex digits of the sha256 of numbers or names, in order."""
    if isinstance(values, Sequence):
        data = "\0".join(values).encode("utf-8", "surrogateescape")
    else:
        data = values.cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:32]


def fingerprint(images: Inputs) -> str:
    """sha256 of the inputs' content and shape; 0.1 s for CIFAR-10's 154 MB.

    Files are named by their paths below the folder that holds them all, sizes in bytes and times of change: reading
    ImageNet to hash it takes longer than an epoch. So a copy that keeps no times is another set.
    """
    if isinstance(images, ImageFiles):
        listed = images.paths.tolist()
        ends = [os.path.dirname(path) for path in (min(listed), max(listed))]
        return stamp(images, os.fsdecode(os.path.commonpath(ends)))
    hashed = hashlib.sha256(repr(tuple(images.shape)).encode())
    if not are_images(images):
        hashed.update(str(images.dtype).encode())  # the same bytes are other numbers
    hashed.update(images.cpu().contiguous().numpy().data)
    return hashed.hexdigest()


def stamp(files: ImageFiles, base: str) -> str:
    """sha256 of what is known of files without reading them, and of what decoding does with them.

    Paths count from the folder `base` (absolute). Asks the system once a file: 3 s for ImageNet. Raises UserError.
    """
    done = (_DECODING, files.size, files.resize, files.channels, files.background, files.value_range)
    done += ("packed",) if files.pack is not None else ()  # type: ignore[assignment]
    hashed, start = hashlib.sha256(repr(done).encode()), base.rstrip(os.sep) + os.sep
    for row in range(len(files.paths)):
        path = files.path(row)
        try:
            status = os.stat(path)
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {error}; mend or remove it") from error
        below = path[len(start) :] if path.startswith(start) else os.path.relpath(path, base)
        hashed.update(f"{below}\0{status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation a channel of pixel / 255, from histograms. images uint8 [N, C, H, W]; for
    vectors [N, D] those of every dimension, in float64."""
    if not are_images(images):
        std, mean = torch.std_mean(images.double(), dim=0, correction=0)
        # A constant dimension carries nothing; with 1 it becomes 0.
        return tuple(mean.tolist()), tuple(std.where(std > 0, 1.0).tolist())
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        share = torch.bincount(images[:, channel].reshape(-1), minlength=256).double()
        share = share / share.sum()
        mean = (share * levels).sum()
        means.append(round(mean.item(), 6))
        # A constant channel has std 0; 1e-3 keeps the normalised image finite.
        stds.append(round(max((share * (levels - mean) ** 2).sum().sqrt().item(), 1e-3), 6))
    return tuple(means), tuple(stds)
