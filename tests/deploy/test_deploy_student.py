"""A finished run's student, loaded: it sees what it saw in the run, to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdbench.arguments import trusting
from kdbench.data.batches import EvaluationBatches, Loading
from kdbench.deploy.export import raw_batches
from kdbench.deploy.student import data_of, load
from kdbench.errors import UserError
from kdbench.results.predictions import read_predictions


def test_inputs_are_normalised_as_the_runs_own_were(photo_run):
    student = load(photo_run)
    data = data_of(student, trusting())
    batches = EvaluationBatches(data, data.test, Loading(batch_size=4))
    theirs = next(iter(batches)).input
    raw = next(batches.source.epoch(torch.arange(8), torch.arange(8), batches.bounds))
    assert torch.equal(student.normalised(raw), theirs)


def test_a_picture_is_read_as_the_dataset_read_it(photos, photo_run):
    student = load(photo_run)
    data = data_of(student, trusting())
    assert isinstance(data.train.inputs, torch.Tensor)
    of_set = {one.numpy().tobytes() for one in torch.cat([data.train.inputs, data.test.inputs])}
    for path in sorted(photos.rglob("*.png")):
        assert student.raw(path).numpy().tobytes() in of_set
        assert torch.equal(student.raw(Image.open(path)), student.raw(path))
        assert torch.equal(student.raw(np.asarray(Image.open(path))), student.raw(str(path)))


def test_its_answers_are_those_that_the_run_kept(photo_run):
    student, kept = load(photo_run), read_predictions(photo_run)
    data = data_of(student, trusting())
    answers = student.predict(list(data.test.inputs)).argmax(1)
    assert kept is not None and kept.answer.tolist() == answers.tolist()
    assert student.classes == ("blue", "red")


def test_what_is_exported_sees_what_the_network_sees(photo_run):
    student = load(photo_run)
    data = data_of(student, trusting())
    values, labels = next(raw_batches(data, data.test, 8))
    assert values.min() >= 0 and values.max() <= 1 and labels.tolist() == data.test.labels.tolist()
    with torch.no_grad():
        direct = student.network(student.normalised(data.test.inputs)).logits
        assert torch.allclose(student.portable()(values), direct, atol=1e-4)


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(2, 9, 9, dtype=torch.uint8), np.zeros(3), "no.png"])
def test_what_is_no_picture_is_refused(photo_run, wrong):
    with pytest.raises(UserError):
        load(photo_run).raw(wrong)


def test_a_strangers_network_is_not_run(photo_run, tmp_path, monkeypatch):
    Path("stranger.py").write_text("raise SystemExit('run!')")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    folder = tmp_path / "run"
    shutil.copytree(photo_run, folder)
    about = json.loads((folder / "network.json").read_text())
    about["config"]["_target_"] = "stranger.Net"
    (folder / "network.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="not kdbench's own, and would be run"):
        load(folder)
    with pytest.raises(SystemExit, match="run!"):
        load(folder, trust=True)


def test_a_file_that_is_no_student_is_refused(photo_run):
    with pytest.raises(UserError, match=r"student\.safetensors or best\.safetensors"):
        load(photo_run / "checkpoint.pt" if (photo_run / "checkpoint.pt").exists() else photo_run / "config.yaml")
