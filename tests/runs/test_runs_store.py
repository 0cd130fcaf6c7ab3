"""Stored teachers and tables of images that the first edition made are still used: their keys are the same bytes."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import torch
from torch import nn

from kdbench.runs import origin
from kdbench.tables import key as keys
from kdbench.tables.feed import Filler
from kdbench.tables.key import key_name, probe, table_key
from tests.support.procedures import result, train
from tests.support.tables import make_batches, make_data, make_live

WORDS = [
    "dataset=fake", "dataset.n=64", "dataset.n_test=48", "dataset.size=8", "dataset.channels=1",
    "dataset.num_classes=4", "dataset.validation=0.25", "dataset/augment=none", "schedule.epochs=2",
    "schedule.batch_size=16", "teacher=mlp", "teacher.hidden=[8]", "student=mlp", "student.hidden=[8]",
    "teacher.schedule.epochs=2", "teacher.schedule.batch_size=16", "teacher.allow_chance=true",
    "teacher.table=on", "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip


def any_machine(monkeypatch) -> None:
    """A table's key names the machine by the last bits of its arithmetic; here all machines are one."""
    monkeypatch.setattr(keys, "_arithmetic", lambda network, logits: {"device": "cpu", "numbers": "any"})


def test_a_store_folder_and_a_table_of_the_first_edition_are_used(monkeypatch):
    any_machine(monkeypatch)
    store = Path("outputs/teachers/fake")
    store.mkdir(parents=True)
    with tarfile.open(Path(__file__).parent / "first_edition.tar.gz") as archive:
        archive.extractall(store, filter="data")
    computed: list[int] = []
    monkeypatch.setattr(Filler, "compute", lambda self, entries: computed.append(len(entries)))
    teacher = result(train(*WORDS, plain=True))["teacher"]
    assert teacher["folder"] == str(store / "mlp-bea1bed7fc") and computed == []
    assert teacher["weights"] == "84f41b040c72a2fdd8d1654e4b51f99ee00bb6eb4652232b9b78c945b6877f14"
    assert [path.name for path in store.rglob("*.table")] == ["e634866353ce0142.table"]
    assert sorted(path.name for path in store.iterdir() if path.is_dir()) == ["mlp-bea1bed7fc"]


def test_the_key_of_a_stored_teacher_is_the_first_editions(monkeypatch):
    asked = []
    make = origin.store_key
    monkeypatch.setattr(origin, "store_key", lambda *given: asked.append(given) or make(*given))
    train(*WORDS, plain=True)
    network, spec, recipe, _ = asked[0]
    expected = "98fc028861a8dfcd4da47c319049b164955b9e4af89e146c835bb1842fe04238"
    assert make(network, spec, recipe, make_data()) == expected


def shown(norm: nn.BatchNorm2d) -> str:
    numbers = f"{norm.num_features}, eps={norm.eps}, momentum={norm.momentum}"
    return f"{numbers}, affine=True, bias=True, track_running_stats=True"


def test_the_key_of_a_table_is_the_first_editions(monkeypatch):
    any_machine(monkeypatch)
    monkeypatch.setattr(nn.BatchNorm2d, "extra_repr", shown)  # older torch shows no bias, and has keys of its own
    live, data = make_live(), make_data()
    key, shape = table_key(live, "weights", data, make_batches(data), "fp32")
    assert key_name(key) == "42918f3cdaf7006e" and shape == (300, 18, 5, torch.float32)
    assert json.loads(json.dumps(key))["images"].startswith("f249f7f45947b26d")
    images, _ = probe(live, data, make_batches(data))  # what `numbers` is computed from
    digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
    assert digest == "efe5bf73be4a5023dd80a3325dc6ff22fc9db305eedec6d26cc3d96558c17ac0"
