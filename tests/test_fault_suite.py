"""The fault suite finds what it looks for, and its short form finds nothing in kdbench."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killing import PATHS, REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "fault_suite"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture(scope="module")
def faults():
    """The module of the scenarios, which has what the others define."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("fault_suite.scenario")


@pytest.fixture
def scenario(faults, tmp_path):
    """A scenario whose undisturbed run left a row, weights and a text, as far as rounds can tell."""
    one = faults.Scenario.__new__(faults.Scenario)
    one.name, one.words, one.place, one.seed = "made-up", ["train"], tmp_path, 0
    one.seconds, one.changes, one.tally = 2.0, 100, faults.Tally(faults.Counter(), [])
    one.expected = {"outputs/a/metrics.jsonl": [1, 2, 3], "outputs/a/student.safetensors": "aa"}
    return one


def test_what_is_lost_what_is_wrong_and_what_is_left_over_is_told_apart(faults, scenario, tmp_path, monkeypatch):
    """A command that loses a row, one that ends with other numbers, one that says nothing to a user: all are seen."""
    kept = scenario.expected
    cases = [
        (kept, 0, "", (0, 0, 0)),
        ({**kept, "outputs/a/metrics.jsonl": [1, 2]}, 0, "", (1, 0, 0)),
        ({"outputs/a/metrics.jsonl": [1, 2, 3]}, 0, "", (1, 0, 0)),
        ({**kept, "outputs/a/student.safetensors": "ab"}, 0, "", (0, 1, 0)),
        ({**kept, "outputs/a/another": "x"}, 0, "", (0, 1, 0)),
        ({**kept, "outputs/a/.x.1.tmp": "a leftover"}, 0, "", (0, 0, 1)),
        (kept, 1, "kdbench: unexpected KeyError: 'a'", (1, 1, 0)),
    ]
    for number, (found, code, text, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        scenario.tally = faults.Tally(faults.Counter(), [])
        ended = faults.Ended(code, text)
        monkeypatch.setattr(faults, "Process", lambda *_, ended=ended: type("P", (), {"wait": lambda self: ended})())
        monkeypatch.setattr(faults, "state", lambda _, found=found: found)
        scenario.end(folder)
        counts = scenario.tally.counts
        assert (counts["lost"], counts["wrong"], counts["leftovers"]) == expected, scenario.tally.faults


def test_the_state_of_a_folder_is_its_files_without_times_and_places(faults, tmp_path):
    def made(name: str, seconds: float, **changed: str) -> dict[str, object]:
        folder = tmp_path / name
        (folder / "a" / ".hydra").mkdir(parents=True)
        (folder / "a" / ".hydra" / "config.yaml").write_text(name)
        (folder / "a" / "train.log").write_text(name)
        (folder / "a" / "result.json").write_text(json.dumps({"seconds": seconds, "folder": f"{folder}/a"}))
        (folder / "a" / "metrics.jsonl").write_text(changed.get("rows", '{"epoch": 1, "x": NaN}\n'))
        (folder / "a" / "student.safetensors").write_bytes(b"abc")
        return faults.state(folder)

    first = made("one", 1.0)
    assert first == made("two", 2.0) and len(first) == 3
    assert made("three", 1.0, rows='{"epoch": 1, "x": 2}\n') != first
    assert "damaged" in str(made("four", 1.0, rows='{"epoch"'))


def test_the_plan_of_a_round_follows_from_the_seed(faults, scenario, tmp_path, monkeypatch):
    """The same rounds again, in any order, have the same kills; they fall anywhere in a life, by both clocks."""
    plans = []
    monkeypatch.setattr(scenario, "killed", lambda folder, chance: plans.append(scenario.moment(chance)))
    for number in [*range(200), *reversed(range(200))]:
        monkeypatch.setattr(scenario, "fresh", lambda name: tmp_path)
        scenario.round("killed", number)
    assert plans[:200] == plans[:199:-1]
    times = [moment.seconds for moment in plans if moment.seconds is not None]
    changes = [moment.change for moment in plans if moment.change is not None]
    assert min(times) < 0.1 and max(times) > 1.9 and min(changes) < 5 and max(changes) > 95
    assert 70 < len(times) / 2 < 130 and len(set(plans)) > 150


def test_a_process_dies_at_its_moment(faults, tmp_path, monkeypatch):
    def work() -> int:
        for i in range(40):
            Path(f"file{i}").write_text("x")
        while sum(os.times()[:2]) < 20:
            pass
        return 0

    monkeypatch.setattr(sys.modules["fault_suite.process"].cli, "main", work)
    before = faults.Process(["train"], tmp_path, faults.Moment(change=7)).wait()
    assert before.code == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 7
    later = faults.Process(["train"], tmp_path, faults.Moment(seconds=0.2)).wait()
    assert later.code == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 40


def test_damage_changes_a_file(faults, tmp_path):
    whole, chance = bytes(range(256)) * 40, random.Random(0)
    for i in range(40):
        (tmp_path / "f").write_bytes(whole)
        faults.damage(tmp_path / "f", chance)
        assert (tmp_path / "f").read_bytes() != whole, i


def test_the_short_form_finds_nothing(tmp_path):
    """A teacher, its table and a student: four kills, a full disk, a damaged file and a crowd, in forked processes."""
    words = [sys.executable, str(SCRIPT), "--short", "--keep", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = next(line for line in done.stdout.splitlines() if line.startswith("| all |")).split("|")[2:-1]
    kills, _, *others = map(int, counts)
    assert kills >= 4 and others == [1, 1, 1, 0, 0, 0]
