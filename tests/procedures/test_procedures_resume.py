"""Killed in a stage, a procedure goes on from there: finished stages are not touched, the weights are the same."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from kdbench.runs.series import _link
from tests.support.killing import KILLED, in_its_own_process
from tests.support.procedures import MLPS, refusal, result, stages, train

WORDS = [
    "procedure=born_again",
    "loss=dkpp",
    "procedure.generations=3",
    *MLPS,
    "schedule.epochs=3",
    "student.dropout=0.2",
]

# 48 training images in batches of 16: 3 steps an epoch. The teacher takes 6 steps, generation 1 nine; step 21 is in the
# second epoch of generation 2, whose checkpoint is the only one: a finished stage keeps none.
CUT = """
from tests.support.killing import kill_at
from tests.support.procedures import train
kill_at(21, "cut/stages/2-generation2")
train(*{words!r}, out="cut")
"""


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}


def test_killed_in_stage_two_of_three():
    whole = train(*WORDS, out="whole")
    Path("outputs/teachers").rename("kept")
    cut = Path("cut")
    killed = in_its_own_process(CUT.format(words=WORDS))
    assert killed.returncode == KILLED, killed.stderr
    first, second = stages(cut)
    assert (first / "result.json").exists() and not (second / "result.json").exists()
    assert not (cut / "result.json").exists()
    before = times(first)
    train(*WORDS, out="cut")
    assert times(first) == before
    ours, theirs = load_file(cut / "student.safetensors"), load_file(whole / "student.safetensors")
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert result(cut)["figures"] == result(whole)["figures"]
    before = times(cut)
    train(*WORDS, out="cut")
    assert times(cut) == before


def test_the_whole_and_each_stage_can_teach():
    out = train(*WORDS[:2], "procedure.generations=2", *MLPS)
    for folder in (out, stages(out)[0]):
        taught = result(train(*MLPS, f"teacher.run={folder}", out=f"taught-{folder.name}"))
        assert taught["teacher"]["weights"] == result(folder)["student"]["weights"]


def test_force_runs_all_stages_again():
    words = [*WORDS[:2], "procedure.generations=1", *MLPS]
    out = train(*words)
    before = times(stages(out)[0])
    train(*words, "force=true")
    after = times(stages(out)[0])
    assert all(after[name] > before[name] for name in ("result.json", "student.safetensors"))


def test_a_stage_of_another_configuration_is_not_taken_for_ones_own():
    words = [*WORDS[:2], "procedure.generations=1", *MLPS]
    out = train(*words)
    (out / "result.json").unlink()
    message = refusal(*words, "schedule.lr=0.03")
    assert message.startswith("run: ") and "another configuration (optimizer.lr 0.02 -> 0.03)" in message
    (out / "run.json").unlink()  # as the first edition left it
    message = refusal(*words, "schedule.lr=0.03")
    assert "1-generation1" in message and "another configuration" in message


def test_a_link_that_is_there_already_leaves_no_temporary_file(tmp_path):
    """A kill between the links and result.json: the next process makes them again."""
    (tmp_path / "stage").write_bytes(b"weights")
    for _ in range(2):
        _link(tmp_path / "stage", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stage", "whole"]
