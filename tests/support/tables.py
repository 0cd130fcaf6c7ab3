"""A tiny data set, teacher and table, also for processes that are killed."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdbench.data.augment.views import CropFlip
from kdbench.data.batches import Loading, TrainingBatches
from kdbench.data.bundle import Bundle, Split, fingerprint
from kdbench.engine.device import place
from kdbench.engine.options import TrainerOptions
from kdbench.tables.feed import Filler
from kdbench.tables.key import table_key
from kdbench.tables.store import Tables
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Outputs

IMAGES, VIEWS, CLASSES = 300, 18, 5
OPTIONS = TrainerOptions(device="cpu", progress="none")


class Net(nn.Module):
    """Convolution, batch norm and a linear layer: the parts whose last bits depend on how a batch is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.fc = nn.Linear(8, CLASSES)
        self.calls = 0

    def forward(self, image: Tensor) -> Outputs:
        self.calls += 1
        pooled = self.body(image).relu().mean((2, 3))
        return Outputs(self.fc(pooled), {"pooled": pooled})


def make_data(images: int = IMAGES, pad: int = 1) -> Bundle:
    pixels = torch.randint(256, (images, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    split = Split(pixels, torch.arange(images) % CLASSES, torch.arange(images))
    names = tuple("abcde")
    return Bundle(
        "tiny", names, (0.5,) * 3, (0.25,) * 3, split, split, None, split, fingerprint(pixels), images, CropFlip(pad)
    )


def make_batches(data: Bundle, seed: int = 0, batch_size: int = 24) -> TrainingBatches:
    return TrainingBatches(data, data.transfer, Loading(batch_size, seed, channels_last=True))


def make_live(precision: str = "fp32", seed: int = 3, chunk: int = 32) -> LiveTeacher:
    torch.manual_seed(seed)
    placement = place(TrainerOptions(device="cpu", progress="none", precision=precision))  # type: ignore[arg-type]
    return LiveTeacher(placement.put(Net()), chunk, placement.autocast)


def make_filler(folder: Path, live: LiveTeacher, data: Bundle, batches: TrainingBatches) -> Filler:
    key, shape = table_key(live, "weights", data, batches, "fp32")
    return Filler(Tables("on", folder).open(key, shape, torch.device("cpu"))[0], live, batches)


def all_live(live: LiveTeacher, data: Bundle) -> Tensor:
    """The live teacher's logits of every entry, from batches of another size and order."""
    batches = make_batches(data)
    entries = torch.randperm(len(data.train) * VIEWS, generator=torch.Generator().manual_seed(4))
    images = batches.inputs_at(entries // VIEWS, entries % VIEWS)
    logits = torch.cat([live.outputs(piece).logits for piece in images.split(50)])
    return logits[torch.argsort(entries)]


def fill_slowly(folder: Path, pause: float, news: Connection) -> None:
    """Fill the whole table, a pause after every slice: the main of a process that may be killed."""
    live, data = make_live(), make_data()
    filler = make_filler(folder, live, data, make_batches(data))

    def advance(done: int) -> None:
        news.send(done)
        time.sleep(pause)

    filler.fill(np.arange(IMAGES * VIEWS), advance)
    news.send(filler.computed)
