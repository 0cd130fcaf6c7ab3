"""Status: what folders say of runs that others train, and what is left of a sweep."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from kdbench.errors import UserError
from kdbench.results.status import note_failure, note_points, read_status
from tests.support.results import result, write
from tests.support.shell import processor_seconds


def begun(name: str, epochs_done: int = 0, epoch: int = 0, seconds: float = 0.0) -> Path:
    """A run of 10 epochs that was begun `seconds` before its last epoch, which was a moment ago."""
    folder = Path("outputs/runs/d", name)
    folder.mkdir(parents=True)
    start = {"host": "here", "process": 7, "epochs_done": epochs_done, "config": {"schedule.epochs": 10}}
    (folder / "run.json").write_text(json.dumps(start))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"epoch": e + 1}) + "\n" for e in range(epoch)))
    os.utime(folder / "run.json", (time.time() - seconds,) * 2)
    return folder


def test_every_state_and_what_is_left():
    write(Path("outputs/runs/d/finished"), result(0.9))
    at_work = begun("at-work", epoch=4, seconds=8)
    again = begun("again", epochs_done=4, epoch=6, seconds=4)
    begun("stopped", epoch=5, seconds=10)
    note_failure(begun("bad"), ValueError("no"))
    note_failure(Path("outputs/runs/d/never-begun"), ValueError("no"))
    with FileLock(at_work / ".lock"), FileLock(again / ".lock"):
        status = read_status([Path("outputs")])
    found = {point.folder.name: point for point in status.points}
    states = {name: point.state for name, point in found.items()}
    running = {"at-work": "running", "again": "running"}
    assert states == {**running, "finished": "done", "stopped": "stopped", "bad": "failed"}
    assert (found["at-work"].host, found["at-work"].process, found["at-work"].epochs) == ("here", 7, 10)
    assert found["at-work"].pace == pytest.approx(2, rel=0.1)
    assert found["at-work"].left == pytest.approx(12, rel=0.1)
    assert found["again"].left == pytest.approx(8, rel=0.1)
    assert found["bad"].message == "no"
    assert status.left == pytest.approx((12 + 8 + 5 * 2) / 2, rel=0.1)  # the stopped one has five epochs to go
    assert read_status([Path("outputs")]).left is None  # nobody is at work any more
    assert json.loads(json.dumps(status.as_json()))["running"] == 2


def test_points_of_a_sweep_that_have_not_begun_are_waiting_wherever_the_folder_is_moved():
    sweep, folders = (
        Path("outputs/sweeps/now"),
        [Path("outputs/runs/d/a").absolute(), Path("outputs/runs/d/b").absolute()],
    )
    sweep.mkdir(parents=True)
    note_points(sweep, folders[:1])
    note_points(sweep, folders)
    write(folders[0], result(0.9))
    Path("outputs").rename("elsewhere")
    status = read_status([Path("elsewhere")])
    assert [(point.folder.name, point.state) for point in status.points] == [("a", "done"), ("b", "waiting")]
    assert status.sweeps == 0
    with FileLock(Path("elsewhere/sweeps/now/.lock")):
        assert read_status([Path("elsewhere")]).sweeps == 1


def test_stages_of_a_procedure_and_teachers_in_training_are_told():
    whole = begun("chain")
    for number, epoch in ((1, 10), (2, 3)):
        stage = whole / "stages" / f"{number}-next"
        stage.mkdir(parents=True)
        (stage / "run.json").write_text(json.dumps({"config": {"schedule.epochs": 10}}))
        os.utime(stage / "run.json", (time.time() - 10 + number,) * 2)
        (stage / "metrics.jsonl").write_text(json.dumps({"epoch": epoch}) + "\n")
    teacher = Path("outputs/teachers/d/big-0")
    teacher.mkdir(parents=True)
    (teacher / "run.json").write_text('{"hash": "0"}')
    found = {point.folder.name: point for point in read_status([Path("outputs")]).points}
    assert (found["chain"].stage, found["chain"].epoch) == ("2-next", 3)
    assert found["big-0"].state == "stopped"


def test_damaged_files_and_a_folder_that_is_not_there():
    folder = begun("odd", epoch=2)
    (folder / "run.json").write_text("[1")
    (folder / "metrics.jsonl").write_bytes(b"\xff\n")
    Path("outputs/sweeps/x").mkdir(parents=True)
    Path("outputs/sweeps/x/points.json").write_text('{"points": 3}')
    (point,) = read_status([Path("outputs")]).points
    assert (point.state, point.epoch) == ("waiting", 0)
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        read_status([Path("nowhere")])


def test_a_thousand_runs_are_read_in_a_moment():
    for number in range(300):
        begun(f"run{number}", epoch=3)
    start = processor_seconds()
    assert len(read_status([Path("outputs")]).points) == 300
    assert processor_seconds() - start < 2
