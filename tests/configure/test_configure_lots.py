"""Lots: points of a sweep as cohorts in the jobs of other launchers and in the processes of several devices."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus

from kdbench.configure import sweep as sweeping
from kdbench.configure.lots import chunks, dealt, in_order
from tests.support import remote
from tests.support.shell import kdbench, result

POINTS = [
    "dataset=fake", "dataset.n=48", "dataset.size=8", "teacher=none", "loss=ce", "student=mlp", "student.hidden=[16]",
    "schedule.epochs=2", "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip
PLUGIN = "hydra_plugins.remote.RemoteLauncher"
REMOTE = f"hydra.launcher._target_={PLUGIN}"


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Plugins.instance().class_name_to_class, PLUGIN, remote.RemoteLauncher)
    monkeypatch.setattr(remote, "sent", [])


def weights(below: str) -> dict[str, str]:
    return {path.parent.name: result(path.parent)["student"]["weights"] for path in Path(below).rglob("result.json")}


def test_dealing_keeps_together_what_shares_batches_and_forgets_nothing():
    assert chunks([[0, 2, 4], [1]], 2) == [[0, 2], [4], [1]]
    assert dealt([[0, 1, 2, 3], [4]], 2) == [[0, 1], [2, 3, 4]] or dealt([[0, 1, 2, 3], [4]], 2) == [[0, 1, 4], [2, 3]]
    for groups in ([[0, 1, 2], [3], [4], [5, 6]], [[0]], [[i] for i in range(7)]):
        hands = dealt(groups, 3)
        assert sorted(i for hand in hands for i in hand) == sorted(i for group in groups for i in group)
        assert all(hands) and max(map(len, hands)) - min(map(len, hands)) <= 1 + (len(hands) < 3)


def test_a_job_that_fails_fails_all_points_of_its_lot():
    good = JobReturn(status=JobStatus.COMPLETED)
    good.return_value = [JobReturn(overrides=["seed=1"], status=JobStatus.COMPLETED)]
    bad = JobReturn(status=JobStatus.FAILED)
    bad.return_value = OSError("gone")
    ends = in_order([[1], [0, 2]], [good, bad], [["seed=0"], ["seed=1"], ["seed=2"]])
    assert [end.status for end in ends] == [JobStatus.FAILED, JobStatus.COMPLETED, JobStatus.FAILED]
    assert [end.overrides for end in ends] == [["seed=0"], ["seed=1"], ["seed=2"]]


def test_any_launchers_job_may_be_a_cohort(capsys):
    sweep = [*POINTS, "schedule.lr=0.1,0.2,0.4"]
    assert kdbench("train", "-m", *sweep, REMOTE, "+hydra.launcher.members=2") == 0
    said = capsys.readouterr().out
    assert remote.sent == [2]
    assert "3 runs as 2 cohorts of up to 2" in said and said.count("2 runs side by side") == 1
    assert kdbench("train", "-m", *sweep, "paths.outputs=alone") == 0
    assert weights("outputs") == weights("alone") and len(weights("alone")) == 3


def test_points_of_a_lot_fail_and_wait_by_themselves(monkeypatch, capsys):
    deep = [*POINTS, "student.hidden=[16,16,16,16]"]  # deep enough to diverge
    assert kdbench("train", *deep, "schedule.lr=0.2") == 0
    (done,) = Path("outputs").rglob("result.json")
    done.unlink()
    lock = FileLock(done.parent / ".lock")
    lock.acquire()
    monkeypatch.setattr(sweeping.time, "sleep", lambda _: lock.release())
    assert kdbench("train", "-m", *deep, REMOTE, "+hydra.launcher.members=8", "schedule.lr=0.1,0.2,1e15") == 1
    assert remote.sent == [1, 1]  # all, and the one that was busy
    assert len(weights("outputs")) == 2
    assert "1 of 3 runs failed" in capsys.readouterr().err


def test_where_members_have_no_place(capsys):
    cohort = "hydra/launcher=cohort"
    two, none, nowhere = "+hydra.launcher.members=2", "+hydra.launcher.members=0", "hydra.launcher.devices=[]"
    for words in ([two], [cohort, two], [REMOTE, none], [cohort, nowhere]):
        assert kdbench("train", "-m", *POINTS, "seed=0,1", *words) == 1
    said = capsys.readouterr().err
    assert "hydra.launcher.members = 2: must be left out of this launcher" in said
    assert "hydra.launcher.members = 2: must be given as hydra.launcher.max_members" in said
    assert "hydra.launcher.members = 0: must be a number of at least 1" in said
    assert "hydra.launcher.devices = []: must be null or a list of at least one device" in said
    assert not weights("outputs")


def test_a_process_for_each_device_shares_teacher_and_table(capfd):  # two that start anew: ten seconds
    taught = [word for word in POINTS if word not in ("teacher=none", "loss=ce")]
    taught += ["teacher=mlp", "teacher.hidden=[16]", "teacher.schedule.epochs=1", "teacher.allow_chance=true"]
    sweep = [*taught, "teacher.table=on", "loss.tau=1,2,4,8", "seed=0", "hydra/launcher=cohort"]
    assert kdbench("train", "-m", *sweep, "hydra.launcher.devices=[cpu,cpu]") == 0
    assert capfd.readouterr().out.count("2 runs side by side") == 2
    assert len(list(Path("outputs").rglob("*.table"))) == 1
    assert kdbench("train", "-m", *sweep, "paths.outputs=alone") == 0
    assert weights("outputs") == weights("alone") and len(weights("alone")) == 5  # the teacher's too
