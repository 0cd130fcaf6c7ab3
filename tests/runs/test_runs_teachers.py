"""Where a teacher may come from, and what is refused."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from kdbench.files import read_json
from kdbench.models.resnet import ResNet
from kdbench.runs.folder import read_info
from kdbench.teachers.live import freeze
from kdbench.types import ImageInfo
from tests.support.killing import PATHS
from tests.support.shell import TINY, kdbench, result, tiny, train


def test_a_teacher_is_trained_once_and_kept():
    first = result(train("hydra.run.dir=a"))["teacher"]
    log = Path(first["folder"]) / "metrics.jsonl"
    written = log.stat().st_mtime_ns
    second = result(train("hydra.run.dir=b", "loss.tau=2"))["teacher"]
    assert second == first and log.stat().st_mtime_ns == written
    assert {"test/top1", "val/top1", "weights", "parameters"} <= first.keys()
    other = result(train("hydra.run.dir=c", "teacher.seed=1"))["teacher"]
    assert other["folder"] != first["folder"] and other["weights"] != first["weights"]


def test_a_students_own_schedule_does_not_touch_the_teacher():
    first = result(train("hydra.run.dir=a"))["teacher"]["folder"]
    assert (
        result(train("hydra.run.dir=b", "schedule.epochs=1", "seed=3", "trainer.ema=0.9"))["teacher"]["folder"] == first
    )


def test_any_student_becomes_a_teacher_by_its_run_folder():
    first = train("hydra.run.dir=a", "student=mlp", "student.hidden=[16]")
    second = result(train("hydra.run.dir=b", "teacher.run=a"))
    assert second["teacher"]["weights"] == result(first)["student"]["weights"]
    assert second["teacher"]["name"] == "mlp" and second["teacher"]["folder"] == "a"


def test_a_run_folder_with_commas_in_its_name_needs_no_quotes():
    first = train("hydra.run.dir=a", "student=mlp", "student.hidden=[16]").rename("a,loss.tau=2")
    second = result(train("hydra.run.dir=b", f"teacher.run={first}"))
    assert second["teacher"]["weights"] == result(first)["student"]["weights"]
    assert second["teacher"]["folder"] == "a,loss.tau=2"


def test_a_checkpoint_of_another_tool_becomes_a_teacher():
    network = freeze(ResNet(depth=8, widths=[16, 16, 32, 64], num_classes=4, in_channels=3, image_size=8))
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 240}, "teacher.pth")
    got = result(train("teacher.checkpoint=teacher.pth"))["teacher"]
    assert got["folder"] == "teacher.pth"


def test_no_teacher():
    assert result(train("teacher=none", "loss=ce"))["teacher"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher=none", "loss=kl"], "needs|learns from"),
        (["teacher.checkpoint=missing.pth"], "missing.pth"),
        (["teacher.run=nowhere"], "nowhere"),
        (["teacher.run=empty"], "empty.*not a run folder"),
        (["teacher.checkpoint=text.pth"], "text.pth"),
        (["teacher.stop_epoch=99"], r"teacher\.stop_epoch = 99"),
        (["teacher.run=x", "teacher.checkpoint=y"], r"teacher\.checkpoint"),
        (["teacher.allow_chance=false", "teacher.optimizer.lr=0"], "guessing"),
    ],
)
def test_what_cannot_teach_is_refused_with_a_message(words, message, capsys):
    Path("empty").mkdir()
    Path("text.pth").write_text("hello", encoding="utf-8")
    assert kdbench("train", *tiny(*words), "hydra.run.dir=run", *words) != 0
    shown = capsys.readouterr()
    assert re.search(message, shown.err + shown.out), shown.err
    assert "Traceback" not in shown.err + shown.out


def test_parallel_runs_wait_for_one_training_of_their_teacher():
    code = "from tests.support.shell import train; train('hydra.run.dir=run{}', 'seed={}')"
    environment = {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    commands = [[sys.executable, "-c", code.format(i, i)] for i in range(2)]
    running = [subprocess.Popen(c, env=os.environ | environment, stdout=subprocess.PIPE, text=True) for c in commands]
    outputs = [p.communicate(timeout=300)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0]
    assert sum("trained now" in output for output in outputs) == 1
    folders = {result(Path(f"run{i}"))["teacher"]["folder"] for i in range(2)}
    assert len(folders) == 1


def test_a_network_with_a_foreign_head_is_refused(capsys):
    train("hydra.run.dir=a")
    assert kdbench("train", *TINY, "hydra.run.dir=b", "dataset.num_classes=5", "teacher.run=a") != 0
    assert "4 classes" in capsys.readouterr().err


def test_info_travels_with_the_run():
    folder = train("teacher=none", "loss=ce")
    kept = read_json(folder / "network.json")["info"]
    assert (
        read_info(kept) == ImageInfo(4, 3, 8) == read_info(list(kept.values()))
    )  # a list: as the first edition wrote it


def test_a_finished_teacher_in_a_store_that_may_not_be_written_is_used(monkeypatch):
    folder = train()
    store = Path(result(folder)["teacher"]["folder"])

    def refuse(self, *_arguments, **_options):
        raise OSError(errno.EROFS, "Read-only file system", str(self.lock_file))

    for lock in store.parent.glob("*.lock"):
        lock.unlink()
    real = FileLock.acquire
    beside = lambda self, *a, **k: (refuse if "teachers" in str(self.lock_file) else real)(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(FileLock, "acquire", beside)
    other = train("hydra.run.dir=other", "seed=1")
    assert result(other)["teacher"]["weights"] == result(folder)["teacher"]["weights"]
