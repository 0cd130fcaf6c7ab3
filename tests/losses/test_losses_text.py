"""Every loss beside networks that read text: it is refused in a sentence before any work, or trains. And beside
networks of images as a run tries it first, without memory. Each file of configs/loss is tested by existing."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from kdbench.build import make_loss, make_recipe
from kdbench.configure.naming import without_hydra
from kdbench.data.augment.views import Identity
from kdbench.errors import UserError
from kdbench.losses.base import DistillationLoss
from kdbench.models.interface import parts_of
from kdbench.runs.recipe import Recipe
from kdbench.runs.trial import refuse_pairs, try_networks
from kdbench.types import Target
from tests.support.losses import NAMES, settings
from tests.support.procedures import composed, in_hydra

TEXTS = ["dataset=text", "dataset.root=texts.csv", "dataset.val=0.4", "dataset.test=0.1", "teacher=text_cnn_small"]
PAIRS = {  # of a teacher and a student
    "maps": [*TEXTS, "student=text_cnn_small", "student.maps=8"],
    "one map": [*TEXTS, "student=bilstm_small"],
    "rows": ["dataset=shakespeare", "dataset.subset=200", "dataset.context=4", "dataset.predicted=2",
             "teacher=lstm_lm", "teacher.width=8", "student=lstm_lm", "student.width=8"],
}  # fmt: skip
# What a loss misses, and beside which of the pairs
REFUSED = {
    **dict.fromkeys(("cosine", "feature_mse", "relational"), ("one for classes", set(PAIRS))),
    **dict.fromkeys(("crld", "sskd", "hsakd"), ("compares [24] views of each image", set(PAIRS))),
    **dict.fromkeys(("aekd", "camkd"), ("choose teacher=ensemble", set(PAIRS))),
    **dict.fromkeys(("cat_kd", "norm", "simkd"), ("has no map that its classifier reads the mean of", set(PAIRS))),
    "sdd": ("last map is averaged for its classifier", set(PAIRS)),
    "deit": ("a student with a distillation token", set(PAIRS)),
    "fcfd": ("enters networks in their middle", set(PAIRS)),
    "vitkd": ("reads the feature block1", set(PAIRS)),
    "ofd": ("knows no batch norm", {"maps", "one map"}),
    **dict.fromkeys(("fsp", "kdsvd"), ("equal channels|two layers or more", {"maps", "one map"})),
    **dict.fromkeys(("fitnet", "fitnet_hints"), ("reads the feature stage2", {"one map"})),
}
MAPS = {"ab", "afd", "at", "diffkd", "fitnet", "fitnet_hints", "fsp", "ft", "ickd", "kdsvd", "mgd", "nst", "ofa", "ofd",
        "semckd", "vid", "wkd_f"}  # fmt: skip

IMAGES = ["dataset=fake", "dataset.n=20", "teacher=resnet8", "student=resnet8"]
ALONE = ("cosine", "feature_mse", "relational", "aekd", "camkd", "deit", "vitkd")  # what wants other networks or data
CRD = {"negatives": 16, "dimensions": 1}  # of the memory of 842,356 tokens
QUICK = {"crd": CRD, "sum": {"parts": {**settings("sum")["parts"], "crd": {**settings("crd"), **CRD}}}}


@functools.cache
def experiment(pair: str) -> Recipe:
    root = composed("trainer.device=cpu", *PAIRS.get(pair, IMAGES))
    with in_hydra():
        return make_recipe(without_hydra(root), [], root.hydra.runtime.choices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    lines = (f"{'a good' if i % 3 else 'the bad'} text {i},{'abc'[i % 3]}" for i in range(90))
    (folder / "texts.csv").write_text("\n".join(["text,label", *lines]))
    return folder


def tried(name: str, pair: str) -> Recipe:
    """The experiment with this loss, tried as every run is."""
    loss = make_loss(name, settings(name) | QUICK.get(name, {}))
    recipe = replace(experiment(pair), loss=loss)
    refuse_pairs(recipe, Identity(), None)
    try_networks(recipe)
    return recipe


def step(loss: DistillationLoss, recipe: Recipe) -> None:
    """One forward and backward pass of four inputs, in which what is trained gets a gradient."""
    data = recipe.data()
    torch.manual_seed(0)
    student, teacher = recipe.student.make(data.info), recipe.teacher.origin.network.make(data.info).eval()
    loss.train_rows, loss.epochs, loss.batch_size = data.num_rows, 2, 4
    loss.attach(parts_of(student), parts_of(teacher))
    batch = data.info.example(4)
    with torch.no_grad():
        taught = teacher(batch)
        assert loss.extension(student(batch), taught) is None
        loss.setup(student(batch), taught)
    count, classes = taught.logits.shape
    label = torch.arange(count) % classes
    if loss.surveyed:
        loss.survey([(taught.features[loss.surveyed], label)])
    if loss.needs_calibration:
        loss.calibrate(torch.randn(3 * classes, classes), torch.arange(3 * classes) % classes)
    total = loss(student(batch), taught, Target(label, torch.arange(count), torch.tensor(0.25))).total
    total.backward()
    trained = (*student.parameters(), *loss.parameters())
    found = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert total.isfinite() and any(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALONE])
def test_it_is_tried_without_memory_beside_networks_of_images(name):
    recipe = replace(experiment("images"), loss=make_loss(name, settings(name)))
    with in_hydra():
        try_networks(recipe)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_or_is_refused_before_any_work(name, pair, folder, monkeypatch):
    monkeypatch.chdir(folder)
    says, where = ("compares maps", {"rows"}) if pair == "rows" and name in MAPS else REFUSED.get(name, ("", ()))
    if pair in where:
        with pytest.raises(UserError, match=f"^loss.*({says})|^dataset/augment.*({says})"):
            tried(name, pair)
        return
    recipe = tried(name, pair)
    loss = recipe.loss.make()
    for part in (loss, *([loss.first_training.loss] if loss.first_training else [])):
        step(part, recipe)
