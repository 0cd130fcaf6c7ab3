"""Time the step of another project's own loop, unchanged, on this machine: RepDistiller's, mdistiller's or timm's.

Run by scripts/bench_table.py; alone it takes lines "<steps>" on its stdin and answers with the seconds that they took.

    python scripts/bench_peer.py --peer PATH/TO/RepDistiller --teacher resnet56 --student resnet20 --workers 2
    python scripts/bench_peer.py --peer PATH/TO/mdistiller --project mdistiller --teacher resnet56 --student resnet20
    python scripts/bench_peer.py --project timm --student vit_tiny_patch16_224 --options '{"patch_size": 4}'

PATH is a checkout of github.com/HobbitLong/RepDistiller or github.com/megvii-research/mdistiller; none of its code is
part of this one. Their networks, loaders, transforms, losses and `train_distill` or `BaseTrainer.train_iter` are called
as they are; only CIFAR-100's images are random ones, so that nothing is downloaded, and on a CPU mdistiller's `.cuda()`
moves nothing. Their settings are those of their KD rows: batch 64, SGD 0.05, CE 0.1, KL 0.9 at temperature 4.

timm has no loop in its package: this is the body of its train.py (train_one_epoch) with its loader, transforms, Mixup
and CutMix, loss and optimizer, by DeiT's recipe without a teacher (Touvron et al. 2021), in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn


class RandomCIFAR100(torch.utils.data.Dataset):
    """Stands in for torchvision.datasets.CIFAR100: 50,000 random images."""

    def __init__(
        self, root: str, train: bool = True, transform: Any = None, download: bool = False, target_transform: Any = None
    ) -> None:  # fmt: skip
        self.data = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
        self.transform, self.targets = transform, [number % 100 for number in range(len(self.data))]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


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


class RepDistiller:
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


class MDistiller:
    """mdistiller's student, teacher, distiller and trainer, as its tools/train.py makes them."""

    def __init__(self, teacher: str, student: str, workers: int) -> None:
        torchvision.datasets.CIFAR100 = RandomCIFAR100
        for name, attribute in (("tensorboardX", "SummaryWriter"), ("yacs.config", "CfgNode")):  # not called in a step
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                stub = SimpleNamespace(**{attribute: _Settings})
                sys.modules |= {name.partition(".")[0]: stub, name: stub}  # type: ignore[dict-item]
        from mdistiller.dataset.cifar100 import get_cifar100_dataloaders
        from mdistiller.distillers.KD import KD
        from mdistiller.engine.trainer import AverageMeter, BaseTrainer
        from mdistiller.models import cifar_model_dict

        self.train_iter = BaseTrainer.train_iter
        loader = get_cifar100_dataloaders(64, 64, workers)[0]
        self.stream = forever(loader)
        weights = SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)
        options = SimpleNamespace(KD=SimpleNamespace(TEMPERATURE=4, LOSS=weights))
        made = (cifar_model_dict[name][0](num_classes=100) for name in (student, teacher))
        distiller = KD(*made, options)
        if torch.cuda.is_available():
            distiller.cuda()
        else:
            torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign, assignment]
        learned = distiller.get_learnable_parameters()
        optimizer = torch.optim.SGD(learned, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self.trainer = SimpleNamespace(distiller=nn.DataParallel(distiller).train(), optimizer=optimizer)
        names = ("training_time", "data_time", "losses", "top1", "top5")
        self.meters = {name: AverageMeter() for name in names}

    def turn(self, steps: int) -> float:
        begin = time.perf_counter()
        for data in itertools.islice(self.stream, steps):
            self.train_iter(self.trainer, data, 1, self.meters)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin


class _Settings(dict[str, Any]):
    """What mdistiller's settings are kept in: keys as attributes."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class Timm:
    """timm's loader, mixtures, network, loss and optimizer for DeiT's recipe on 32x32 images, and its loop's body."""

    def __init__(self, student: str, options: dict[str, Any], workers: int, batch: int = 64) -> None:
        import timm
        from timm.data import Mixup, create_loader
        from timm.loss import SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.utils import AverageMeter

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        posterize = ImageOps.posterize  # timm may ask for 0 bits, which Pillow 12 refuses
        ImageOps.posterize = lambda image, bits: posterize(image, max(1, bits))  # type: ignore[assignment]
        loader = create_loader(
            RandomCIFAR100(""), (3, 32, 32), batch, is_training=True, use_prefetcher=False, re_prob=0.25,
            re_mode="pixel", auto_augment="rand-m9-mstd0.5-inc1", num_workers=workers, persistent_workers=workers > 0,
            device=self.device,
        )  # fmt: skip
        self.stream = forever(loader)
        self.mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=100)
        made = timm.create_model(student, img_size=32, num_classes=100, **options)
        self.model = made.to(self.device).train()
        self.loss = SoftTargetCrossEntropy()
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=1e-3, weight_decay=0.05)
        self.losses = AverageMeter()

    def turn(self, steps: int) -> float:
        begin = time.perf_counter()
        for images, labels in itertools.islice(self.stream, steps):
            images, labels = self.mix(images.to(self.device), labels.to(self.device))
            loss = self.loss(self.model(images), labels)
            self.losses.update(loss.item(), images.size(0))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="a checkout of the project")
    parser.add_argument("--project", choices=("repdistiller", "mdistiller", "timm"), default="repdistiller")
    parser.add_argument("--options", type=json.loads, default={}, help="of timm's network, as JSON")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    sys.path.insert(0, os.path.abspath(arguments.peer))
    peer: RepDistiller | MDistiller | Timm
    if arguments.project == "timm":
        peer = Timm(arguments.student, arguments.options, arguments.workers)
    else:
        kind = MDistiller if arguments.project == "mdistiller" else RepDistiller
        peer = kind(arguments.teacher, arguments.student, arguments.workers)
    print("ready", flush=True)
    for line in sys.stdin:
        print(peer.turn(int(line)), flush=True)


if __name__ == "__main__":
    main()
