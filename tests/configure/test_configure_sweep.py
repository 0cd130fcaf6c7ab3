"""Sweeps beside other processes, in Hydra's own layouts, and the folders that nobody else may touch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from filelock import FileLock
from omegaconf import OmegaConf, open_dict, read_write

from kdbench.commands import train
from kdbench.configure import sweep as sweeping
from kdbench.configure.sweep import refuse_many
from kdbench.errors import UserError
from kdbench.results.result import read_result
from kdbench.runs import lifecycle
from tests.support import together
from tests.support.procedures import composed
from tests.support.shell import kdbench

POINTS = [
    "dataset=fake", "dataset.n=32", "dataset.size=8", "teacher=none", "loss=ce", "student=mlp", "schedule.epochs=1",
    "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip


def results(below: str = "outputs") -> list[Path]:
    return sorted(Path(below).rglob("result.json"))


@pytest.mark.parametrize("launcher", ["basic", "cohort"])
def test_a_point_that_another_process_trains_is_waited_for(launcher, monkeypatch, capsys):
    assert kdbench("train", *POINTS, "seed=0") == 0
    (done,) = results()
    done.unlink()  # as if it were being trained
    lock = FileLock(done.parent / ".lock")
    lock.acquire()
    looks = []
    monkeypatch.setattr(sweeping.time, "sleep", lambda _: looks.append(len(results())) or lock.release())
    assert kdbench("train", "-m", *POINTS, f"hydra/launcher={launcher}", "seed=0,1,2") == 0
    captured = capsys.readouterr()
    assert looks == [2], "the others are trained first"
    assert len(results()) == 3 and "1 runs are being trained by another process" in captured.out
    assert "failed" not in captured.out + captured.err


def test_who_is_turned_away_touches_nothing(capsys):
    assert kdbench("train", *POINTS) == 0
    (done,) = results()
    done.unlink()
    before = {path: path.stat().st_ino for path in done.parent.iterdir()}
    with FileLock(done.parent / ".lock"):
        assert kdbench("train", *POINTS) == 1
    assert "another process is training here" in capsys.readouterr().err
    assert {path: path.stat().st_ino for path in done.parent.iterdir()} == before


def test_a_typed_folder_of_another_run_keeps_what_it_holds(capsys):
    assert kdbench("train", *POINTS, "hydra.run.dir=mine") == 0
    (done,) = results("mine")
    done.unlink()
    before = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    for words in (["seed=1", "hydra.run.dir=mine"], ["loss.tau=nope", "hydra.run.dir=mine"]):
        assert kdbench("train", *POINTS, *words) == 1
    assert kdbench("train", "-m", *POINTS, "seed=1", "hydra.sweep.dir=.", "hydra.sweep.subdir=mine") == 1
    after = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    log = Path("mine/train.log")
    assert after.pop(log).startswith(before.pop(log)) and after == before


@pytest.mark.parametrize("subdir", ["${hydra.job.num}", "${hydra.job.override_dirname}", "s${seed}"])
def test_hydras_own_layouts_of_a_sweep(subdir):
    words = ["hydra.sweep.dir=mine", f"hydra.sweep.subdir={subdir}", "seed=4,5"]
    assert kdbench("train", "-m", *POINTS, *words) == 0
    assert len(results("mine")) == 2 and not Path("outputs/runs").exists()


def test_each_sweep_keeps_its_own_files():
    for seeds in ("0,1", "1,2"):
        assert kdbench("train", "-m", *POINTS, f"seed={seeds}") == 0
    kept = sorted(Path("outputs/sweeps").glob("*/multirun.yaml"))
    assert len(kept) == 2 and [("seed=1,2" in file.read_text()) for file in kept].count(True) == 1
    assert len(results()) == 3 and not Path("outputs/runs/multirun.yaml").exists()


def test_paths_count_from_where_the_command_was_typed_with_chdir_too():
    assert kdbench("train", *POINTS, "hydra.job.chdir=true") == 0
    assert len(results()) == 1 and results()[0].is_relative_to("outputs/runs")
    assert not list(Path("outputs").rglob("outputs"))


def test_a_sweep_over_losses_of_an_experiment(capsys):
    words = [
        "experiment=kim2021_kl_small", "loss=ce,dkd", "teacher=none,resnet8", "student=mlp", "schedule.epochs=1",
        "teacher.schedule.epochs=1", "teacher.allow_chance=true", "trainer.progress=none", "trainer.limit_steps=1",
    ]  # fmt: skip
    assert kdbench("train", "-m", *words) == 1  # dkd without a teacher
    shown = capsys.readouterr()
    assert "1 of 4 runs failed" in shown.err and len(results("outputs/runs")) == 3
    assert shown.out.count("not the experiment's") == 1, "one line for all runs that leave the same keys out"


def test_a_run_alone_goes_on_in_a_cohort_and_the_other_way_round():
    assert kdbench("train", *POINTS, "seed=0") == 0
    (alone,) = results()
    alone.unlink()
    cohort = ["hydra/launcher=cohort", "seed=0,1"]
    assert kdbench("train", "-m", *POINTS, *cohort) == 0
    assert len(results()) == 2
    for file in results():
        file.unlink()
    assert kdbench("train", *POINTS, "seed=1") == 0
    assert kdbench("train", *POINTS, "seed=0") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.tau=range(1,10001)"], None),
        (["loss.tau=range(1,10001)", "seed=0,1"], "loss.tau = range(1,10001): must be fewer values: this sweep has 20"),
        (["loss.tau=range(0,1,1e-9)"], "must be fewer values: this sweep has 1,000,000,000 points, and 10,000 is"),
        (["loss.tau=range(3,1)"], "loss.tau = range(3,1): must be one value or more"),
        (["loss.tau=range(0,3,-1)"], "loss.tau = range(0,3,-1): must be one value or more"),
        (["loss.tau=range(0,3,0)"], "loss.tau = range(0,3,0): must be a range with a step that is a number"),
        (["loss.tau=1,2", "loss=glob(*)", "seed=3"], None),
    ],
)  # fmt: skip
def test_a_sweep_has_a_point_and_not_millions(words, said):
    if said is None:
        refuse_many(words)
        return
    with pytest.raises(UserError) as caught:
        refuse_many(words)
    assert said in str(caught.value)


def test_three_processes_on_one_sweep_train_each_point_once_though_one_is_killed(monkeypatch):
    words = ["student.hidden=[16]", "schedule.epochs=4", "trainer.checkpoint_every=1", "seed=0,1,2,3"]
    sweep = ["train", "-m", *POINTS, *words]
    assert kdbench(*sweep, "paths.outputs=alone") == 0
    begin = lifecycle._begin

    def noted(stages, teacher, closing):
        with open("trained", "a") as file:
            file.write("".join(f"{os.getpid()} {stage.folder.name}\n" for stage in stages))
        time.sleep(0.1)  # the others look meanwhile
        return begin(stages, teacher, closing)

    monkeypatch.setattr(lifecycle, "_begin", noted)
    monkeypatch.setattr(sweeping, "PAUSE", 0.05)
    begun = together.start(lambda: kdbench(*sweep), 3, strangers=True)
    deadline = time.monotonic() + 60
    while not list(Path("outputs").rglob("checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    first = int(Path("trained").read_text().split()[0])
    os.kill(first, signal.SIGKILL)
    ended = together.finish(begun)
    lived = [text for process, (code, text) in zip(begun, ended) if process.pid != first and code == 0]
    assert len(lived) == 2 and all("test top-1" in text for text in lived), ended  # the whole table, both
    lines = [line.split() for line in Path("trained").read_text().splitlines()]
    others = [name for process, name in lines if int(process) != first]
    assert len(others) == len({*others}), "a point is trained once"
    assert len({name for _, name in lines}) == 4
    ours, theirs = (
        {path.parent.name: read_result(path.parent) for path in results(top)} for top in ("outputs", "alone")
    )
    assert {name: run.student.weights for name, run in ours.items()} == {
        name: run.student.weights for name, run in theirs.items()
    }


@pytest.mark.parametrize(
    ("better", "typed", "expected"), [(1, "", "maximize"), (-1, "", "minimize"), (1, "minimize", "minimize")]
)
def test_a_sweeper_optimises_in_the_direction_that_is_better(better, typed, expected, caplog):
    words = [f"hydra.sweeper.direction={typed}"] if typed else []
    config = composed("dataset=fake")
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.sweeper = {"direction": typed or "minimize"}
        config.hydra.overrides.hydra = words
    found = sweeping.Sweep(None, better=lambda cfg: better).directed(config)
    assert found.hydra.sweeper.direction == expected
    assert config.hydra.sweeper.direction == (typed or "minimize"), "points are composed as before"
    assert bool(caplog.records) == bool(typed), "the worst is looked for only if that was typed, with a warning"


@pytest.mark.parametrize(("monitor", "better"), [("test/nll", -1), ("last", 1), ("seconds", -1), ("val/top1", 1)])
def test_what_is_better_follows_from_the_metric(monitor, better):
    assert train.better(OmegaConf.create({"monitor": monitor})) == better
