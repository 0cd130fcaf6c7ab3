"""What the loss tests share: every loss of configs/loss by its file name, and batches of made-up outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from kdbench.configure import construct
from kdbench.losses.base import DistillationLoss
from kdbench.models.base import Staged, Step, pool
from kdbench.types import Outputs, Parts, Target

FOLDER = Path(__file__).parents[2] / "configs/loss"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
B, C = 6, 7  # samples and classes of a test batch
ALIKE = {"fsp", "kdsvd"}  # compare products of channels: both networks need the same
WAITING = {"kdsvd"}  # torch asks a GPU whether a singular value decomposition has converged
SMALL: dict[str, dict[str, Any]] = {
    "crd": {"images": 400, "negatives": 32},  # its own defaults take seconds a batch
    "norm": {"copies": 1},  # as wide as "projected" below
}
WITHIN = {"sum": "crd"}  # a loss that has another one as a part


def settings(name: str) -> dict[str, Any]:
    """The plain values of configs/loss/<name>.yaml."""
    file = OmegaConf.load(FOLDER / f"{name}.yaml")
    for entry in file.pop("defaults", []):  # {"/loss@parts.kl": kl}: that loss, at that place
        for place, option in entry.items() if OmegaConf.is_dict(entry) else ():
            file = OmegaConf.merge({"parts": {place.removeprefix("/loss@parts."): settings(option)}}, file)
    values = OmegaConf.to_container(file)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def small(name: str) -> dict[str, Any]:
    """Changes that make a loss quick enough for tests."""
    inner = WITHIN.get(name)
    if inner is None:
        return SMALL.get(name, {})
    parts = settings(name)["parts"]
    return {"parts": {**parts, inner: {**parts[inner], **SMALL[inner]}}}


def build(name: str, **changes: Any) -> DistillationLoss:
    """The loss of configs/loss/<name>.yaml with some values changed."""
    values = settings(name) | changes
    loss = construct(values, "loss")
    assert isinstance(loss, DistillationLoss)
    return loss


def outputs(logits: torch.Tensor, width: int, sizes: tuple[int, int, int], seed: int) -> Outputs:
    """Logits [B, C] with the feature maps that a small network of three stages would give."""
    random = torch.Generator().manual_seed(seed)
    channels = (width, 2 * width, 4 * width)
    maps = {
        f"stage{i + 1}": torch.randn(len(logits), d, n, n, generator=random).relu()
        for i, (d, n) in enumerate(zip(channels, sizes))
    }
    maps["stem"] = torch.randn(len(logits), width, sizes[0], sizes[0], generator=random).relu()
    maps["pooled"] = maps["stage3"].mean((2, 3))
    # The two heads of a distilled ViT, whose mean the logits are; and the members of an ensemble.
    apart = torch.randn(logits.shape, generator=random)
    maps |= {"head": logits + apart, "head_dist": logits - apart}
    maps["members"] = torch.stack([logits, logits + apart, 0.5 * logits - apart], 1)
    maps["projected"] = torch.randn(len(logits), 24, 2, 2, generator=random).relu()  # of a student that is extended
    # What a ViT has: its first blocks, and its last tokens.
    maps |= {name: torch.randn(len(logits), width, 4, 4, generator=random) for name in ("block1", "block2", "tokens")}
    return Outputs(logits, maps)


def batch(seed: int = 0, name: str = "", scale: float = 3.0, samples: int = B) -> tuple[Outputs, Outputs, Target]:
    """(student, teacher, target) for the loss of that name: labels that the teacher often gets right, and feature maps
    of different width and size, unless the loss wants them of one width; twice as many samples, of the same rows and
    labels again, where it wants two views."""
    views = build(name).views if name else 1
    random = torch.Generator().manual_seed(seed)
    teacher = scale * torch.randn(views * samples, C, generator=random)
    student = 0.5 * teacher + scale * torch.randn(views * samples, C, generator=random)
    known = torch.rand(samples, generator=random) < 0.7
    label = torch.where(known, teacher[:samples].argmax(1), torch.arange(samples) % C).repeat(views)
    target = Target(label, (torch.arange(samples) + 10 * seed).repeat(views), torch.tensor(0.25))
    return (
        outputs(student, 4, (8, 4, 2), seed),
        outputs(teacher, 4 if name in ALIKE else 6, (8, 8, 4), seed + 1),
        target,
    )


def parts(out: Outputs, device: str = "cpu") -> Parts:
    """Layers that a network with these outputs may have: a classifier, and the batch norms of its stages."""
    norms = {}
    for name, value in out.features.items():
        if name.startswith("stage"):
            norms[name] = torch.nn.BatchNorm2d(value.shape[1], device=device)
            torch.nn.init.uniform_(norms[name].weight)
            torch.nn.init.normal_(norms[name].bias)
    classifier = torch.nn.Linear(out.features["pooled"].shape[1], out.logits.shape[1], device=device)
    return Parts(classifier, norms, Chain(out).to(device))


class Chain(Staged):
    """A network whose stages have the shapes of these outputs, to be entered at any."""

    joints = ("stage1", "stage2", "stage3")

    def __init__(self, out: Outputs) -> None:
        super().__init__()
        shapes = [out.features[name].shape for name in self.joints]
        for number, (before, after) in enumerate(itertools.pairwise(shapes), start=2):
            layers = (
                torch.nn.Conv2d(before[1], after[1], 1),
                torch.nn.AdaptiveAvgPool2d(tuple(after[2:])),
                torch.nn.ReLU(),
            )
            self.add_module(f"stage{number}", torch.nn.Sequential(*layers))
        self.logits = torch.nn.Linear(shapes[-1][1], out.logits.shape[1])

    def steps(self) -> dict[str, Step]:
        """From the first stage on."""
        steps: dict[str, Step] = {"stage1": (torch.nn.Identity(), "input")}
        for before, name in itertools.pairwise(self.joints):
            steps[name] = (self.get_submodule(name), before)
        return {**steps, "pooled": (pool, "stage3"), "logits": (self.logits, "pooled")}


def cast(out: Outputs, dtype: torch.dtype, grad: bool = False) -> Outputs:
    """A copy in another precision, as leaves that collect gradients if `grad`."""
    return Outputs(
        out.logits.detach().to(dtype).requires_grad_(grad),
        {key: value.detach().to(dtype).requires_grad_(grad) for key, value in out.features.items()},
    )


def ready(name: str, **changes: Any) -> DistillationLoss:
    """The loss as the training engine has it: adapters made, calibrated if it wants to be."""
    torch.manual_seed(0)
    loss = build(name, **small(name) | changes)
    student, teacher, _ = batch(30, name, samples=24)
    attach(loss, student, teacher)
    loss.setup(student, teacher)
    if loss.surveyed:
        loss.survey([(teacher.features[loss.surveyed], torch.arange(24) % C)])
    if loss.needs_calibration:
        loss.calibrate(
            teacher.logits, torch.where(torch.arange(24) % 4 == 0, torch.arange(24) % C, teacher.logits.argmax(1))
        )
    return loss


def attach(loss: DistillationLoss, student: Outputs, teacher: Outputs, device: str = "cpu") -> None:
    """Layers that networks with these outputs may have, and the batch size."""
    loss.batch_size = B
    loss.attach(*(parts(out, device) for out in (student, teacher)))
