"""Methods that ask more of a run than a loss: views side by side, terms apart, heads and memories of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdbench.cohort import Run, train_together
from kdbench.configure.naming import without_hydra
from kdbench.engine.learner import Learner
from kdbench.runs.stage import places_in_turn
from kdbench.tables.feed import TableTeacher
from tests.support.procedures import MLPS, TINY, composed, in_hydra, refusal, result, train

PAIRED = ["dataset/augment=weak_strong", "loss=crld"]
# Both views of an enumerable kind, so that a table can serve.
LISTED = [
    "dataset/augment=weak_strong", "loss=crld", "dataset.augment.parts=["
    "{_target_: kdbench.data.augment.views.CropFlip, pad: 1},{_target_: kdbench.data.augment.views.CropFlip, pad: 0}]",
]  # fmt: skip
SMALL = [*MLPS, "schedule.epochs=2"]
TURNED = ["dataset/augment=rotations", "loss.epochs=1"]
VIT = [
    f"{word}{who}{rest}"
    for who in ("teacher", "student")
    for word, rest in (("", "=deit_tiny_cifar"), ("+", ".options.depth=2"), ("+", ".options.embed_dim=12"))
]
# Where perceptrons would not do: what reads maps, and what reads tokens.
NETWORKS = {
    "hsakd": ["teacher=resnet8", "student=resnet8"], "fcfd": ["teacher=resnet8", "student=wrn_16_1"], "vitkd": VIT,
    "fitnet_hints": ["teacher=resnet8", "student=resnet8"], "wkd": ["teacher=resnet8", "student=mlp"],
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student.safetensors")


def assert_same(folder: Path, other: Path) -> None:
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_two_views_are_served_by_a_table_as_by_the_live_teacher(monkeypatch):
    asked: list[int] = []
    ask = TableTeacher.__call__
    monkeypatch.setattr(TableTeacher, "__call__", lambda self, one: asked.append(len(one.input)) or ask(self, one))
    live = train(*SMALL, *LISTED, "teacher.table=off", out="live", without=["dataset/augment"])
    assert not asked
    table = train(*SMALL, *LISTED, "teacher.table=on", out="table", without=["dataset/augment"])
    assert asked == [32] * 6  # 16 images twice
    assert_same(live, table)


def test_costs_of_the_training_images_are_the_same_beside_a_table_and_in_a_cohort():
    words = [*NETWORKS["wkd"], "loss=wkd", "loss.cost=cka", "schedule.epochs=1", "teacher.schedule.epochs=1"]
    live, table = (train(*words, f"teacher.table={state}", out=state) for state in ("off", "on"))
    assert_same(live, table)
    plain = train(*[word for word in words if "cka" not in word], "teacher.table=off", out="plain")
    assert any(not torch.equal(weights(live)[key], value) for key, value in weights(plain).items())
    assert_cohort_is_its_runs({"wkd": [*NETWORKS["wkd"], "loss.cost=cka"], "kl": NETWORKS["wkd"]}, [])


def test_training_images_in_turn_are_one_of_each_class_after_the_other():
    label = torch.tensor([2, 2, -1, 0, 0, 0, 2, 1, 1, -1])  # as folders hold them, class after class
    assert places_in_turn(label, 3).tolist() == [3, 7, 0, 4, 8, 1]
    assert places_in_turn(label, 4).tolist() == [], "a class without images"
    assert places_in_turn(torch.tensor([-1]), 2).tolist() == []


def test_costs_of_the_training_images_need_a_map():
    assert "file: the teacher has no stage that gives a map" in refusal(*MLPS, "loss=wkd", "loss.cost=cka")


@pytest.mark.parametrize("words", [["loss=crld"], ["loss=mlkd", "loss.views=2"]])
def test_a_loss_over_two_views_needs_them(words):
    said = refusal(*MLPS, *words)
    assert said.startswith("dataset/augment = Identity: must be weak_strong") and "compares 2 views" in said
    mixed = refusal(*MLPS, *PAIRED, "dataset.mix.kind=mixup", without=["dataset/augment"])
    assert mixed.startswith("dataset.mix.kind = mixup: must be none")


def test_an_optimizer_that_keeps_terms_apart_needs_its_terms():
    assert refusal(*MLPS, "optimizer=deepkd").startswith("loss = kl: must be one with the terms task, nckd, tckd")
    assert refusal(*MLPS, "optimizer=dot", "trainer.clip=1").startswith("trainer.clip = 1")


@pytest.mark.parametrize(
    "words",
    [
        ["loss=deepkd", "optimizer=deepkd"], ["loss=dhkd", "optimizer=aligned_sgd", "loss.hidden=8"],
        ["loss=kl", "optimizer=dot"], ["loss=pskd", "loss.as_published=true", "teacher=none"], PAIRED,
        [*TURNED, "loss=sskd"], [*TURNED, "loss=hsakd"], ["loss=fcfd"], ["loss=vitkd"],
        ["loss.epochs=1", "loss=fitnet_hints"], ["loss.cost=cka", "loss=wkd"],
    ],
    ids=["deepkd", "dhkd", "dot", "pskd", "crld", "sskd", "hsakd", "fcfd", "vitkd", "fitnet_hints", "wkd"],
)  # fmt: skip
def test_a_run_that_was_stopped_continues_to_the_last_bit(words, monkeypatch):
    from kdbench.engine.trainer import Member

    small = [*SMALL[len(MLPS) :], *NETWORKS.get(words[-1].removeprefix("loss="), MLPS)]
    taught = [word for word in small if not (word.startswith("teacher") and "teacher=none" in words)]
    after = 1 + ("loss.epochs=1" in words)  # past its first training
    views = any(word.startswith("dataset/augment") for word in words)
    typed, options = [*taught, *words], {"without": ["dataset/augment"] if views else []}
    whole = train(*typed, out="whole", **options)
    end, ended = Member.end_epoch, []

    def stop(self, *args):
        found = end(self, *args)
        ended.append(1)
        if len(ended) == after:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Member, "end_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*typed, out="cut", **options)
    monkeypatch.setattr(Member, "end_epoch", end)
    assert not (Path("cut") / "result.json").exists() and (Path("cut") / "checkpoint.pt").exists()
    assert_same(whole, train(*typed, out="cut", **options))


def test_several_teachers_weighted_by_sample_and_by_batch():
    ensemble = ["teacher=ensemble", "teacher.network=mlp", "teacher.members=[0,1]", *MLPS[2:]]
    for name in ("camkd", "aekd"):
        folder = train(*ensemble, f"loss={name}", out=name)
        assert 0 <= result(folder)["last"]["test/top1"] <= 1
    assert "of several teachers, and there is one: choose teacher=ensemble" in refusal(*MLPS, "loss=camkd")


def assert_cohort_is_its_runs(words: dict[str, list[str]], without: list[str]) -> None:
    """words: what each loss, by name, trains with."""

    def run(loss: str, outputs: str) -> Run:
        tiny = [word for word in TINY if word.split("=")[0] not in without]
        root = composed(*tiny, "schedule.epochs=1", "trainer.limit_steps=2", f"loss={loss}", *words[loss])
        return Run(without_hydra(root), Path(outputs) / loss, [], dict(root.hydra.runtime.choices))

    members, others = ([run(loss, outputs) for loss in words] for outputs in ("together", "alone"))
    with in_hydra():
        together = train_together(members)
        alone = [outcome for one in others for outcome in train_together([one])]
    assert together == alone and all(isinstance(value, float) for value in alone)
    for loss in words:
        assert_same(Path("together") / loss, Path("alone") / loss)


def test_a_cohort_of_ten_methods_is_ten_runs():
    """Twenty trainings, nine seconds: side by side none of them knows of the others."""
    losses = ("bkl", "revision", "rc", "ldrld", "hard", "deepkd", "dhkd", "mlkd", "wkd", "swap")
    assert_cohort_is_its_runs(dict.fromkeys(losses, MLPS), [])


@pytest.mark.parametrize(
    ("losses", "networks", "more"),
    [
        (("sskd", "hsakd"), NETWORKS["hsakd"], TURNED),
        (("fcfd", "fitnet_hints"), NETWORKS["hsakd"], []),
        (("vitkd", "kl"), VIT, []),
    ],
)  # fmt: skip
def test_a_cohort_of_methods_that_turn_images_or_look_into_networks_is_its_runs(losses, networks, more):
    first = {"fitnet_hints": ["loss.epochs=1"]}
    words = {loss: [*networks, *more, *first.get(loss, [])] for loss in losses}
    assert_cohort_is_its_runs(words, ["dataset/augment"] if more else [])


def test_a_cohort_killed_in_first_trainings_goes_on_to_what_its_runs_give(monkeypatch):
    """Killed in the first member's stage, and then in the third's."""
    names = [("ab", 0), ("ft", 1), ("fitnet_hints", 1)]
    few = ["loss.epochs=2", "schedule.epochs=1", "trainer.limit_steps=2", "dataset.n_test=16"]
    tiny = [*TINY, *NETWORKS["fitnet_hints"], *few, "teacher.schedule.epochs=1"]

    def runs(outputs: str) -> list[Run]:
        roots = [composed(*tiny, f"loss={loss}", f"seeds.init={seed}") for loss, seed in names]
        pairs = zip(roots, names, strict=True)
        return [
            Run(without_hydra(root), Path(outputs, f"{loss}-{seed}"), [], dict(root.hydra.runtime.choices))
            for root, (loss, seed) in pairs
        ]

    together, apart = runs("together"), runs("apart")
    with in_hydra():
        for loss in ("Boundaries", "Hint"):
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Learner, "step", stopped_in(loss, 3))
                train_together(together)
        cut = {str(path.parent.relative_to("together")) for path in Path("together").rglob("checkpoint.pt")}
        outcomes = train_together(together)
        assert outcomes == [outcome for one in apart for outcome in train_together([one])]
    assert cut == {"fitnet_hints-1/stages/1-first"}
    assert {str(path.parent.parent.parent) for path in Path("together").rglob("loss.safetensors")} == {
        f"together/{loss}-{seed}" for loss, seed in names
    }
    for loss, seed in names:
        for stage in (".", "stages/1-first"):
            assert_same(Path("together", f"{loss}-{seed}", stage), Path("apart", f"{loss}-{seed}", stage))


SUM = ["loss=sum", "loss.parts.kl.weights.distill=100", "loss.weights.crd=0"]


@pytest.mark.parametrize(
    ("words", "strong"),
    [
        (["loss=ttm"], " a smaller loss.weights.distill (45),"),
        (SUM, " a smaller loss.parts.kl.weights.distill (100),"),
        (["loss=kl"], ""),
    ],
    ids=["ttm", "sum", "kl"],
)
def test_a_loss_that_ruins_its_student_is_told_what_to_try(words, strong, caplog):
    tried = f"Try a smaller optimizer.lr,{strong} a longer schedule.warmup, or trainer.clip=1."
    assert tried in refusal(*MLPS, *words, "schedule.lr=1e15")
    if words == ["loss=ttm"]:  # finite, and at the end it guesses
        train(*MLPS, *words, "schedule.lr=0", out="guesses")
        said = [record.getMessage() for record in caplog.records][-1]
        assert said.startswith("mlp: ") and f" on test is no better than guessing. {tried}" in said


def stopped_in(loss: str, after: int) -> Callable[..., None]:
    """A learner's step that ends the process after so many steps under a loss."""
    take = Learner.step

    def step(self: Learner, *args: object) -> None:
        if type(self.distiller.loss).__name__ == loss and self.steps_done == after:
            raise KeyboardInterrupt
        take(self, *args)

    return step


def test_networks_that_cannot_be_entered_are_refused_by_name():
    said = refusal(*MLPS, "loss=fcfd")
    assert said.startswith("loss = fcfd: must be another here") and "student (MLP) does not allow" in said
    pair = ["teacher=vgg8", "student=resnet8", "loss=fcfd"]
    assert "as many of each network" in refusal(*pair)
    wrong = refusal(*pair, "loss.layers={student: [stage1, stage2], teacher: [stage1, stage2.pre]}")
    assert wrong.startswith("loss.layers.teacher = stage1: must be of those after which it may be entered")
