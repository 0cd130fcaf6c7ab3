"""The fault suite finds what it looks for."""

from __future__ import annotations

import importlib.util
import random
import sys

import pytest

from tests.support.killing import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "fault_suite.py"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("fault_suite", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fault_suite"] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_lost_and_what_is_wrong_is_told_apart(faults, tmp_path, monkeypatch):
    """A command that loses a row, and one that ends with other numbers: both are seen."""
    kept = {"outputs/a/metrics.jsonl": [1, 2, 3], "outputs/a/student.safetensors": "aa"}
    cases = [
        (kept, 0, "", (0, 0)),
        ({**kept, "outputs/a/metrics.jsonl": [1, 2]}, 0, "", (1, 0)),
        ({"outputs/a/metrics.jsonl": [1, 2, 3]}, 0, "", (1, 0)),
        ({**kept, "outputs/a/student.safetensors": "ab"}, 0, "", (0, 1)),
        ({**kept, "outputs/a/.x.1.tmp": "a leftover"}, 0, "", (0, 1)),
        (kept, 1, "kdbench: unexpected KeyError: 'a'", (1, 1)),
    ]
    for number, (found, code, text, expected) in enumerate(cases):
        one = faults.Scenario.__new__(faults.Scenario)
        one.name, one.words, one.expected = "made up", [], kept
        one.tally = faults.Tally(faults.Counter(), [])
        folder = tmp_path / str(number)
        folder.mkdir()
        ended = faults.Ended(code, text)
        monkeypatch.setattr(faults, "Process", lambda *_, ended=ended: type("P", (), {"wait": lambda self: ended})())
        monkeypatch.setattr(faults, "state", lambda _, found=found: found)
        one.end(folder, "killed")
        assert (one.tally.counts["lost"], one.tally.counts["wrong"]) == expected, one.tally.faults


def test_damage_changes_a_file(faults, tmp_path):
    whole, chance = bytes(range(256)) * 40, random.Random(0)
    for i in range(40):
        (tmp_path / "f").write_bytes(whole)
        faults.damage(tmp_path / "f", chance)
        assert (tmp_path / "f").read_bytes() != whole, i
