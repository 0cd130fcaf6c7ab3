"""What a stranger's run folder may name: kdbench's own networks and datasets by their exact paths, nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdbench.arguments import Trust, trusting
from kdbench.errors import UserError

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
