"""Students that teach each other or themselves, teachers that learn, and snapshots of one training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdbench.engine.learner import Learner
from kdbench.engine.schedule import ScheduleOptions, lr_factors
from kdbench.errors import UserError
from kdbench.losses.kl import KL
from kdbench.models.mlp import MLP
from kdbench.procedures.mutual import Mutual, Peers, peers_from
from kdbench.procedures.snapshot import cycle_schedule
from kdbench.teachers.meta import MetaTeacher
from kdbench.teachers.past_self import PastSelf
from kdbench.types import Batch, Outputs, Target
from tests.support.procedures import MLPS, refusal, result, stages, train

ALONE = ["teacher=none", "student=mlp", "student.hidden=[24]"]
META = ["procedure=meta_pseudo_labels", "procedure.labelled=0.5", "procedure.finetune_epochs=1", *MLPS]


class Linear(nn.Module):
    """A linear classifier of flat images."""

    def __init__(self, seed: int, pixels: int = 4, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(pixels, classes)

    def forward(self, image: torch.Tensor) -> Outputs:
        return Outputs(self.fc(image.flatten(1)), {})


def a_batch(seed: int, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(size, 1, 2, 2, generator=generator)
    label = torch.randint(3, (size,), generator=generator)
    return Batch(image, torch.zeros(size, dtype=torch.int64), Target(label, torch.arange(size), torch.zeros(())))


@pytest.mark.parametrize("count", [2, 3])
def test_mutual_learning_is_each_peers_loss_with_all_others(count: int):
    batch = a_batch(0)
    joint = Peers([Linear(seed) for seed in range(count)])
    pairs = count * (count - 1)
    mutual = Mutual([KL({"task": 1.0, "distill": 1.0}, tau=1.0) for _ in range(pairs)], count)
    mutual(joint(batch.input), None, batch.target).total.backward()
    for number in range(count):
        alone = Linear(number)
        others = [Linear(other)(batch.input).logits.softmax(1).detach() for other in range(count) if other != number]
        log_p = alone(batch.input).logits.log_softmax(1)
        loss = nn.functional.nll_loss(log_p, batch.target.label)
        loss = loss + sum((q * (q.log() - log_p)).sum(1).mean() for q in others) / (count - 1)
        loss.backward()
        trained = joint.peers[number].fc  # type: ignore[union-attr]
        assert torch.allclose(trained.weight.grad, alone.fc.weight.grad, atol=1e-6)  # type: ignore[union-attr,arg-type]


def test_peers_answer_as_the_first_and_keep_their_own_features():
    peers, images = Peers([MLP([5], num_classes=3, in_channels=1, image_size=2) for _ in range(2)]), a_batch(0).input
    together, apart = peers(images), [peer(images) for peer in peers.peers]
    assert together.logits.equal(apart[0].logits) and together.features.keys() == apart[0].features.keys()
    for mine, alone in zip(together.peers, apart, strict=True):
        assert mine.logits.equal(alone.logits)
        assert all(mine.features[key].equal(value) for key, value in alone.features.items())


def test_peers_that_cannot_be_read_are_refused_by_name():
    info = {"num_classes": 3, "in_channels": 1, "image_size": 2}
    known = {"_target_": "kdbench.models.mlp.MLP", "hidden": [5]}
    assert len(peers_from([json.dumps(known)] * 2, **info).peers) == 2
    for other, part in (({"_target_": "kdbench.models.mlp.MLPS"}, "has no MLPS"), ({"hiden": [5]}, "hiden")):
        with pytest.raises(UserError, match=r"student\.networks\[1\]") as caught:
            peers_from([json.dumps(known), json.dumps(known | other)], **info)
        assert part in str(caught.value)


def test_peers_become_runs_of_their_own():
    words = [word for word in ALONE if not word.startswith("teacher")]
    out = train("procedure=mutual", *words, "procedure.students=[mlp,resnet8]", without=["teacher"])
    together, first, second = stages(out)
    joint = load_file(together / "student.safetensors")
    own = load_file(first / "student.safetensors")
    assert all(own[key].equal(joint[f"peers.0.{key}"]) for key in own)
    found = result(out)
    assert found["student"]["name"] == "mlp" and result(second)["student"]["name"] == "resnet8"
    assert found["figures"]["peer1/test/top1"] == result(first)["last"]["test/top1"]
    assert result(together)["last"]["test/top1"] == pytest.approx(result(first)["last"]["test/top1"])
    taught = result(train(*MLPS, f"teacher.run={second}", out="taught"))
    assert taught["teacher"]["weights"] == result(second)["student"]["weights"]


def test_the_past_self_is_last_epochs():
    student, teacher = Linear(0), PastSelf(2, torch.no_grad)
    teacher.attach(student)
    batch, answers = a_batch(1), []
    for step in range(5):
        answers.append(teacher(batch).logits)
        with torch.no_grad():
            student.fc.bias += step + 1.0
    moved = [(answer - answers[0]).mean().item() for answer in answers]
    assert moved == pytest.approx([0, 0, 3, 3, 10], abs=1e-5)


def test_the_past_self_may_be_an_average():
    student, teacher = Linear(0), PastSelf(2, torch.no_grad, decay=0.75)
    teacher.attach(student)
    batch, answers = a_batch(1), []
    for _ in range(3):
        answers.append(teacher(batch).logits)
        with torch.no_grad():
            student.fc.bias += 8.0
    moved = [(answer - answers[0]).mean().item() for answer in answers]
    assert moved == pytest.approx([0, 2, 5.5], abs=1e-5)
    other = PastSelf(2, torch.no_grad, decay=0.75)
    other.attach(student)
    other.restore(teacher.state())
    assert torch.allclose(other(batch).logits, teacher(batch).logits)


class Labelled:
    """One labelled batch, again and again."""

    size, steps, views = 6, 1, None

    def epoch(self, epoch: int, epochs: int):
        yield a_batch(7)


def test_feedback_is_the_first_order_form_of_the_papers_product():
    """The teacher's gradient is lr <grad of the labelled loss, grad of the pseudo-labelled loss> grad CE(t, pseudo)."""
    student, network, batch, lr = Linear(0), Linear(1), a_batch(3), 1e-3
    teacher = MetaTeacher(network, torch.optim.SGD(network.parameters(), 1.0), Labelled(), torch.no_grad, 0, False, 0.0)
    teacher.context = torch.enable_grad
    teacher.attach(student)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    label = teacher(batch).logits.argmax(1)
    gradients = []
    for images, labels in ((a_batch(7).input, a_batch(7).target.label), (batch.input, label)):
        loss = nn.functional.cross_entropy(student(images).logits, labels)
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
    product = lr * sum((a * b).sum() for a, b in zip(*gradients))
    with torch.no_grad():
        for value, gradient in zip(student.parameters(), gradients[1]):
            value -= lr * gradient
    own = torch.autograd.grad(
        nn.functional.cross_entropy(network(batch.input).logits, label), list(network.parameters())
    )
    teacher.learn()
    for (name, value), gradient in zip(network.named_parameters(), own):
        assert torch.allclose(before[name] - value, product * gradient, rtol=0.03, atol=1e-8), name


def test_a_teacher_that_learns_is_resumed(monkeypatch: pytest.MonkeyPatch):
    words = [
        *META,
        "schedule.epochs=3",
        "student.dropout=0.2",
        "teacher.dropout=0.2",
        "schedule.batch_size=8",
    ]
    whole = result(train(*words, out="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", _fails_at(5))  # 24 unlabelled images: the second step of the second epoch
        with pytest.raises(KeyboardInterrupt):
            train(*words, out="cut")
    assert not (Path("cut/stages/1-taught") / "result.json").exists()
    train(*words, out="cut")
    cut = result("cut")
    assert cut["student"] == whole["student"] and cut["figures"] == whole["figures"]
    assert {"teacher_before/test/top1", "teacher_after/test/top1"} <= cut["figures"].keys()


def _fails_at(last: int) -> Callable[..., None]:
    """A step of a learner that is interrupted after it was done `last` times."""
    step, count = Learner.step, [0]

    def interrupted(self: Learner, *args: object) -> None:
        step(self, *args)  # type: ignore[arg-type]
        count[0] += 1
        if count[0] == last:
            raise KeyboardInterrupt

    return interrupted


def test_cycles_make_the_learning_rates_of_one_schedule_with_restarts():
    whole = ScheduleOptions(epochs=12, batch_size=8, shape="cosine", cycles=3, floor=0.1)
    parts = [lr_factors(cycle_schedule(whole, cycle, 3), 5) for cycle in range(3)]
    assert [factor for part in parts for factor in part] == pytest.approx(lr_factors(whole, 5))


def test_snapshots_teach_as_an_ensemble():
    words = ["procedure=snapshot", "procedure.cycles=2", "teacher.schedule.epochs=4", *MLPS]
    out = train(*words)
    first, second, student = (result(stage) for stage in stages(out))
    assert first["last"]["epoch"] == second["last"]["epoch"] == 2
    members = student["teacher"]["members"]
    assert [m["weights"] for m in members] == [first["student"]["weights"], second["student"]["weights"]]
    figures = result(out)["figures"]
    assert figures["snapshot2/test/top1"] == second["last"]["test/top1"] and "recovered/test/top1" in figures


def test_self_distillation_is_an_ordinary_run():
    found = result(train("procedure=self_distillation", *ALONE[1:], "schedule.epochs=1", without=["teacher"]))
    assert found["teacher"]["name"] == "itself" and found["choices"]["loss"] == "pskd"
    assert "train/agreement" in found["last"]


def test_a_past_counts_steps_and_not_what_a_loss_asks_before_them(monkeypatch: pytest.MonkeyPatch):
    """A loss on features asks two images for their shapes: the past must still be taken at the start of an epoch."""
    asked, ask = [], PastSelf.__call__

    def noted(self: PastSelf, batch: Batch) -> Outputs:
        asked.append((self._calls, len(batch.input)))
        return ask(self, batch)

    monkeypatch.setattr(PastSelf, "__call__", noted)
    train("procedure=self_distillation", "loss=rkd", *ALONE[1:], "schedule.epochs=2", without=["teacher"])
    assert asked == [(0, 2), (0, 16), (1, 16), (2, 16), (0, 16), (1, 16), (2, 16)]  # 48 images, two epochs


def test_an_average_of_the_past_is_resumed(monkeypatch: pytest.MonkeyPatch):
    words = ["procedure=self_distillation", "procedure.past=average", "procedure.decay=0.5", *ALONE[1:]]
    whole = result(train(*words, "schedule.epochs=3", out="whole", without=["teacher"]))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", _fails_at(5))  # 48 images: the second step of the second epoch
        with pytest.raises(KeyboardInterrupt):
            train(*words, "schedule.epochs=3", out="cut", without=["teacher"])
    cut = result(train(*words, "schedule.epochs=3", out="cut", without=["teacher"]))
    assert cut["student"] == whole["student"] and cut["last"]["train/agreement"] == whole["last"]["train/agreement"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["procedure=self_distillation", "procedure.decay=1", "past=average"], ["procedure.decay", "(0, 1)"]),
        (["procedure=mutual", "procedure.peers=1"], ["procedure.peers = 1: must be in [2, 100]"]),
        (["procedure=mutual", "loss=ce"], ["loss", "ce", "kl"]),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], parts: list[str]):
    words = [word for word in words if not word.startswith("past")]
    message = refusal(*words, *ALONE[1:], without=["teacher"])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["procedure=snapshot", "procedure.cycles=3"], ["procedure.cycles", "3", "divisor", "2"]),
        (["procedure=snapshot", "procedure.cycles=2", "procedure.keep=1"], ["procedure.keep", "1"]),
        (["procedure=snapshot", "procedure.cycles=2", "teacher.checkpoint=a.pth"], ["checkpoint", "a.pth", "null"]),
        (["procedure=mutual", "teacher=mlp"], ["teacher", "mlp", "none"]),
        ([*META[:2], "loss=ce"], ["loss", "ce", "ban"]),
        ([*META[:2], "procedure.teacher_lr=0"], ["procedure.teacher_lr", "above 0"]),
    ],
)
def test_more_that_cannot_be(words: list[str], parts: list[str]):
    torch.save({"fc.bias": torch.zeros(1)}, "a.pth")  # what lies in the file is nobody's question yet
    message = refusal(*words, *MLPS)
    assert all(part in message for part in parts), message


def test_a_learning_teachers_checkpoint_that_was_removed_is_named():
    out = train(*META, out="meta")
    (stage,) = [path for path in (out / "stages").iterdir() if path.name.endswith("taught")]
    (out / "result.json").unlink(), (stage / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="its checkpoint is gone, which held the teacher"):
        train(*META, out="meta")
