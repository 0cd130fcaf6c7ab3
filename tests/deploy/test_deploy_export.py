"""Exported students answer as the network does, in programs that know nothing of kdbench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from kdbench.arguments import Trust, trusting
from kdbench.deploy import export as exporting
from kdbench.deploy.export import export, read_back, refuse_fixed
from kdbench.deploy.latency import latencies, size_of
from kdbench.deploy.student import load
from kdbench.errors import UserError
from kdbench.results.read import LATENCY, latency
from kdbench.results.result import read_result
from tests.support.shell import kdbench

# What somebody writes who has only the file, numpy, Pillow and onnxruntime.
STRANGER = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
classes, size = json.loads(about["classes"]), json.loads(about["info"])["image_size"]
for path in sys.argv[2:]:
    image = np.asarray(Image.open(path).convert("RGB").resize((size, size)), np.float32) / 255
    logits = session.run(None, {"input": image.transpose(2, 0, 1)[None]})[0]
    print(classes[int(logits.argmax())])
assert "kdbench" not in sys.modules and "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(photo_run, tmp_path_factory) -> Path:
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    words = ["--onnx", "--pt2", "--torchscript", "--safetensors", "--int8", "--out", str(folder)]
    assert kdbench("export", str(photo_run), *words) == 0
    return folder


def test_every_file_answers_as_the_network(exported, photo_run):
    student = load(photo_run)
    inputs = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = student.portable()(inputs)
        for ending in (".onnx", ".pt2", ".torchscript.pt"):
            run = read_back(exported / f"resnet8{ending}")
            assert run is not None
            assert torch.allclose(run(inputs), expected, atol=1e-4), ending
            assert run(inputs[:1]).shape == (1, 2)


def test_onnx_says_how_it_is_used_and_a_stranger_can(exported, photos):
    reds, blues = sorted((photos / "red").iterdir())[:5], sorted((photos / "blue").iterdir())[:5]
    command = [sys.executable, "-c", STRANGER, str(exported / "resnet8.onnx"), *map(str, reds + blues)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["red"] * 5 + ["blue"] * 5


def test_the_record_names_classes_and_int8_says_what_it_costs(exported):
    record = json.loads((exported / "export.json").read_text())
    assert record["classes"] == ["blue", "red"] and record["resize"] == 20 and record["size"] == 16
    assert "test inputs" in record["checked on"]
    int8 = next(one for one in record["files"] if one["path"].endswith("int8.onnx"))
    assert all(0.5 <= share <= 1 for share in int8["accuracy"]) and int8["difference"] > 0
    assert int8["bytes"] < (exported / "resnet8.onnx").stat().st_size
    with safe_open(str(exported / "resnet8.safetensors"), "pt") as file:
        about = json.loads(file.metadata()["kdbench"])
    assert about["classes"] == ["blue", "red"] and len(about["mean"]) == 3 and about["network"] == "resnet8"


def test_a_file_that_answers_differently_is_removed(photo_run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "read_back", lambda path: lambda inputs: torch.zeros(len(inputs), 2))
    with pytest.raises(UserError, match="was not kept"):
        export(load(photo_run), ["torchscript"], tmp_path, trusting())
    assert not list(tmp_path.iterdir())


class Counted(torch.nn.Module):
    """A network that takes only as many inputs as the first time: `len` makes a number of what an exporter follows."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs).logits + torch.zeros(1, 2).expand(int(inputs.shape[0]), 2)


@pytest.mark.parametrize("name", ["pt2", "torchscript"])
def test_a_network_for_one_number_of_inputs_is_refused(name, photo_run, tmp_path, monkeypatch):
    student = load(photo_run)
    monkeypatch.setattr(type(student), "portable", lambda own: Counted(own.network).eval())
    with pytest.raises(UserError, match=rf"^--{name}: resnet8 cannot be exported for any number of inputs: .*x.shape"):
        export(student, [name], tmp_path, trusting())
    assert not list(tmp_path.iterdir())


class Plain(torch.nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs * 2


def test_a_program_for_one_number_of_inputs_is_known_by_its_shapes():
    """Torch 2.7 exports what later versions refuse to: the program itself says whether its batch has a fixed size."""
    example, shapes = (torch.zeros(2, 3),), {"inputs": {0: torch.export.Dim("batch", min=1)}}
    refuse_fixed(torch.export.export(Plain(), example, dynamic_shapes=shapes))
    with pytest.raises(ValueError, match="it is made for 2 inputs at a time"):
        refuse_fixed(torch.export.export(Plain(), example))


def test_without_its_data_a_student_is_checked_on_made_up_inputs(photo_run, tmp_path):
    done = export(load(photo_run), ["torchscript"], tmp_path, Trust(frozenset()))
    assert done[0].difference == 0
    assert "made-up inputs" in (tmp_path / "export.json").read_text()
    pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match="--int8: its accuracy is measured on the run's own data"):
        export(load(photo_run), [], tmp_path, Trust(frozenset()), int8=True)


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "config.yaml").write_text("")
    assert kdbench("export", str(tmp_path)) == 1
    assert "pip install 'kdbench[export]'" in capsys.readouterr().err


def test_latency_and_size(photo_run, capsys):
    student = load(photo_run)
    found = latencies(student, [1, 4], 0.01)
    assert [(one.way, one.batch) for one in found[:2]] == [("torch", 1), ("torch", 4)]
    assert all(0 < one.spread[0] <= one.milliseconds <= one.spread[1] for one in found)
    size = size_of(student)
    assert size.bytes >= 4 * size.parameters and size.flops > 0
    assert kdbench("bench", "--latency", str(photo_run), "--batch", "2", "--seconds", "0.05", "--json", "l.json") == 0
    assert "inputs a second" in capsys.readouterr().out
    assert json.loads(Path("l.json").read_text())["latency"][0]["batch"] == 2
    weights = read_result(photo_run).student.weights
    assert not (photo_run / LATENCY).exists()  # no figure of one input
    assert kdbench("bench", "--latency", str(photo_run), "--batch", "1,2", "--seconds", "0.05") == 0
    assert latency(photo_run, weights) > 0 and latency(photo_run, "of others") is None
    assert kdbench("bench", "--latency", str(photo_run), "--batch", "2", "--seconds", "0.05") == 0
    assert latency(photo_run, weights) > 0  # kept


def test_a_latency_that_cannot_be_kept_is_shown(photo_run, capsys, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("kdbench.commands.bench.write_json", full)
    assert kdbench("bench", "--latency", str(photo_run), "--batch", "1", "--seconds", "0.05") == 0
    out, err = capsys.readouterr()
    assert "inputs a second" in out and "not kept beside the run" in err


def test_a_timm_student_and_vectors_are_exported_too(tmp_path):
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    rows = np.random.default_rng(0).normal(size=(60, 4)).round(4)
    text = "\n".join(",".join(map(str, (*row, int(row[0] > 0)))) for row in rows)
    Path("table.csv").write_text(f"a,b,c,d,label\n{text}\n")
    smoke = ["schedule.epochs=2", "trainer.progress=none", "teacher=none", "loss=ce"]
    vectors = ["dataset=tensors", "dataset.root=table.csv", "student=mlp_128"]
    assert kdbench("train", *smoke, *vectors, "hydra.run.dir=vectors") == 0
    assert kdbench("export", "vectors", "--onnx") == 0
    assert kdbench("predict", "vectors", "table.csv", "--csv", "p.csv") == 0
    assert len(Path("p.csv").read_text().splitlines()) == 61
    images = ["debug=smoke", "student=timm", "student.name=mobilenetv3_small_050", "dataset.size=32"]
    assert kdbench("train", *smoke, *images, "hydra.run.dir=timm") == 0
    assert kdbench("export", "timm", "--torchscript") == 0  # ONNX works as well, and takes 12 s
    state = load("timm").network.state_dict()
    assert "conv_stem.weight" in state
    Image.new("RGB", (40, 30)).save("one.png")
    assert kdbench("predict", "timm", "one.png") == 0
