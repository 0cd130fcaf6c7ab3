"""`kdbench compare` through the command line."""

from __future__ import annotations

import sys

import pytest

from kdbench import cli


@pytest.fixture
def run_compare(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdbench", "compare", *map(str, arguments)])
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
