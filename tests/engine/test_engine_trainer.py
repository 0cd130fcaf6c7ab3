"""Resume equals uninterrupted, a cohort equals its solo runs, and a diverging member stops alone."""

import contextlib
from pathlib import Path

import pytest
import torch

from kdbench.engine import checkpoint, trainer
from kdbench.engine.checkpoint import Checkpoints, resume_epoch
from kdbench.engine.device import place
from kdbench.engine.evaluate import Evaluator, evaluating
from kdbench.engine.learner import Learner
from kdbench.engine.log import ProgressView, RunLog
from kdbench.engine.options import TrainerOptions
from kdbench.engine.trainer import Diverged, Member, fit
from kdbench.errors import UserError
from kdbench.teachers.constant import NoTeacher
from kdbench.teachers.live import LiveTeacher
from tests.support.engine import Evaluation, SmallNet, Stream, make_learner

SILENT = NoTeacher()

OPTIONS = TrainerOptions(device="cpu", progress="none")


def member(folder: Path, trainer: TrainerOptions = OPTIONS, **kwargs) -> Member:
    epochs_done, state = resume_epoch(folder)
    learner = make_learner(trainer=trainer, **kwargs)
    evaluator = Evaluator({"val": Evaluation(), "test": Evaluation()}, {})
    made = Member(learner, evaluator, Checkpoints(folder), RunLog(folder, epochs_done), 3)
    if state:
        made.restore(state)
    return made


def train(members: list[Member], until: int = 3, teacher=SILENT, stream: Stream | None = None) -> None:
    fit(members, stream or Stream(), teacher, until, ProgressView("test", 9, 0, 8, "none"))
    for one in members:
        one.log.close()


def weights(one: Member) -> dict[str, torch.Tensor]:
    return one.learner.distiller.state_dict()


def assert_equal(one: Member, other: Member) -> None:
    for (name, a), (_, b) in zip(weights(one).items(), weights(other).items(), strict=True):
        assert torch.equal(a, b), name
    assert one.last["train/loss"] == other.last["train/loss"]


def make_teacher() -> LiveTeacher:
    torch.manual_seed(9)
    return LiveTeacher(SmallNet(), 8, place(OPTIONS).autocast)


@pytest.mark.parametrize(
    "extra", [{}, {"ema": 0.9, "clip": 0.5}, {"ema": 0.9, "accumulate": 3}], ids=["plain", "ema+clip", "parts"]
)
def test_a_resumed_training_has_the_same_weights_to_the_last_bit(tmp_path, extra):
    options = TrainerOptions(device="cpu", progress="none", **extra)
    whole = member(tmp_path / "whole", options)
    train([whole])
    train([member(tmp_path / "cut", options)], until=1)
    torch.rand(5)  # whatever another process state would have drawn
    cut = member(tmp_path / "cut", options)
    assert cut.epochs_done == 1
    train([cut])
    assert_equal(whole, cut)
    assert (tmp_path / "whole/metrics.jsonl").read_text().count("\n") == 3
    if "ema" in extra:
        for a, b in zip(whole.learner.network.parameters(), cut.learner.network.parameters(), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(
            next(whole.learner.network.parameters()), next(whole.learner.distiller.student.parameters())
        )


@pytest.mark.parametrize(
    ("every", "seconds", "stopped", "expected"),
    [
        ("auto", 4.0, None, [3, 6, 8]),  # and at the end of a stage
        ("auto", 4.0, 5, [3, 4]),  # and on the way out: no whole epoch is lost
        ("auto", 11.0, None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 11.0, None, [3, 6]),
    ],
    ids=["fast", "stopped", "slow", "by epochs"],
)
def test_checkpoints_of_fast_epochs_are_written_by_time(tmp_path, monkeypatch, every, seconds, stopped, expected):
    now, written = [0.0], {}

    class Timed(Stream):
        def epoch(self, epoch, epochs):
            if epoch + 1 == stopped:
                raise KeyboardInterrupt
            yield from super().epoch(epoch, epochs)
            now[0] += seconds

    def note(path: Path, state) -> None:
        written.setdefault(path.parent.name, []).append(state["epochs_done"])
        assert state["best"] is None or (path.parent / "best.safetensors").exists()
        save(path, state)

    save = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", note)
    monkeypatch.setattr(trainer, "Writer", lambda: checkpoint.Writer(lambda: now[0]))
    both = [member(tmp_path / name, epochs=9, seed=seed) for seed, name in enumerate("ab")]
    for one in both:
        one.epochs, one.checkpoints = 9, Checkpoints(one.checkpoints.folder, every)
    with pytest.raises(KeyboardInterrupt) if stopped else contextlib.nullcontext():
        train(both, until=8, stream=Timed())
    assert written == {"a": expected, "b": expected}
    assert resume_epoch(tmp_path / "b")[0] == expected[-1]


def test_a_cohort_member_has_the_numbers_of_its_solo_run(tmp_path):
    settings = [{"seed": 0}, {"seed": 1, "distill": 0.3}, {"seed": 2, "lr": 0.01, "name": "adamw"}]
    together = [member(tmp_path / f"c{i}", **kwargs) for i, kwargs in enumerate(settings)]
    train(together, teacher=make_teacher())
    for i, kwargs in enumerate(settings):
        alone = member(tmp_path / f"s{i}", **kwargs)
        train([alone], teacher=make_teacher())
        assert_equal(together[i], alone)


def test_a_cohort_killed_between_two_members_checkpoints_catches_up(tmp_path):
    whole = [member(tmp_path / f"w{i}", seed=i) for i in range(2)]
    train(whole)
    train([member(tmp_path / "a", seed=0)], until=2)
    train([member(tmp_path / "b", seed=1)], until=1)
    resumed = [member(tmp_path / "a", seed=0), member(tmp_path / "b", seed=1)]
    assert [m.epochs_done for m in resumed] == [2, 1]
    train(resumed)
    for a, b in zip(whole, resumed, strict=True):
        assert_equal(a, b)


def test_a_diverging_member_is_left_out_and_the_other_goes_on(tmp_path):
    good, bad = member(tmp_path / "good"), member(tmp_path / "bad", lr=1e15)
    train([good, bad])
    assert good.learner.failure is None and good.epochs_done == 3
    assert isinstance(bad.learner.failure, Diverged) and bad.epochs_done == 0
    assert "epoch 1" in str(bad.learner.failure) and "trainer.clip" in str(bad.learner.failure)
    alone = member(tmp_path / "alone")
    train([alone])
    assert_equal(good, alone)


def test_best_epoch_is_chosen_on_validation(tmp_path):
    one = member(tmp_path / "run")
    train([one])
    assert one.best is not None
    scores = [float(line.split('"val/top1": ')[1].split(",")[0]) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert one.best["val/top1"] == max(scores) and one.best["epoch"] == scores.index(max(scores)) + 1
    assert (tmp_path / "run/best.safetensors").exists()


def test_training_learns(tmp_path):
    one = member(tmp_path / "run", lr=0.1)
    train([one], stream=Stream())
    assert one.last["train/loss"] < 1.2 and one.last["train/top1"] > 0.4


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"checkpoint\.pt.*force=true"):
        resume_epoch(tmp_path)


def test_evaluation_leaves_the_mode_that_was_there():
    network = SmallNet().train()
    with evaluating(network):
        assert not network.training and not torch.is_grad_enabled()
    assert network.training
    network.eval()
    with evaluating(network):
        pass
    assert not network.training


def test_a_live_teacher_gives_an_image_the_same_bits_whatever_the_batch():
    teacher = make_teacher()
    image = torch.randn(19, 1, 6, 6)
    whole = teacher.outputs(image)
    assert whole.logits.shape == (19, 3) and whole.features["pooled"].shape == (19, 4)
    for size in (1, 3, 8, 11):
        assert torch.equal(teacher.outputs(image[:size]).logits, whole.logits[:size])
    assert not any(p.requires_grad for p in teacher.network.parameters()) and not teacher.network.training


def test_a_network_that_its_last_step_ruined_has_diverged(tmp_path, monkeypatch):
    """The loss of that step was finite, and no other was to come: it ended with an accuracy of chance."""
    update = Learner.update

    def ruin(self, batch, teacher):
        update(self, batch, teacher)
        torch.nn.init.constant_(self.distiller.student.fc.weight, torch.inf)

    monkeypatch.setattr(Learner, "update", ruin)
    ruined, stream = member(tmp_path), Stream(size=8)
    ruined.epochs = 1
    train([ruined], until=1, stream=stream)
    assert isinstance(ruined.learner.failure, Diverged) and ruined.epochs_done == 0
    assert "val set is not a number after epoch 1" in str(ruined.learner.failure)
