"""Code that configurations name: its digests, without running it, and what a run folder may name."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from kdbench.arguments import Trust, trusting
from kdbench.arguments.code import UNSEEN, code_of, modules_of, sources
from kdbench.errors import UserError

FILES = {
    "pk/__init__.py": "from . import base\n",
    "pk/base.py": "import os, json\nimport torch\n",
    "pk/sub/__init__.py": "",
    "pk/sub/loss.py": "from ..base import json\n\ndef late():\n    import helper\n\nclass Mine: ...\n",
    "helper.py": "from kdbench.types import Outputs\n",
    "unused.py": "",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    def make(name: str, **changed: str) -> Path:
        for file, text in {**FILES, **changed}.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(sys, "path", [*[p for p in sys.path if str(tmp_path) not in p], str(tmp_path / name)])
        return tmp_path / name

    return make


def test_a_target_stands_on_its_module_its_packages_and_what_these_import_of_the_users(project):
    project("one")
    assert sorted(modules_of("pk.sub.loss.Mine")) == ["helper", "pk", "pk.base", "pk.sub", "pk.sub.loss"]


def test_the_place_and_line_ends_do_not_count_and_every_module_does(project):
    project("one")
    first = modules_of("pk.sub.loss.Mine")
    project("two", **{"helper.py": FILES["helper.py"].replace("\n", "\r\n")})
    assert modules_of("pk.sub.loss.Mine") == first
    for number, file in enumerate(("helper.py", "pk/base.py", "pk/__init__.py", "pk/sub/loss.py")):
        project(f"changed{number}", **{file: FILES[file] + "x = 1\n"})
        other = modules_of("pk.sub.loss.Mine")
        assert [name for name in first if first[name] != other[name]] == [
            file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        ]


def test_kdbenchs_own_pythons_own_and_what_is_no_target_have_none(project):
    project("one")
    for path in ("kdbench.losses.kl.KL", "collections.OrderedDict", "nowhere.Thing", "no path", "CE", ""):
        assert modules_of(path) == {}, path
    assert list(modules_of("omegaconf.OmegaConf")) == ["omegaconf"], "of an installed package its module alone"


def test_every_target_of_a_node_is_named_by_its_key(project):
    project("one")
    node = {
        "loss": {"_target_": "pk.sub.loss.Mine"},
        "dataset": {"reader": "helper.read", "augment": {"_target_": "kdbench.data.augment.views.Flip"}},
        "student": {"networks": ['{"_target_": "unused.Net"}']},
    }
    assert sorted(sources(node)) == [
        "dataset.reader helper.read",
        "loss pk.sub.loss.Mine",
        "student.networks unused.Net",
    ]


def test_no_module_is_run_to_be_found(project):
    project("one", **{"pk/__init__.py": "raise SystemExit\n"})
    assert "pk.sub.loss" in modules_of("pk.sub.loss.Mine") and "pk" not in sys.modules


def test_a_module_that_is_imported_counts_as_it_was_then(project, monkeypatch):
    place = project("one")
    before = modules_of("unused.Net")
    monkeypatch.setitem(sys.modules, "unused", types.ModuleType("unused"))
    monkeypatch.setattr(sys.modules["unused"], "__spec__", None)
    monkeypatch.delitem(sys.modules, "unused")
    __import__("unused")
    (place / "unused.py").write_text("class Net: ...\n")
    assert modules_of("unused.Net") == before, "what runs is the old code"
    monkeypatch.delitem(sys.modules, "unused")
    assert modules_of("unused.Net") != before


def test_a_class_typed_into_a_console_is_known_by_name_only(monkeypatch):
    module = types.ModuleType("console")
    exec("class Mine: ...", module.__dict__)
    module.Mine.__module__ = "console"
    monkeypatch.setitem(sys.modules, "console", module)
    assert modules_of("console.Mine") == {"console": UNSEEN} == code_of(module.Mine())


RESNET = "kdbench.models.resnet.ResNet"
FOREIGN = [
    {"_target_": "os.system", "command": "id"},
    {"_target_": "mine.Net"},
    {"_target_": RESNET, "options": {"x": [{"_target_": "os.system"}]}},
    {"_target_": "kdbench.data.load.load_bundle", "reader": "os.system"},
    {"_target_": "kdbench.data.load.os.system"},
    {"_target_": "kdbench.files.write_atomically"},
    {"_target_": "kdbench.runs.folder.clear", "folder": "/home"},
    {"_target_": "kdbench.runs.ensemble.ensemble_teacher"},
    {"_target_": ["os.system"]},
    {"_target_": "kdbench.models.timm.timm_model", "options": {"checkpoint_path": "evil.pth"}},
    {"_target_": "kdbench.procedures.mutual.peers_from", "networks": [json.dumps({"_target_": "os.system"})]},
    {"_target_": "kdbench.procedures.mutual.peers_from", "networks": [json.dumps([{"a": {"_target_": "os.system"}}])]},
]
OWN = [
    {"_target_": RESNET, "depth": 8},
    {"_target_": "kdbench.models.timm.timm_model", "name": "resnet10t", "options": {"drop_rate": 0.1}},
    {"_target_": "kdbench.data.load.load_bundle", "reader": "kdbench.data.readers.digits.digits", "augment": None},
    {"augment": {"_target_": "kdbench.data.views.CropFlip"}},  # as the first edition called it
    {"_target_": "kdbench.procedures.mutual.peers_from", "networks": [json.dumps({"_target_": RESNET})]},
    {"_target_": None, "name": "[a] name {that is} no JSON", "source": None},
]


@pytest.mark.parametrize("node", FOREIGN, ids=str)
def test_what_is_not_kdbenchs_own_is_refused_by_name_and_with_the_way_to_trust_it(node):
    with pytest.raises(UserError, match=r"^run/network.json: .* is not kdbench's own.*--trust.*--config-dir"):
        trusting().check(node, "run/network.json")
    Trust(None).check(node, "run/network.json")


@pytest.mark.parametrize("node", OWN, ids=str)
def test_what_kdbench_itself_would_write_passes(node):
    trusting().check(node, "run/network.json")


def test_what_the_users_own_configurations_name_is_trusted_and_no_more(tmp_path: Path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.yaml").write_text("_target_: mine.Net\nwidth: 3\n", encoding="utf-8")
    for trust in (trusting(tmp_path), trusting(nodes=[{"student": {"_target_": "mine.Net"}}])):
        trust.check({"_target_": "mine.Net"}, "x")
        with pytest.raises(UserError, match=r"mine\.Other"):
            trust.check({"_target_": "mine.Other"}, "x")
