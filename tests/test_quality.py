"""The rules of the house, checked by the tools that know them: lint, types, floors."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path


def run(repository: Path, *command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff(repository):
    run(repository, "ruff", "check", "--no-cache", ".")


def test_mypy(repository, tmp_path):
    # As the oldest Python that kdbench runs on, so that names which it lacks are found; the annotations of a numpy for
    # 3.12 or newer cannot be read so.
    oldest = ["--python-version", "3.10"] if sys.version_info < (3, 12) else []
    run(repository, "mypy", "--cache-dir", str(tmp_path), *oldest)


def test_floors(repository):
    linter = Path(sys.executable).with_name("lint-imports")
    environment = os.environ | {"PYTHONPATH": str(repository)}
    done = subprocess.run([str(linter), "--no-cache"], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_functions_stay_short(repository):
    files = sorted((repository / "kdbench").rglob("*.py"))
    long = [f"{path.name}:{name} {lines}" for path in files for name, lines in _functions(path) if lines > 45]
    assert files and not long, long
