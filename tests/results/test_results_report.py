"""What a procedure's end looks like: its figures by set, its own tables, and nothing that the reader cannot use."""

from __future__ import annotations

from pathlib import Path

from kdbench.results.report import show
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
