"""Embeddings without labels: from a folder of photos and a teacher's file to a k-NN figure by one command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from kdbench import load
from tests.support.shell import kdbench, result

SIZE = 32


def folder_of(root: Path, classes: int, each: int, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    for number in range(classes):
        place = root / f"kind{number}"
        place.mkdir(parents=True)
        for image in range(each):
            pixels = draw.integers(0, 60, (SIZE, SIZE, 3)) + np.eye(3, dtype=int)[number] * 150
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{image}.png")
    return root


@pytest.fixture
def words() -> list[str]:
    folder_of(Path("photos"), 3, 12, 0), folder_of(Path("probe"), 3, 8, 1)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", img_size=SIZE, num_classes=10).state_dict(), "teacher.pth")
    return [
        "dataset=photos", "dataset.root=photos", "dataset.probe=probe", "dataset.size=32", "dataset.dimensions=64",
        "dataset/augment=flip", "teacher=timm", "teacher.name=test_vit", "teacher.embedding=true",
        "teacher.checkpoint=teacher.pth", "student=mlp", "student.hidden=[16]", "schedule.epochs=2",
        "schedule.batch_size=12", "schedule.warmup=0", "trainer.device=cpu", "trainer.progress=none",
    ]  # fmt: skip


BOTH = ["+loss@loss.parts.a=cosine", "+loss@loss.parts.b=relational", "loss.weights={task: 0, kl: 0, crd: 0}"]


@pytest.mark.parametrize(("loss", "more"), [("cosine", []), ("feature_mse", []), ("relational", []), ("sum", BOTH)])
def test_one_command_gives_a_k_nn_figure(words, loss, more):
    assert kdbench("train", *words, f"loss={loss}", *more, "hydra.run.dir=run") == 0
    found = result(Path("run"))
    assert {"test/knn", "test/linear", "test/cosine"} <= found["last"].keys()
    assert found["teacher"]["test/knn"] > 0.9
    assert 0.33 <= found["last"]["test/knn"] <= 1 and found["task"] == "embedding"


def test_embeddings_that_the_last_step_ruined_have_diverged(words, capsys):
    one_step = ["schedule.epochs=1", "schedule.batch_size=36", "schedule.lr=1e15", "student.hidden=[16,16,16]"]
    assert kdbench("train", *words, "loss=feature_mse", *one_step, "hydra.run.dir=run") == 1
    assert "of the test set is not a number after epoch 1" in capsys.readouterr().err


def test_embeddings_are_predicted_as_such(words, capsys):
    assert kdbench("train", *words, "loss=cosine", "schedule.epochs=1", "hydra.run.dir=run") == 0
    assert kdbench("predict", "run", "photos") == 1
    assert "--csv = null: must be a file: run answers with embeddings" in capsys.readouterr().err
    assert kdbench("predict", "run", "photos", "--csv", "found.csv") == 0
    heads, *rows = [line.split(",") for line in Path("found.csv").read_text().splitlines()]
    assert len(rows) == 36 and heads[:2] == ["input", "dimension 0"] and len(heads) == 66
    student = load("run")
    assert [float(v) for v in rows[0][1:-1]] == pytest.approx(student.predict([rows[0][0]])[0].tolist(), rel=1e-4)
    assert student.about()["output"] == "embeddings [N, dimensions]"


def test_a_table_gives_what_the_live_teacher_gives_and_a_cohort_what_a_run_gives(words):
    for table in ("on", "off"):
        assert kdbench("train", *words, "loss=cosine", f"teacher.table={table}", f"hydra.run.dir={table}") == 0
    together = ["-m", "loss=cosine,relational", "hydra/launcher=cohort", "hydra.sweep.dir=sweep"]
    assert kdbench("train", *words, *together) == 0
    weights = {result(path.parent)["student"]["weights"] for path in Path("sweep").rglob("result.json")}
    table, live = (result(Path(name))["student"]["weights"] for name in ("on", "off"))
    assert table == live and live in weights and len(weights) == 2


@pytest.mark.parametrize(
    "change, said",
    [
        (["loss=kl"], "loss = kl: must be cosine, feature_mse, relational or a sum of them: dataset=photos has"),
        (["loss=cosine", "teacher.checkpoint=null"], "teacher = test_vit: must be"),
        (["loss=cosine", "dataset.dimensions=48"], "dataset.dimensions=64"),
        (["loss=cosine", "dataset.probe=null"], "dataset.probe = null: must be a folder of class folders"),
        (["loss=cosine", "dataset.validation=0.2"], "dataset.validation"),
        (["loss=cosine", "dataset.noise.kind=symmetric", "dataset.noise.rate=0.1"], "dataset.noise.kind = symmetric"),
        (
            ["loss=cosine", "dataset.transfer.only=[1]"],
            "dataset.transfer.only = [1]: must be null: photos has no labels",
        ),
        (["loss=cosine", "dataset.transfer.per_class=3"], "dataset.transfer.per_class = 3: must be null"),
        (["loss=cosine", "dataset.classes=[0,1]"], "dataset.classes = [0, 1]: must be null: photos has no labels"),
        (["loss=cosine", "teacher.embedding=false"], "teacher.embedding=true leaves the classifier out"),
        (
            ["loss=cosine", "teacher.checkpoint=null", "teacher.pretrained=true", "teacher.embedding=false"],
            "teacher.embedding = false: must be true: dataset=photos asks for embeddings",
        ),
        (["loss=cosine", "teacher.checkpoint=no.pth"], "teacher.checkpoint: no.pth: no such file"),
        (
            ["loss=cosine", "dataset.root=photos/kind0", "dataset.probe=alone"],
            "dataset.probe = alone: must be a folder",
        ),
        (["loss=cosine", "dataset.root=lonely"], "dataset.root = lonely: must be what leaves at least 2 images"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words, change, said, capsys):
    folder_of(Path("alone"), 2, 1, 2), folder_of(Path("lonely"), 1, 1, 3)
    assert kdbench("train", *words, *change) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("more", [["procedure=born_again", "procedure.generations=2"], ["procedure=mutual"]])
def test_procedures_that_average_predictions_have_none_of_embeddings(words, more):
    """They asked embeddings for their likelihood, after the training."""
    teacher = [word for word in words if not word.startswith("teacher")]
    words = [*teacher, "teacher=none"] if more == ["procedure=mutual"] else words
    assert kdbench("train", *words, "loss=cosine", "schedule.epochs=1", *more, "hydra.run.dir=run") == 0
    assert "test/knn" in result(Path("run"))["last"]


def test_losses_of_embeddings_want_embeddings(capsys):
    assert kdbench("train", "dataset=fake", "teacher=resnet8", "student=mlp", "loss=cosine") != 0
    assert "loss = cosine: must be one for classes, which dataset=fake has" in capsys.readouterr().err
