"""Typed keys that change nothing are said, once, and only where no run of a sweep reads them."""

from __future__ import annotations

import pytest

import kdbench
from kdbench.configure.idle import idle, tell_idle
from tests.support.shell import kdbench as kdbench_command


def said(*words: str) -> set[str]:
    return idle(kdbench.compose(words), words)


@pytest.mark.parametrize(
    ("words", "key", "why"),
    [
        (["teacher=none", "teacher.schedule.epochs=7"], "teacher.schedule.epochs", "with teacher=none"),
        (["teacher.run=outputs/x", "teacher.seed=1"], "teacher.seed", "with teacher.run, which is not trained"),
        (["teacher.checkpoint=x.pt", "teacher.schedule.lr=1"], "teacher.schedule.lr", "with teacher.checkpoint, which"),
        (["dataset.mix.alpha=0.2"], "dataset.mix.alpha", "with dataset.mix.kind=none"),
        (["dataset.noise.any_class=true"], "dataset.noise.any_class", "with dataset.noise.kind=none"),
        (["+schedule.gamma=0.2"], "schedule.gamma", "with schedule.shape=cosine"),
        (["schedule=step", "+schedule.floor=0.1"], "schedule.floor", "with schedule.shape=step"),
        (["+teacher.schedule.milestones=[3]"], "teacher.schedule.milestones", "with teacher.schedule.shape=cosine"),
        (["schedule.warmup=0", "schedule.warmup_from=0.1"], "schedule.warmup_from", "without schedule.warmup"),
        (["dataset=fake", "dataset.validation=0", "dataset.split_seed=3"], "dataset.split_seed", "without dataset.val"),
        (["optimizer=adamw", "schedule.lr=0.1"], "schedule.lr", "with optimizer adamw, which takes none from the s"),
        (["teacher.optimizer.lr=0.2", "teacher.schedule.lr=0.1"], "teacher.schedule.lr", "with teacher.optimizer sgd"),
        (["optimizer=adamw", "schedule.nesterov=true"], "schedule.nesterov", "with optimizer adamw"),
        (["dataset.noise.kind=symmetric"], "dataset.noise.kind", "with dataset.noise.rate=0"),
        (["dataset.root=photos"], "dataset.root", "with dataset digits, which reads no file of yours"),
    ],
)
def test_a_typed_key_that_nothing_reads_is_said(words, key, why):
    (sentence,) = said(*words)
    assert sentence.startswith(f"{key}: changes nothing {why}")


@pytest.mark.parametrize(
    "words",
    [
        ["teacher=none", "loss=ce", "debug=smoke"],
        ["teacher.seed=1", "teacher.schedule.epochs=3", "dataset.mix.kind=mixup", "dataset.mix.alpha=0.2"],
        ["teacher.checkpoint=x.pt", "teacher.finetune=true", "teacher.schedule.epochs=3"],
        ["teacher.run=x", "procedure=meta_pseudo_labels", "teacher.optimizer.lr=0.1"],
        ["schedule.lr=0.1", "teacher.schedule.lr=0.1", "dataset=imagefolder", "dataset.root=photos"],
        ["schedule=step", "schedule.gamma=0.2", "dataset.noise.kind=symmetric", "dataset.noise.rate=0.2"],
    ],
)
def test_what_counts_is_not(words):
    assert said(*words) == set()


def test_a_learning_rate_that_falls_after_the_end_is_said():
    """schedule=crd240 schedule.epochs=60 trained at one rate throughout, without a word."""
    (late,) = said("schedule=crd240", "schedule.epochs=60")
    assert late.startswith("schedule.milestones: 150, 180, 210 after the training's end (schedule.epochs=60), so the")
    (late,) = said("schedule=crd240", "teacher.schedule.epochs=180")
    assert late.startswith("teacher.schedule.milestones: 180, 210 after the training's end (teacher.schedule.epochs=")
    assert not said("schedule=crd240") | said("schedule=step", "schedule.epochs=4")
    assert not said("schedule=crd240", "debug=smoke")


def test_of_a_sweep_what_no_run_reads(caplog):
    with caplog.at_level("WARNING"):
        tell_idle([{"a: changes nothing", "b: changes nothing"}, {"b: changes nothing"}])
        tell_idle([])
    assert [record.getMessage() for record in caplog.records] == ["b: changes nothing"]


def test_a_run_says_it_and_goes_on(capsys):
    words = ["debug=smoke", "teacher=none", "loss=ce", "trainer.progress=none", "dataset.mix.alpha=0.2"]
    assert kdbench_command("train", *words) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("dataset.mix.alpha: changes nothing with dataset.mix.kind=none") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.finetune=true"], "teacher.finetune = true: must be false with teacher=none"),
        (["teacher.checkpoint=x.pt"], "teacher.checkpoint = x.pt: must be null with teacher=none"),
        (["teacher.run=x"], "teacher.run = x: must be null with teacher=none"),
    ],
)
def test_where_a_teacher_comes_from_without_one_is_refused(words, message, capsys):
    assert kdbench_command("train", "teacher=none", "loss=ce", *words) == 1
    shown = capsys.readouterr()
    assert message in shown.err and "changes nothing" not in shown.out + shown.err
