"""Time the distillation step of RepDistiller (github.com/HobbitLong/RepDistiller), unchanged, on this machine.

Run by scripts/bench_table.py; alone it takes lines "<steps>" on its stdin and answers with the seconds that they took.

    python scripts/bench_peer.py --peer PATH/TO/RepDistiller --teacher resnet56 --student resnet20 --workers 2

PATH is a checkout of that project; none of its code is part of this one. Its networks, loader, transforms, losses and
its `train_distill` are called as they are; only CIFAR-100's images are random ones, so that nothing is downloaded.
Its settings are those of its README's KD row: batch 64, SGD 0.05, CE 0.1, KL 0.9 at temperature 4.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn


class RandomCIFAR100(torch.utils.data.Dataset):
    """Stands in for torchvision.datasets.CIFAR100: 50,000 random images."""

    def __init__(self, root: str, train: bool = True, transform: Any = None, download: bool = False) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.data[index])), index % 100


class Some:
    """So many batches of a loader that runs on between calls."""

    def __init__(self, stream: Iterator[Any], steps: int) -> None:
        self.stream, self.steps = stream, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.stream, self.steps)


def forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


class Peer:
    """RepDistiller's student, teacher, losses and optimizer, as its train_student.py makes them."""

    def __init__(self, teacher: str, student: str, workers: int) -> None:
        torchvision.datasets.CIFAR100 = RandomCIFAR100
        from dataset.cifar100 import get_cifar100_dataloaders
        from distiller_zoo import DistillKL
        from helper.loops import train_distill
        from models import model_dict

        self.train_distill = train_distill
        loader, _, _ = get_cifar100_dataloaders(64, workers, is_instance=True)
        self.stream = forever(loader)
        self.modules = nn.ModuleList([model_dict[student](num_classes=100), model_dict[teacher](num_classes=100)])
        self.losses = nn.ModuleList([nn.CrossEntropyLoss(), DistillKL(4), DistillKL(4)])
        if torch.cuda.is_available():
            self.modules.cuda()
            self.losses.cuda()
        self.optimizer = torch.optim.SGD(self.modules[0].parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.options = SimpleNamespace(distill="kd", gamma=0.1, alpha=0.9, beta=0.0, print_freq=10**9)

    def turn(self, steps: int) -> float:
        begin = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            self.train_distill(1, Some(self.stream, steps), self.modules, self.losses, self.optimizer, self.options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a checkout of RepDistiller")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    sys.path.insert(0, os.path.abspath(arguments.peer))
    peer = Peer(arguments.teacher, arguments.student, arguments.workers)
    print("ready", flush=True)
    for line in sys.stdin:
        print(peer.turn(int(line)), flush=True)


if __name__ == "__main__":
    main()
