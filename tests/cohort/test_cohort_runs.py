"""hydra/launcher=cohort on the real command line: every run as it would be alone, whatever happens to the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hydra_plugins import kdbench_cohort

from kdbench.configure.launch import Sweep
from kdbench.engine import device, graph
from kdbench.engine.learner import Learner
from kdbench.runs import lifecycle as stages
from kdbench.tables.file import LogitTable
from kdbench.teachers.live import LiveTeacher
from tests.support.killing import KILLED, in_a_new_interpreter, in_its_own_process
from tests.support.shell import TINY, kdbench, result
from tests.support.tape import Tape

COHORT = "hydra/launcher=cohort"
STEPS = 6  # of a run: two epochs of three batches
SHORT = [*TINY, "schedule.epochs=2"]  # too short for a table: the live teacher is asked


def sweep(*words: str, outputs: str = "outputs") -> int:
    return kdbench("train", "-m", *SHORT, f"paths.outputs={outputs}", "paths.teachers=teachers", *words)


def runs(outputs: str = "outputs") -> dict[str, Path]:
    return {str(f.parent.relative_to(outputs)): f.parent for f in sorted(Path(outputs).rglob("result.json"))}


def numbers(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same_runs(outputs: str, others: str, count: int) -> None:
    mine, theirs = runs(outputs), runs(others)
    assert mine.keys() == theirs.keys() and len(mine) == count
    for name in mine:
        a, b = result(mine[name]), result(theirs[name])
        assert a["student"] == b["student"] and a["teacher"] == b["teacher"], name
        assert numbers(mine[name]) == numbers(theirs[name]), name
    assert len({result(folder)["student"]["weights"] for folder in mine.values()}) == count


@pytest.fixture
def asked(monkeypatch):
    """The number of images in each batch that the live teacher was asked about."""
    sizes: list[int] = []
    ask = LiveTeacher.__call__
    monkeypatch.setattr(LiveTeacher, "__call__", lambda self, batch: sizes.append(len(batch.input)) or ask(self, batch))
    return sizes


def test_networks_and_losses_of_any_kind_are_as_alone_each_with_its_own_files(asked, monkeypatch):
    values = []
    take = Sweep.take
    monkeypatch.setattr(Sweep, "take", lambda self, job: values.append(job._return_value) or take(self, job))
    words = ["student=resnet8,wrn_16_1", "loss=dkd,at", "hydra.output_subdir=.hydra"]  # AT reads features
    assert sweep(*words, COHORT, outputs="together") == 0
    assert [size for size in asked if size == 16] == [16] * STEPS  # AT also asks about two images, to see their shapes
    assert sweep(*words, outputs="solo") == 0
    assert_same_runs("together", "solo", 4)
    assert values[:4] == values[4:]  # what a sweeper optimises, in the order of the points
    for name, folder in runs("together").items():
        assert_same_files(folder, Path("solo") / name)
        loss, said = result(folder)["choices"]["loss"], (folder / "train.log").read_text()
        assert f"loss {loss}:" in said and said.count(": loss ") == 1 and "4 runs side by side" in said


def assert_same_files(folder: Path, other: Path) -> None:
    """A member's folder holds what a solo run's does; Hydra's own files say the same."""
    assert {p.name for p in folder.glob("[!e]*")} == {p.name for p in other.glob("[!e]*")}
    for file in ("config.yaml", "overrides.yaml"):
        mine, theirs = ((run / ".hydra" / file).read_text() for run in (folder, other))
        assert mine == theirs.replace("solo", "together")
    job = yaml.safe_load((folder / ".hydra/hydra.yaml").read_text())["hydra"]
    assert job["runtime"]["output_dir"] == str(folder.resolve()) and job["job"]["num"] in range(4)


def test_runs_of_other_data_seeds_share_one_open_table(asked, monkeypatch):
    opened = []
    init = LogitTable.__init__

    def counted(self, *arguments):
        opened.append(self)
        init(self, *arguments)

    monkeypatch.setattr(LogitTable, "__init__", counted)
    words = ["teacher.table=on", "seed=0,1"]
    assert sweep(*words, COHORT, outputs="together") == 0
    assert len(opened) == 1 and not asked
    assert sweep(*words, outputs="solo") == 0
    assert_same_runs("together", "solo", 2)


def test_finished_runs_are_not_run_again_and_cohorts_are_no_larger_than_asked(capfd, monkeypatch):
    sizes = []
    train_stages = stages.run_stages

    def counted(members, teacher):
        sizes.append(len(members))
        return train_stages(members, teacher)

    monkeypatch.setattr("kdbench.cohort.run_stages", counted)
    assert sweep("loss.tau=1", COHORT) == 0
    before = {name: (folder / "result.json").stat().st_mtime_ns for name, folder in runs().items()}
    assert sweep("loss.tau=1,2,3,4", COHORT, "hydra.launcher.max_members=2") == 0
    after = {name: (folder / "result.json").stat().st_mtime_ns for name, folder in runs().items()}
    assert sizes == [2, 1] and len(after) == 4 and before.items() <= after.items()
    assert capfd.readouterr().out.count("was finished before") == 1


def test_how_runs_go_is_said():
    assert kdbench_cohort._in_words([1, 1]) == ""
    assert kdbench_cohort._in_words([1, 4, 2]) == ": 4 + 2 on shared data, 1 by itself"
    assert kdbench_cohort._in_words([1, 1, 3]) == ": 3 on shared data, 2 by themselves"


def test_a_finished_sweep_is_shown_without_torch():
    alone = ["teacher=none", "loss=ce", "student=mlp", "schedule.epochs=1", "trainer.progress=none"]
    words = ["train", "-m", "dataset=fake", "dataset.n=32", "dataset.size=8", *alone, "seed=0,1", COHORT]
    assert kdbench(*words) == 0
    shown = in_a_new_interpreter(
        f"import sys; sys.argv = ['kdbench', *{words!r}]\n"
        "from kdbench import cli; assert cli.main() == 0; assert not {'torch', 'timm'} & set(sys.modules)"
    )
    assert shown.returncode == 0 and shown.stdout.count("was finished before") == 2, shown.stderr
    points = shown.stdout.partition("the same in all")[0].splitlines()
    assert len([line for line in points if line]) == 5, shown.stdout  # the launcher's, and two lines a point


def test_runs_that_fail_are_reported_and_the_others_are_as_alone(capfd, monkeypatch):
    update = Learner.update

    def broken(self, batch, teacher):
        if self.lr == 0.3:
            raise RuntimeError("no memory left for this one")
        update(self, batch, teacher)

    monkeypatch.setattr(Learner, "update", broken)
    assert sweep("optimizer.lr=0.05,1e15,0.3", COHORT, outputs="together") == 1
    error = capfd.readouterr().err
    assert "2 of 3 runs failed" in error and "no memory left for this one" in error
    assert "optimizer.lr=1000000000000000.0" in error and "not a finite number" in error
    assert sweep("optimizer.lr=0.05", outputs="solo") == 0
    assert_same_runs("together", "solo", 1)
    logs = [f.read_text() for f in Path("together").rglob("train.log")]
    assert sorted(("Traceback" in text and "Diverged" in text, "RuntimeError" in text) for text in logs) == [
        (False, False),
        (False, True),
        (True, False),
    ]


def test_runs_for_which_the_memory_is_too_small_go_on_with_fewer_beside_them(monkeypatch, caplog):
    update, failed = Learner.update, []

    def short(self, batch, teacher):
        if self.lr > 0.05 and failed.count(self.lr) < 2 and self.steps_done == 3:  # in the second epoch
            failed.append(self.lr)
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(self, batch, teacher)

    assert sweep("optimizer.lr=0.05,0.1,0.2", COHORT, outputs="solo") == 0
    monkeypatch.setattr(Learner, "update", short)
    assert sweep("optimizer.lr=0.05,0.1,0.2", COHORT, outputs="together") == 0
    assert sorted(failed) == [0.1, 0.1, 0.2, 0.2]  # together, then both again, then each alone
    assert_same_runs("together", "solo", 3)


def test_a_teacher_that_cannot_be_had_fails_every_run_with_its_reason(capfd):
    assert sweep("teacher.run=nowhere", "loss.tau=1,2", COHORT) == 1
    error = capfd.readouterr().err
    assert "2 of 2 runs failed" in error and error.count("nowhere: no such run folder") == 2


def test_points_that_cannot_be_are_found_before_a_teacher_is_trained(capfd):
    assert sweep("student=text_cnn_small", "loss.tau=1,2", COHORT) == 1
    captured = capfd.readouterr()
    assert "2 of 2 runs failed" in captured.err and "trained now" not in captured.out
    assert captured.err.count("student = text_cnn_small: must be") == 2 and not Path("teachers").exists()


# In the students' second epoch: after the teacher's 6 steps and an epoch of both.
CUT = """
from tests.support.killing import kill_at
from tests.cohort.test_cohort_runs import sweep, COHORT
kill_at(14, "cut", checkpoints=2)
sweep("loss.tau=1,2", COHORT, outputs="cut")
"""


def test_a_killed_cohort_goes_on_where_it_was(asked):
    done = in_its_own_process(CUT)
    assert done.returncode == KILLED, done.stderr
    cut = list(Path("cut").rglob("checkpoint.pt"))
    assert len(cut) == 2 and not runs("cut")
    cut[0].unlink()  # this one did not get so far
    assert sweep("loss.tau=1,2", COHORT, outputs="cut") == 0
    assert len(asked) == STEPS  # both epochs, for the one; the other joins in the second
    assert sweep("loss.tau=1,2", COHORT, outputs="whole") == 0
    assert_same_runs("cut", "whole", 2)


def test_a_recorded_cohort_has_the_runs_of_a_plain_one(monkeypatch, capfd):
    """On a GPU that has proven itself, by tapes. A recorded learning rate is float32, a plain one is not."""
    points = (COHORT, "loss=kl,dkd")
    assert sweep(*points, outputs="plain") == 0
    tapes: list[Tape] = []
    monkeypatch.setattr(graph, "recording", lambda function, _: tapes.append(Tape(function)) or tapes[-1])
    monkeypatch.setattr(device, "can_record", lambda _: True)
    monkeypatch.setattr(device, "proven", lambda _: True)
    assert sweep(*points, outputs="recorded") == 0
    assert len(tapes) == 1 and "not recorded" not in capfd.readouterr().err
    mine, theirs = runs("plain"), runs("recorded")
    assert mine.keys() == theirs.keys() and len(mine) == 2
    for name in mine:
        for one, other in zip(numbers(mine[name]), numbers(theirs[name]), strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5), name
