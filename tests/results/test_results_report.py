"""What a procedure's end looks like: its figures by set, its own tables, and nothing that the reader cannot use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdbench.results.report import in_a_line, show
from kdbench.results.result import NetworkResult, RunResult, StageResult

RESULT = RunResult(
    choices={}, config={}, student=NetworkResult("mlp", parameters=1200), formula="CE(y, s)",
    last={"epoch": 3.0, "test/top1": 0.5}, seconds=1.0, images_per_second=10.0, device="cpu",
    stages=[StageResult("1-a", student="mlp", metrics={"test/top1": 0.25})],
    figures={
        "fused/val/top1": 0.5, "fused/test/top1": 0.75, "fused/test/nll": 1.5, "gain/test/top1": None, "offset": 2.5
    },
    tables={"covering": [{"specialists": 0, "classes": ["a", "b"]}, {"specialists": 1, "relative_gain": -0.25}]},
)  # fmt: skip


def test_figures_and_tables(capsys):
    show(RESULT, Path("outputs/run"), already=False)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[4:8] == ["figure test val", "fused 75.00 % 50.00 %", "gain - -", "offset 2.5"]
    assert lines[8:11] == ["covering specialists classes relative_gain", "1 0 a, b -", "2 1 - -0.25"]
    assert not any("nll" in line for line in lines)


def closing(capsys) -> str:
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("outputs", ["outputs", "elsewhere/sweeps", "results"])
def test_the_closing_line_names_the_runs_own_outputs_folder(outputs, capsys):
    result = replace(RESULT, config={"paths.outputs": outputs})
    show(result, Path.cwd() / outputs / "runs" / "fake" / "a", already=False)
    assert closing(capsys) == f"next  kdbench compare {outputs}   |   tensorboard --logdir {outputs}"


def test_the_closing_line_of_a_run_by_itself_compares_it_with_nothing(capsys):
    show(replace(RESULT, config={"paths.outputs": "outputs"}), Path("elsewhere/a"), already=False)
    assert closing(capsys) == "next  kdbench evaluate elsewhere/a   |   tensorboard --logdir elsewhere/a"


def test_a_finished_point_of_a_sweep_is_one_line():
    line = in_a_line(replace(RESULT, last={"epoch": 3.0, "test/top1": 0.5, "val/top1": 0.25}), Path.cwd() / "outputs/a")
    assert line == "This run was finished before: 50.00 % on test, 25.00 % on val, in outputs/a"
