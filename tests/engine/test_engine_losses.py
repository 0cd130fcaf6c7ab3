"""Every loss in the trainer: a cohort's member has the numbers of its solo run, also where that was cut and resumed.
Each file of configs/loss is tested by existing."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdbench.configure import construct
from kdbench.engine.checkpoint import Checkpoints, resume_epoch
from kdbench.engine.device import place
from kdbench.engine.distiller import Distiller
from kdbench.engine.evaluate import Evaluator
from kdbench.engine.learner import Learner
from kdbench.engine.log import ProgressView, RunLog
from kdbench.engine.metrics import Meters
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.engine.schedule import ScheduleOptions, lr_factors
from kdbench.engine.trainer import Member, fit
from kdbench.losses.base import DistillationLoss
from kdbench.models.interface import parts_of
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Batch, Outputs, Target
from tests.support import losses

OPTIONS = TrainerOptions(device="cpu", progress="none")
EPOCHS, ROWS, CLASSES = 2, 6, 4
CONVOLUTIONS = {"_target_": "kdbench.models.resnet.ResNet", "depth": 8}
BLOCKS = {
    "_target_": "kdbench.models.timm.timm_model", "name": "vit_tiny_patch16_224",
    "options": {"patch_size": 4, "depth": 2, "num_heads": 2},
}  # fmt: skip
SHAPE = {"num_classes": CLASSES, "in_channels": 1, "image_size": 8}
VITS = ("deit", "vitkd")


def network(name: str, width: int, **more: object) -> dict[str, object]:
    """What makes a network of so many channels that a loss can read."""
    if name in VITS:
        options = {**BLOCKS["options"], "embed_dim": width, **more}  # type: ignore[dict-item]
        return {**BLOCKS, "options": options}
    return {**CONVOLUTIONS, "widths": [width, width, 2 * width, 2 * width]}


class Members(nn.Module):
    """A teacher's logits, and those of the members of which it is the mean."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Outputs:
        logits, features = self.network(images)
        return Outputs(logits, {**features, "members": torch.stack([0.5 * logits, 1.5 * logits], 1)})


class Views:
    """One step an epoch on images whose class shows in the mean, so often as the loss wants views of them."""

    steps, seed, views = 1, 0, None

    def __init__(self, views: int) -> None:
        self.count = views

    def epoch(self, epoch: int, epochs: int):
        random = torch.Generator().manual_seed(epoch)
        row = torch.arange(ROWS).repeat(self.count)
        label = row % CLASSES
        image = torch.randn(len(row), 1, 8, 8, generator=random) + label[:, None, None, None]
        yield Batch(image, torch.zeros_like(row), Target(label, row, torch.tensor(epoch / epochs)))


@functools.cache
def kind(name: str) -> tuple[str, ...]:
    """Losses that can share a batch and its teacher are of one kind."""
    return (str(losses.build(name).views), "vit" if name in VITS else "alike" if name in losses.ALIKE else "")


@functools.cache
def teacher(name: tuple[str, ...]) -> LiveTeacher:
    torch.manual_seed(9)
    width = 4 if name[1] == "alike" else 6
    made = construct({**network("deit" if name[1] == "vit" else "", 2 * width), **SHAPE}, "teacher")
    return LiveTeacher(Members(made), ROWS, place(OPTIONS).autocast)


def extended(name: str, loss: DistillationLoss, taught: nn.Module, images: Tensor) -> nn.Module:
    """The student, with what its loss makes of it."""
    config = network(name, 8, **({"distilled": True} if name == "deit" else {}))
    student = construct({**config, **SHAPE}, "student")
    loss.attach(parts_of(student), parts_of(taught))
    with torch.no_grad():
        by = loss.extension(student.eval()(images), taught(images))
    if by is None:
        return student
    student = construct({**by.config, "network": json.dumps(config), **SHAPE}, "student")
    state = student.state_dict()
    student.load_state_dict({**state, **{key: value for key, value in by.weights.items() if key in state}})
    return student


def member(name: str, folder: Path) -> Member:
    epochs_done, state = resume_epoch(folder)
    taught = teacher(kind(name)).network
    torch.manual_seed(sum(map(ord, name)))
    loss = losses.build(name, **losses.small(name))
    images = torch.randn(2, 1, 8, 8)
    student = extended(name, loss, taught.network, images)
    loss.epochs, loss.batch_size, loss.train_rows = EPOCHS, ROWS, ROWS
    loss.attach(parts_of(student), parts_of(taught.network))
    with torch.no_grad():
        outputs, wanted = student.eval()(images), taught(images)
        loss.setup(outputs, wanted)
        if state is None and loss.surveyed:
            loss.survey([(taught(images).features[loss.surveyed], torch.tensor([0, 1]))])
        if state is None and loss.needs_calibration:
            loss.calibrate(3 * torch.randn(12, CLASSES), torch.arange(12) % CLASSES)
    placement = place(OPTIONS)
    factors = lr_factors(ScheduleOptions(epochs=EPOCHS, batch_size=ROWS, shape="cosine"), Views.steps)
    optimizer = OptimizerOptions("sgd", 1e-5 if name in VITS else 1e-3, momentum=0.9)
    meters = Meters(placement.device, Views.steps)
    learner = Learner(Distiller(student.train(), loss, placement), optimizer, OPTIONS, factors, meters, 0)
    made = Member(learner, Evaluator({}, {}), Checkpoints(folder), RunLog(folder, epochs_done), EPOCHS)
    if state:
        made.restore(state)
    return made


def train(members: list[Member], name: tuple[str, ...], until: int = EPOCHS) -> None:
    fit(members, Views(int(name[0])), teacher(name), until, ProgressView("test", 9, 0, 8, "none"))
    for one in members:
        one.log.close()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Members by name, each kind trained side by side when it is first asked for."""

    @functools.cache
    def of(wanted: tuple[str, ...]) -> dict[str, Member]:
        names = [name for name in losses.NAMES if kind(name) == wanted]
        made = {name: member(name, tmp_path_factory.mktemp(name)) for name in names}
        train(list(made.values()), wanted)
        return made

    return of


@pytest.mark.parametrize("name", losses.NAMES)
def test_a_member_is_as_its_solo_run_that_was_resumed(name, cohort, tmp_path):
    together = cohort(kind(name))[name]
    train([member(name, tmp_path)], kind(name), until=1)
    torch.rand(5)  # whatever another process would have drawn
    alone = member(name, tmp_path)
    assert alone.epochs_done == 1
    before = {key: value.clone() for key, value in alone.learner.distiller.state_dict().items()}
    twin = alone.learner.copied()
    twin.begin_epoch(1)
    batch = next(Views(int(kind(name)[0])).epoch(1, EPOCHS))
    twin.step(batch, teacher(kind(name))(batch))
    train([alone], kind(name))
    assert alone.learner.failure is None and together.learner.failure is None
    mine, other = (one.learner.distiller.state_dict() for one in (alone, together))
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    assert any(not torch.equal(before[key], mine[key]) for key in mine)
    copied = twin.distiller.state_dict()  # a plain step beside a recorded one is taken by a copy
    assert all(torch.equal(mine[key], copied[key]) for key in mine)
    assert alone.last["train/loss"] == together.last["train/loss"]
