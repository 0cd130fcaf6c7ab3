"""The loop that kdbench is compared with: plain PyTorch, as most public code for distillation writes it.

Every image is a PIL image that is cropped, mirrored and normalised by itself in a worker process of a DataLoader, every
text a list of ids that is padded to the longest of its batch; the teacher runs for every batch; networks are float32 in
the usual memory layout; every step waits for the loss and two accuracies (`.item()`). Networks, loss and optimizer
settings are those of the configuration. Nothing here is made slow on purpose: what kdbench does about each of these is
what the comparison is about.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kdbench.data.augment.views import CropFlip
from kdbench.data.bundle import Bundle, ImageFiles, Inputs, are_images
from kdbench.engine.device import named_device
from kdbench.engine.options import OptimizerOptions
from kdbench.errors import UserError
from kdbench.runs.recipe import Recipe
from kdbench.types import Outputs, Target


class PlainImages(Dataset[tuple[Any, int, int]]):
    """The training images of a bundle, one at a time, through torchvision's transforms."""

    def __init__(self, data: Bundle) -> None:
        from torchvision import transforms as tv

        self.images, self.labels = data.transfer.inputs, data.transfer.labels.tolist()
        size, augment = self.images.shape[-1], data.augment
        steps: list[Any] = []
        if isinstance(self.images, ImageFiles):
            steps += [tv.RandomResizedCrop(size), tv.RandomHorizontalFlip()]
        elif isinstance(augment, CropFlip):
            steps += [tv.RandomCrop(size, padding=augment.pad)] if augment.pad else []
            steps += [tv.RandomHorizontalFlip()] if augment.flip else []
        self.transform = tv.Compose([*steps, tv.ToTensor(), tv.Normalize(data.mean, data.std)])
        self.arrays = None if isinstance(self.images, ImageFiles) else _arrays(self.images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, int, int]:
        return self.transform(self._open(row)), self.labels[row], row

    def _open(self, row: int) -> Image.Image:
        if self.arrays is not None:
            return Image.fromarray(self.arrays[row])
        assert isinstance(self.images, ImageFiles)
        return Image.open(self.images.path(row)).convert("RGB" if self.images.channels == 3 else "L")


def _arrays(images: Inputs) -> Any:
    assert isinstance(images, Tensor)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    return arrays[..., 0] if arrays.shape[-1] == 1 else arrays


class PlainTexts(Dataset[tuple[Tensor, int, int]]):
    """The training texts of a bundle, one at a time, each as long as it is."""

    def __init__(self, data: Bundle) -> None:
        if data.reading is not None:
            other = data.reading.tokeniser.name
            raise UserError("dataset.teacher_tokenizer", other, "null: the plain loop reads a text once")
        assert isinstance(data.transfer.inputs, Tensor)
        self.texts = [ids[ids != 0] for ids in data.transfer.inputs]
        self.labels = data.transfer.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        return self.texts[row], self.labels[row], row


def _padded(samples: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """A batch that is as wide as its longest text."""
    texts, labels, rows = zip(*samples, strict=True)
    return nn.utils.rnn.pad_sequence(list(texts), batch_first=True), torch.tensor(labels), torch.tensor(rows)


def _plain(data: Bundle) -> Dataset[Any]:
    """The training set, one sample at a time."""
    inputs, labels = data.transfer.inputs, data.transfer.labels
    if not isinstance(inputs, Tensor) or are_images(inputs):
        return PlainImages(data)
    if inputs.dtype == torch.int64:
        return PlainTexts(data)
    if data.mean:
        inputs = (inputs - torch.tensor(data.mean)) / torch.tensor(data.std)
    return TensorDataset(inputs, labels, torch.arange(len(labels)))


def plain_loader(data: Bundle, batch: int, workers: int, device: torch.device, stays: bool = False) -> DataLoader[Any]:
    """torch's DataLoader over the training set. `stays`: its workers live on between epochs."""
    made = _plain(data)
    return DataLoader(
        made, batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device.type == "cuda",
        collate_fn=_padded if isinstance(made, PlainTexts) else None, persistent_workers=stays and workers > 0,
    )  # fmt: skip


class ReferenceLoop:
    """One student under a live teacher; `turn(steps)` trains and returns the seconds that it took."""

    def __init__(self, recipe: Recipe, data: Bundle, workers: int) -> None:
        self.device = named_device(recipe.trainer.device)
        self.student = recipe.student.make(data.info).to(self.device).train()
        described = recipe.teacher.origin.describe(recipe.catalogue) if recipe.teacher else None
        self.teacher = described.make(data.info).to(self.device).eval() if described else None
        self.loss = recipe.loss.make()
        if self.loss.needs:
            raise UserError(
                f"loss={recipe.loss.name}: the plain loop has no adapters for features; compare with loss=kl"
            )
        self.optimizer = _optimizer(recipe.optimizer, self.student)
        self.loader = plain_loader(data, recipe.schedule.batch_size, workers, self.device)
        self._stream: Iterator[Any] | None = None
        self.sums = [0.0, 0.0, 0.0]

    def turn(self, steps: int) -> float:
        """The workers run on between turns until their queue is full, in this loop's favour."""
        self.step(*self._next())
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(*self._next())
        return time.perf_counter() - begin

    def _next(self) -> Any:
        batch = next(self._stream, None) if self._stream is not None else None
        if batch is None:
            self._stream = iter(self.loader)
            batch = next(self._stream)
        return batch

    def step(self, image: Tensor, label: Tensor, row: Tensor) -> None:
        image, label, row = image.to(self.device), label.to(self.device), row.to(self.device)
        answer = self.student(image)
        with torch.no_grad():
            teacher = None if self.teacher is None else self.teacher(image)
        target = Target(label, row, torch.tensor(0.5, device=self.device))
        total = self.loss(Outputs(answer.logits, {}), teacher, target).total
        right = answer.logits.topk(min(5, answer.logits.shape[1]), 1).indices == label[:, None]
        figures = (total, right[:, 0].float().mean(), right.any(1).float().mean())
        self.sums = [have + value.item() for have, value in zip(self.sums, figures, strict=True)]
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()


def _optimizer(options: OptimizerOptions, student: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizer of that name as it comes; SGD for one that torch has not."""
    adaptive = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(options.name)
    parameters, decay = student.parameters(), options.weight_decay
    if adaptive is not None:
        return adaptive(parameters, lr=options.lr, weight_decay=decay)
    momentum, nesterov = options.momentum or 0.0, bool(options.nesterov)
    return torch.optim.SGD(parameters, lr=options.lr, weight_decay=decay, momentum=momentum, nesterov=nesterov)
