"""Which runs train together, and how many at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from kdbench.cohort import Run, plan, train_together
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.errors import UserError
from kdbench.runs import room
from kdbench.runs.room import Need, lots

TREE = {
    "dataset": {"name": "digits"},
    "teacher": {"depth": 20, "schedule": {"epochs": 3}},
    "student": {"depth": 8},
    "loss": {"tau": 4.0},
    "trainer": {"device": "cpu"},
    "schedule": {"batch_size": 64, "epochs": 30},
    "procedure": {"_target_": "kdbench.procedures.single.single"},
    "paths": {"teachers": "t"},
    "seeds": {"init": 0, "data": 0},
    "force": False,
}


def run(out: str, *changes: str, teacher: str = "resnet20") -> Run:
    cfg = OmegaConf.merge(OmegaConf.create(TREE), OmegaConf.from_dotlist(list(changes)))
    return Run(cfg, Path(out), [], {"teacher": teacher})  # type: ignore[arg-type]


def test_runs_that_share_data_and_teacher_go_together():
    points = [
        run("a"),
        run("b", "loss.tau=1"),
        run("c", "dataset.name=mnist"),
        run("d", "student.depth=14", "schedule.epochs=60", "seeds.data=3"),
        run("e", "schedule.batch_size=128"),
        run("f", "procedure._target_=kdbench.procedures.born_again.born_again"),
        run("g", "trainer.device=cuda"),
        run("h", "teacher.depth=56"),
        run("i", teacher="wrn_40_2"),
        run("j", "dataset.name=mnist", "loss.tau=2"),
        run("k", "procedure._target_=kdbench.procedures.born_again.born_again"),
        run("b", "loss.tau=1"),
    ]
    assert plan(points) == [[0, 1, 3], [2, 9], [4], [5], [6], [7], [8], [10], [11]]


@pytest.mark.parametrize(
    ("change", "teacher", "key"),
    [
        ("teacher.depth=56", "resnet20", "teacher"), ("loss.tau=1", "wrn_40_2", "teacher"),
        ("dataset.name=mnist", "resnet20", "dataset"), ("trainer.device=cuda", "resnet20", "trainer"),
        ("schedule.batch_size=128", "resnet20", "schedule.batch_size"), ("paths.teachers=u", "resnet20", "paths"),
    ],
)  # fmt: skip
def test_runs_that_share_no_teacher_are_refused_before_any_work(change, teacher, key, monkeypatch):
    """Whoever calls it without `plan` is not given the first run's teacher or data for all of them."""
    made: list[object] = []
    monkeypatch.setattr("kdbench.cohort.build.make_recipe", lambda *args: made.append(args))
    with pytest.raises(UserError) as refused:
        train_together([run("a"), run("c", "loss.tau=2"), run("b", change, teacher=teacher)])
    assert str(refused.value) == f"{key} = that of b: must be that of a: runs side by side share it" and not made


def test_runs_of_another_procedure_are_not_trained_as_single():
    with pytest.raises(UserError, match=r"^procedure = .*born_again.*: must be single for runs side by side \(b\)"):
        train_together([run("a"), run("b", "procedure._target_=kdbench.procedures.born_again.born_again")])


def test_a_finished_run_goes_by_itself_unless_it_is_forced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/result.json").write_text("{}")
    points = [run(str(tmp_path / name)) for name in "abc"]
    assert plan(points) == [[0], [1, 2]]
    forced = [run(str(tmp_path / name), "force=true") for name in "abc"]
    assert plan(forced) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("needs", "free", "size", "expected"),
    [
        ([(10, 50)] * 4, 100, 9, [(0, 4)]),  # steps follow each other: only one counts
        ([(10, 50)] * 6, 100, 9, [(0, 5), (5, 6)]),
        ([(10, 50)] * 6, 100, 2, [(0, 2), (2, 4), (4, 6)]),
        ([(10, 20), (10, 85), (10, 20)], 100, 9, [(0, 1), (1, 2), (2, 3)]),
        ([(200, 10), (10, 10), (10, 10)], 100, 9, [(0, 1), (1, 3)]),  # what does not fit at all is tried alone
        ([(10, 10)], 5, 9, [(0, 1)]),
    ],
)
def test_lots_fit_into_memory(needs, free, size, expected):
    assert list(lots([Need(*need) for need in needs], free, size)) == expected


@pytest.mark.parametrize(
    ("free", "recorded", "expected"), [(100, False, [4]), (230, True, [2, 2]), (229, True, [1, 1, 1, 1])]
)
def test_the_steps_of_recorded_students_keep_their_memory(monkeypatch, free, recorded, expected):
    """A recording holds its step's activations for good, so that they add up, and at first there are three copies of
    each student: 90 each, and 50 for the copy that takes its step."""
    monkeypatch.setattr(room, "place", lambda options: SimpleNamespace(device=torch.device("cuda:0")))
    monkeypatch.setattr(room, "measure", lambda *_: Need(10, 50))
    monkeypatch.setattr(room, "wants_graph", lambda *_: recorded)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free / 0.8 + 0.1, 999))  # of which 0.8 are used
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert [len(lot) for lot in room.parts([stage()] * 4, None)] == expected


def stage(depth: int = 8, tau: float = 4.0, lr: float = 0.1, seed: int = 0) -> SimpleNamespace:
    student, loss = SimpleNamespace(config={"depth": depth}), SimpleNamespace(name="kl", config={"tau": tau})
    options = {"optimizer": OptimizerOptions("sgd", lr), "trainer": TrainerOptions(), "seeds": seed}
    return SimpleNamespace(recipe=SimpleNamespace(student=student, loss=loss, **options))


def test_students_that_need_the_same_memory_are_measured_once(monkeypatch):
    """Each measurement takes a second: a minute for the 64 seeds of a sweep."""
    measured: list[int] = []

    def measure(one, *_) -> Need:
        measured.append(one.recipe.student.config["depth"])
        return Need(one.recipe.student.config["depth"], 0)

    monkeypatch.setattr(room, "place", lambda options: SimpleNamespace(device=torch.device("cuda:0")))
    monkeypatch.setattr(room, "measure", measure)
    monkeypatch.setattr(room, "wants_graph", lambda *_: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 200))  # of which 40 are used
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    stages = [stage(8), stage(8, lr=0.05), stage(8, seed=1), stage(20), stage(20, seed=1), stage(8, tau=2.0)]
    assert [len(lot) for lot in room.parts(stages, None)] == [3, 2, 1]
    assert measured == [8, 20, 8]
