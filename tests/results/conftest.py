"""`kdbench compare` through the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kdbench import cli
from tests.support.results import result, write


@pytest.fixture
def run_compare(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdbench", "compare", *map(str, arguments)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two temperatures with three seeds each, and one run of another loss."""
    for tau, tops in ((1, (0.90, 0.91, 0.95)), (4, (0.92, 0.93, 0.94))):
        for seed, top1 in enumerate(tops):
            write(tmp_path / "runs" / "digits" / f"kl-{tau}-{seed}", result(top1, loss__tau=tau, seed=seed))
    write(tmp_path / "runs" / "digits" / "dkd", result(0.935, choices={"loss": "dkd"}, loss__tau=2, loss__beta=8))
    return tmp_path / "runs"
