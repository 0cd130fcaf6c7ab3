"""teacher.table on the real command line: the weights of a live run, nothing computed twice, early refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kdbench.tables.feed import Filler
from kdbench.tables.file import LogitTable
from kdbench.teachers.live import LiveTeacher
from tests.support.shell import TINY, kdbench, result, train

SHORT = ["dataset.pad=1", "schedule.epochs=2"]  # 48 images with 18 views each, three steps an epoch


@pytest.fixture
def computed(monkeypatch):
    """How many entries were computed, and how many batches asked the live teacher, from here on."""
    counts = {"entries": 0, "batches": 0}
    compute, ask = Filler.compute, LiveTeacher.__call__

    def counted_compute(self, entries):
        counts["entries"] += len(entries)
        return compute(self, entries)

    def counted_ask(self, batch):
        counts["batches"] += 1
        return ask(self, batch)

    monkeypatch.setattr(Filler, "compute", counted_compute)
    monkeypatch.setattr(LiveTeacher, "__call__", counted_ask)
    return counts


def figures(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def test_a_table_gives_the_live_runs_weights_and_later_runs_compute_nothing(computed):
    live = train(*SHORT, "teacher.table=off", "hydra.run.dir=live")
    assert computed == {"entries": 0, "batches": 6}
    first = train(*SHORT, "teacher.table=on", "hydra.run.dir=first")
    assert 48 < computed["entries"] <= 96 and computed["batches"] == 6
    before = computed["entries"]
    second = train(*SHORT, "teacher.table=on", "hydra.run.dir=second", "loss.tau=2")
    assert computed == {"entries": before, "batches": 6}
    assert result(live)["student"] == result(first)["student"] != result(second)["student"]
    assert figures(live) == figures(first)
    tables = list(Path("outputs/teachers").rglob("*.table"))
    assert len(tables) == 1 and tables[0].parent.parent == Path(result(first)["teacher"]["folder"])


def test_a_run_that_was_stopped_goes_on_from_the_table(computed):
    whole = train(*SHORT, "teacher.table=on", "hydra.run.dir=whole", "schedule.epochs=3")
    before = computed["entries"]

    calls, find = [], LogitTable.find

    def stop(self, entries):
        calls.append(len(entries))
        if len(calls) == 3:  # of the third epoch, needed at its begin
            raise KeyboardInterrupt
        return find(self, entries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogitTable, "find", stop)
        words = [*TINY, *SHORT, "teacher.table=on", "hydra.run.dir=cut", "schedule.epochs=3"]
        assert kdbench("train", *words) == 130
    assert Path("cut/checkpoint.pt").exists()
    cut = train(*SHORT, "teacher.table=on", "hydra.run.dir=cut", "schedule.epochs=3")
    assert result(cut)["student"] == result(whole)["student"] and computed["entries"] == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["dataset.mix.kind=mixup"], "dataset.mix=mixup"),
        (["dataset/augment=rand_augment"], "the views of dataset.augment (Compose)"),
        (["loss=at"], "loss=at reads the teacher's features"),
    ],
)
def test_a_table_that_cannot_serve_is_refused_before_any_work(capfd, words, reason):
    assert kdbench("train", *TINY, "teacher.table=on", *words) == 1
    assert f"teacher.table = on: must be auto or off, since {reason}" in capfd.readouterr().err
    assert not Path("outputs/teachers").exists() and not list(Path().rglob("checkpoint.pt"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_says_what_it_chose_and_why(capfd, computed, precision):
    train(*SHORT, f"trainer.precision={precision}", "schedule.epochs=6", "hydra.run.dir=long")
    assert "logits from the table" in (said := capfd.readouterr().out) and "saves about" in said
    train(*SHORT, "dataset.mix.kind=mixup", "hydra.run.dir=mixed")
    assert "asked anew for every batch, no table (dataset.mix=mixup" in capfd.readouterr().out
    assert computed["entries"] and computed["batches"] == 6


def test_a_folder_that_cannot_be_written_is_no_obstacle(capfd):
    train(*SHORT, "teacher.table=off", "hydra.run.dir=first")
    (Path(result(Path("first"))["teacher"]["folder"]) / "tables").write_text("in the way")
    train(*SHORT, "schedule.epochs=6", "hydra.run.dir=long")
    assert "no table (its table cannot be kept" in capfd.readouterr().out
    words = [*TINY, *SHORT, "teacher.table=on", "hydra.run.dir=forced"]
    assert kdbench("train", *words) == 1 and "its table cannot be kept" in capfd.readouterr().err


def test_build_fills_a_table_and_info_lists_it(capfd, computed):
    words = ["table", "build", *TINY, *SHORT]
    assert kdbench(*words) == 0
    assert "864 entries, 864 of them computed now" in capfd.readouterr().out and computed["entries"] == 864
    assert kdbench("table", "build", "--config-dir", ".", *words[2:]) == 0
    assert "864 entries, 0 of them computed now" in capfd.readouterr().out
    train(*SHORT, "teacher.table=on")
    assert computed == {"entries": 864, "batches": 0} and not Path("outputs/runs").exists()
    capfd.readouterr()
    assert kdbench("table", "info") == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and "75.0 %" in lines[1] and "float32" in lines[1]
    os.truncate(next(Path("outputs").rglob("*.table")), 50)
    assert kdbench("table", "info") == 0 and "damaged" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", *TINY, "teacher=none"], "teacher = none: must be a network"),
        (["build", *TINY, "dataset.mix.kind=cutmix"], "teacher.table: none can be built, since dataset.mix=cutmix"),
        (["fill"], "kdbench table = fill: must be build or info"),
        (["info", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_what_table_cannot_do_is_said(capfd, words, message):
    if "teacher=none" in words:
        words = [word for word in words if not word.startswith("teacher.") and word != "teacher=resnet8"]
    assert kdbench("table", *words) == 1
    assert message in capfd.readouterr().err
