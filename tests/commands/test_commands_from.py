"""`kdbench train --from RUN`: a run again from its folder, with changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdbench.commands.train import from_run
from kdbench.errors import UserError
from kdbench.results.result import read_result
from tests.support.shell import kdbench

SMOKE = ["debug=smoke", "teacher=none", "loss=ce", "trainer.progress=none"]


def folders() -> list[Path]:
    return sorted(path.parent for path in Path("outputs/runs").rglob("result.json"))


def test_a_run_again_is_the_same_run_and_with_a_change_another(capsys):
    assert kdbench("train", *SMOKE, "seed=1", "force=true") == 0
    (first,) = folders()
    assert kdbench("train", "--from", str(first)) == 0
    assert "This run was finished before" in capsys.readouterr().out
    assert kdbench("train", f"--from={first}", "seed=2", "loss.label_smoothing=0.1") == 0
    other = next(folder for folder in folders() if folder != first)
    before, after = read_result(first), read_result(other)
    assert (before.seed, after.seed) == (1, 2) and after.config["loss.label_smoothing"] == 0.1
    assert after.choices == before.choices and len(folders()) == 2
    assert kdbench("train", "-m", "--from", str(first), "seed=1,2,3", "loss.label_smoothing=0.1") == 0
    assert len(folders()) == 4


def run(overrides: list[str]) -> str:
    Path("run").mkdir(exist_ok=True)
    student = {"name": "x"}
    tree = {"choices": {}, "config": {}, "student": student, "last": {"epoch": 1}, "overrides": overrides}
    Path("run/result.json").write_text(json.dumps(tree))
    return "run"


def test_what_is_taken_over_and_what_is_not():
    words = ["loss=dkd", "loss.tau=2", "hydra.run.dir=x", "force=true", "teacher.trust=true", "seed=3", "paths.runs=y"]
    assert from_run(["--from", run(words), "student=resnet14"]) == (
        ["loss=dkd", "loss.tau=2", "seed=3"],
        ["student=resnet14"],
    )
    assert from_run(["--from", run(words), "loss=kl", "seed=1"]) == ([], ["loss=kl", "seed=1"])
    assert from_run(["loss=kl"]) == ([], ["loss=kl"])


@pytest.mark.parametrize(
    "word", ["loss._target_=os.system", "+student={_target_: os.system}", "dataset.reader=evil.read"]
)
def test_a_strangers_run_runs_nothing(word):
    with pytest.raises(UserError, match="not kdbench's own, and would be run"):
        from_run(["--from", run([word])])
    assert from_run(["--from", run([word]), "--trust"])[0] == [word]


def test_a_run_that_is_not_finished_is_refused(capsys):
    assert kdbench("train", "--from", "nowhere") == 1
    assert "--from = nowhere: must be the folder of a finished run" in capsys.readouterr().err
