"""Images with labels and images without: hiding labels, labelling by a teacher, and choosing what to trust."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kdbench.data.bundle import Bundle, ImageFiles, Split
from kdbench.data.sampling import count_of, order_keys, stratified
from kdbench.errors import UserError


class Pool(NamedTuple):
    """The labelled training images, and the others with what is known of their true labels (-1: nothing)."""

    labelled: Split
    unlabelled: Split
    truth: Tensor  # int64 [len(unlabelled)], for diagnosis only

    def data(self, bundle: Bundle) -> Bundle:
        """The dataset as a teacher sees it that knows the labelled images only."""
        return replace(bundle, train=self.labelled, transfer=self.labelled)


def make_pool(bundle: Bundle, labelled: float | None, seed: int) -> Pool:
    """Keep the labels of a share (or number) of the training images, stratified; the others lose them.

    `labelled` null keeps all. The transfer set's own unlabelled images (dataset.transfer.extra, crops, noise_images)
    are in the pool too. Raises UserError if there is no image without a label, or if images are mixed.
    """
    if bundle.mix is not None:
        kind = bundle.mix.kind
        raise UserError("dataset.mix.kind", kind, "none with pseudo-labels: a label belongs to one image")
    train = bundle.train
    keep = torch.arange(len(train))
    if labelled is not None:
        count = count_of(labelled, len(train), "procedure.labelled", whole=True)
        keep = stratified(train.labels, count, order_keys(len(train), seed, "labelled")).sort().values
    hidden = torch.ones(len(train), dtype=torch.bool)
    hidden[keep] = False
    rest = train.select(hidden.nonzero()[:, 0])
    extra = bundle.transfer.select((bundle.transfer.labels < 0).nonzero()[:, 0])
    parts = [part for part in (rest, extra) if len(part)]
    if not parts:
        allowed = "below 1, or there must be unlabelled images (dataset.transfer.extra=<folder>): all have labels"
        raise UserError("procedure.labelled", labelled, allowed)
    truth = torch.cat([part.labels if part.clean is None else part.clean for part in parts])
    whole = joined(parts)
    return Pool(train.select(keep), replace(whole, labels=torch.full((len(whole),), -1), clean=None), truth)


def joined(parts: list[Split]) -> Split:
    """Splits one after the other. Raises UserError for images of files beside images in memory."""
    if len(parts) == 1:
        return parts[0]
    images = [part.inputs for part in parts]
    if any(isinstance(image, ImageFiles) for image in images):
        raise UserError("unlabelled images beside a dataset that is streamed from files are not supported here")
    tensors = [image for image in images if isinstance(image, Tensor)]
    labels, rows = (torch.cat([getattr(part, name) for part in parts]) for name in ("labels", "rows"))
    return Split(torch.cat(tensors), labels, rows)


def trusted(probabilities: Tensor, threshold: float, per_class: int | None) -> Tensor:
    """Rows to train on, of predictions [N, C]: those at least `threshold` sure (Xie et al. 2020, section 3).

    `per_class`: so many of every predicted class, the surest first; a class that has fewer repeats them, one that has
    none is left out. null: all of them, each once. Ascending where nothing repeats.
    """
    confidence, answer = probabilities.max(1)
    rows = (confidence >= threshold).nonzero()[:, 0]
    if per_class is None:
        return rows
    order = rows[confidence[rows].argsort(descending=True, stable=True)]
    chosen = []
    for label in range(probabilities.shape[1]):
        mine = order[answer[order] == label]
        if len(mine):
            chosen.append(mine.repeat(math.ceil(per_class / len(mine)))[:per_class])
    return torch.cat(chosen).sort().values if chosen else rows
