"""What a training costs is counted, shared by those that train side by side, and kept over a resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kdbench.engine import cost
from kdbench.results.result import read_result
from tests.support.shell import kdbench, result, train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """A machine with two processors that count their energy, the second one's cores apart."""
    for name, joules in (("intel-rapl:0", 5), ("intel-rapl:1", 7), ("intel-rapl:1:0", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{joules}000000\n")
    monkeypatch.setattr(cost, "_RAPL", tmp_path)
    cost._processors.cache_clear()
    yield
    cost._processors.cache_clear()


def test_energy_is_that_of_all_processors(tmp_path):
    assert cost.counters(CPU)["energy"] == 12
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("garbage")
    assert "energy" not in cost.counters(CPU)


def test_a_machine_that_does_not_tell_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "_RAPL", tmp_path / "nowhere")
    cost._processors.cache_clear()
    assert set(cost.counters(CPU)) == {"cpu_seconds"}


def test_students_side_by_side_share_and_a_counter_that_began_anew_says_nothing():
    before, after = {"cpu_seconds": 1.0, "energy": 50.0}, {"cpu_seconds": 3.0, "energy": 2.0}
    assert cost.spent(before, after, 4) == {"cpu_seconds": 0.5}
    first = cost.added(None, {"cpu_seconds": 1.0, "energy": 3.0})
    assert cost.added(first, {"cpu_seconds": 0.5}) == {"cpu_seconds": 1.5}
    assert cost.added({}, {"cpu_seconds": 0.5}) == {}, "the beginning is not known"


def test_a_run_keeps_what_it_cost_and_where_it_ran(monkeypatch):
    folder = train("teacher=none", "loss=ce", "schedule.epochs=2")
    found = result(folder)
    assert 0 < found["cost"]["cpu_seconds"] < 60 and found["cost"]["energy"] == 0
    assert found["student"]["flops"] > found["student"]["parameters"]
    if os.name == "posix":
        assert (read_result(folder).figure("cost/memory") or 0) > 50e6
    assert found["machine"]["host"] and found["machine"]["cores"] == os.cpu_count()


def test_a_procedures_cost_is_its_trainings(capsys):
    words = ["procedure=born_again", "procedure.generations=1", "loss=ban", "schedule.epochs=1"]
    whole = result(train(*words, "hydra.run.dir=run"))
    stages = [result(Path("run") / stage["folder"])["cost"]["cpu_seconds"] for stage in whole["stages"]]
    assert whole["cost"]["cpu_seconds"] == pytest.approx(sum(stages))
    capsys.readouterr()
    assert kdbench("compare", "run") == 0
    assert {"CPU", "MFLOPs"} <= {*capsys.readouterr().out.split()}
