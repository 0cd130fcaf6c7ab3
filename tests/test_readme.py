"""What the README shows works as it is written there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from kdbench import cli

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def kdbench(*words: str) -> int:
    before = sys.argv
    sys.argv = ["kdbench", *words]
    try:
        return cli.main()
    finally:
        sys.argv = before


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(b for b in blocks if containing in b)


def test_every_command_that_looks_at_runs_works():
    assert kdbench("train", "-m", "debug=smoke", "trainer.progress=none", "loss=kl,dkd") == 0
    folder = str(next(Path("outputs/runs").rglob("result.json")).parent)
    lines = re.findall(r"^kdbench (?:compare|evaluate|status)[^#\n]*", README, flags=re.MULTILINE)
    lines += re.findall(r"`(kdbench list[^`\n]*)`", README)
    assert len(lines) >= 9
    for line in lines:
        assert kdbench(*shlex.split(re.sub(r"\S+<[^>]*>", folder, line))[1:]) == 0, line


def test_a_loss_is_one_file_and_one_yaml(monkeypatch):
    Path("entropy_kd.py").write_text(block("python", "class EntropyKD"), encoding="utf-8")
    Path("my/loss").mkdir(parents=True)
    Path("my/loss/entropy_kd.yaml").write_text(block("yaml", "entropy_kd.EntropyKD"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    words = ["train", "--config-dir", "my", "debug=smoke", "loss=entropy_kd", "loss.power=2", "hydra.run.dir=run"]
    assert kdbench(*words) == 0
    result = (Path("run") / "result.json").read_text(encoding="utf-8")
    assert "0.5 CE(y, s) + 0.5 max(t)^2 CE(t, s)" in result.replace("2.0", "2")
    assert kdbench("train", "--config-dir", "my", "debug=smoke", "loss=entropy_kd", "loss.power=much") == 1


def test_the_tree_names_real_folders(repository):
    named = re.findall(r"^\| `([^`]+)`", README.split("## The tree")[1], flags=re.MULTILINE)
    assert len(named) >= 12 and all((repository / name).exists() for name in named)
