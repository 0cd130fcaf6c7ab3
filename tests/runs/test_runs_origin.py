"""Origins: what each one describes before it is had, and how another one is added."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.shell import TINY, kdbench, result, train

PLUGIN = '''
from dataclasses import dataclass

import torch

from kdbench.models.mlp import MLP
from kdbench.runs.obtain import measured
from kdbench.runs.recipe import NetworkSpec


@dataclass(frozen=True)
class Drawn:
    """A network of random weights."""

    width: int
    draw: int = 0

    def describe(self, catalogue):
        return NetworkSpec("drawn", {}, lambda info: MLP([self.width], **info._asdict()))

    def obtain(self, spec, recipe, data):
        torch.manual_seed(self.draw)
        return measured("drawn", self.describe(recipe.catalogue).make(data.info), None, recipe, data)
'''


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that choose an origin of the user's own: one file, and one YAML that names it."""
    Path("drawn.py").write_text(PLUGIN, encoding="utf-8")
    node = "defaults: [shared/base@_here_, _self_]\n_target_: drawn.Drawn\nwidth: 12\ndraw: 0\n"
    Path("conf/teacher").mkdir(parents=True)
    Path("conf/teacher/drawn.yaml").write_text(node, encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    tiny = [word for word in TINY if word != "teacher=resnet8"]
    return ["train", "--config-dir", "conf", *tiny, "teacher=drawn", "hydra.run.dir=run"]


def test_another_origin_is_one_file_and_one_yaml(drawn: list[str]):
    assert kdbench(*drawn, "teacher.width=10", "teacher.draw=3") == 0
    teacher = result(Path("run"))["teacher"]
    assert teacher["name"] == "drawn" and teacher["folder"] is None
    assert teacher["parameters"] == 3 * 64 * 10 + 10 + 10 * 4 + 4
    assert not Path("outputs/teachers/fake").exists(), "nothing was trained"


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("teacher.widht=3", ["teacher.widht", "width"]),
        ("teacher.width=wide", ["teacher.width", "wide"]),
        ("teacher.run=elsewhere", ["teacher.run = elsewhere", "null with teacher=drawn"]),
        ("teacher.checkpoint=file.pth", ["teacher.checkpoint = file.pth", "null with teacher=drawn"]),
    ],
)
def test_its_keys_are_checked_like_any(drawn: list[str], word: str, parts: list[str], capsys: pytest.CaptureFixture):
    assert kdbench(*drawn, word) != 0
    shown = capsys.readouterr().err
    assert all(part in shown for part in parts), shown
    assert not Path("run/result.json").exists()


def test_a_store_of_the_first_edition_is_used():
    """Its folder is named by all that the weights follow from; 0.1 called this teacher so."""
    assert Path(result(train())["teacher"]["folder"]).name == "resnet8-bc0b6b5145"


def test_a_run_that_is_no_teacher_is_refused_before_the_student_is_built(capsys: pytest.CaptureFixture):
    train("teacher=none", "loss=ce", "hydra.run.dir=unfinished", "schedule.epochs=1")
    Path("unfinished/student.safetensors").unlink()
    assert kdbench("train", *TINY, "teacher.run=unfinished", "hydra.run.dir=run") != 0
    assert "not finished" in capsys.readouterr().err
