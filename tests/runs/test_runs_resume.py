"""Killed at any moment, a run continues to the weights that it would have had."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdbench.engine.learner import Learner
from kdbench.runs import lifecycle
from tests.support.killing import KILLED, in_its_own_process
from tests.support.shell import kdbench, result, tiny, train

# Kills the process in its second epoch, or half-way through writing a checkpoint.
IN_AN_EPOCH = """
from tests.support.killing import kill_at
from tests.support.shell import train
kill_at(6, {folder!r})
train({words})
"""
IN_A_WRITE = """
import os, signal, torch
save, count = torch.save, [0]
def killed(state, file, *args):
    count[0] += 1
    if count[0] == 2:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file, *args)
torch.save = killed
from tests.support.shell import train
train('trainer.checkpoint_every=1', {words})
"""


@pytest.fixture
def uninterrupted() -> Path:
    return train("hydra.run.dir=whole")


def assert_same_run(folder: Path, other: Path) -> None:
    a, b = load_file(folder / "student.safetensors"), load_file(other / "student.safetensors")
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    assert result(folder)["student"]["weights"] == result(other)["student"]["weights"]
    lines = [(f / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for f in (folder, other)]
    assert len(lines[0]) == len(lines[1]) == 3
    assert [p.name for f in (folder, other) for p in f.rglob("*.tmp")] == []


@pytest.mark.parametrize(
    "code",
    [IN_AN_EPOCH.format(folder="cut", words="'hydra.run.dir=cut'"), IN_A_WRITE.format(words="'hydra.run.dir=cut'")],
    ids=["in an epoch", "in a checkpoint write"],
)
def test_a_killed_run_resumes_to_the_same_weights(uninterrupted, code):
    done = in_its_own_process(code)
    assert done.returncode == KILLED, done.stderr
    cut = Path("cut")
    assert not (cut / "result.json").exists() and (cut / "checkpoint.pt").exists()
    train("hydra.run.dir=cut")
    assert_same_run(uninterrupted, cut)


def test_a_resumed_run_keeps_no_damaged_file(uninterrupted, capsys):
    assert in_its_own_process(IN_AN_EPOCH.format(folder="cut", words="'hydra.run.dir=cut'")).returncode == KILLED
    best, rows = Path("cut/best.safetensors"), Path("cut/metrics.jsonl")
    whole = best.read_bytes()
    best.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    words = ["train", *tiny(), "hydra.run.dir=cut"]
    assert kdbench(*words) == 1
    assert "best.safetensors: damaged" in (err := capsys.readouterr().err) and "Delete it" in err
    best.write_bytes(whole)
    rows.write_text(rows.read_text().replace('"epoch": 1, "train/loss": ', '"epoch": 1, "train/loss": 1'))
    assert kdbench(*words) == 0 and "metrics.jsonl: line 1 is damaged or edited" in capsys.readouterr().out
    assert result(Path("cut"))["student"]["weights"] == result(uninterrupted)["student"]["weights"]


EVERYTHING = [
    "dataset.size=32", "dataset.n_test=16", "dataset/augment=deit",
    "+dataset/augment@dataset.teacher_augment=none", "dataset.mix.kind=both",
    "dataset.mix.alpha=0.8", "dataset.mix.probability=0.8", "schedule.repeats=3", "trainer.accumulate=2",
    "trainer.ema=0.99", "trainer.clip=1", "trainer.grad_checkpointing=true", "optimizer=deit",
    "optimizer@teacher.optimizer=sgd", "optimizer.layer_decay=0.75", "schedule.lr=0.001", "loss=deit", "student=timm",
    "student.name=test_vit", "+student.options.distilled=true", "+student.options.drop_path_rate=0.2",
    "+student.options.drop_rate=0.1", "teacher.schedule.epochs=1",
]  # fmt: skip


def test_a_transformers_whole_recipe_resumes_and_goes_side_by_side_to_the_last_bit(monkeypatch):
    """Every part at once: views, mixtures, repeats, parts of a batch, an average, layers, dropped paths, a token."""
    step, count = Learner.step, [0]

    def cut(self, *args):
        step(self, *args)
        count[0] += 1
        if count[0] == 5:  # in the second epoch of the student: 3 steps each
            raise KeyboardInterrupt

    whole = train(*EVERYTHING, "hydra.run.dir=whole")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", cut)
        assert kdbench("train", *tiny(), *EVERYTHING, "hydra.run.dir=cut") != 0
    assert Path("cut/checkpoint.pt").exists() and not Path("cut/result.json").exists()
    train(*EVERYTHING, "hydra.run.dir=cut")
    assert_same_run(whole, Path("cut"))
    side = ["-m", "seed=0,1", "hydra/launcher=cohort", "hydra.sweep.dir=sweep"]
    assert kdbench("train", *tiny(), *EVERYTHING, *side) == 0
    found = {result(path.parent)["student"]["weights"] for path in Path("sweep").rglob("result.json")}
    assert result(whole)["student"]["weights"] in found and len(found) == 2


def test_an_interrupted_teacher_continues(uninterrupted):
    teacher = Path(result(uninterrupted)["teacher"]["folder"])
    code = IN_AN_EPOCH.format(folder="other", words="'hydra.run.dir=cut', 'paths.teachers=other'")
    assert in_its_own_process(code).returncode == KILLED
    train("hydra.run.dir=cut", "paths.teachers=other")
    other = Path(result(Path("cut"))["teacher"]["folder"])
    assert other != teacher and other.name == teacher.name
    assert result(other)["student"]["weights"] == result(teacher)["student"]["weights"]
    assert_same_run(uninterrupted, Path("cut"))


def test_a_finished_run_is_shown_and_force_runs_it_again(capsys):
    folder = train("loss=ce", "teacher=none")
    finished = (folder / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    train("loss=ce", "teacher=none")
    assert (folder / "result.json").stat().st_mtime_ns == finished
    assert "force=true" in capsys.readouterr().out
    train("loss=ce", "teacher=none", "force=true")
    assert (folder / "result.json").stat().st_mtime_ns > finished


def test_a_folder_with_another_unfinished_run_is_refused(capsys):
    code = IN_AN_EPOCH.format(folder="run", words="'loss=ce', 'teacher=none'")
    assert in_its_own_process(code).returncode == KILLED
    assert kdbench("train", *tiny("teacher=none"), "hydra.run.dir=run", "loss=ce", "teacher=none", "seed=5") != 0
    shown = capsys.readouterr()
    assert "another configuration" in shown.err + shown.out


def test_a_lock_that_another_machine_may_not_see_is_doubted(tmp_path, caplog):
    start, old = tmp_path / "run.json", time.time() - 2 * lifecycle.RECENT
    for host, ago, doubted in ((socket.gethostname(), 0, 0), ("elsewhere", old, 0), ("elsewhere", 0, 1)):
        start.write_text(json.dumps({"host": host}))
        if ago:
            os.utime(start, (ago, ago))
        with lifecycle.only_here(tmp_path):
            pass
        assert len(caplog.records) == doubted, (host, ago)
    assert "elsewhere was at work here 0 s ago" in caplog.records[0].message
