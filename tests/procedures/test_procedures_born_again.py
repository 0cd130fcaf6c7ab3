"""Born-again generations: who teaches whom, with which seeds, and what their ensembles are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdbench.models.weights import weight_hash
from kdbench.runs.series import Series
from kdbench.runs.stage import Stage
from kdbench.runs.taught import TaughtBy
from tests.support.procedures import MLPS, refusal, result, stages, train

WORDS = ["procedure=born_again", "loss=ban", "procedure.generations=2", *MLPS]


def test_each_generation_is_taught_by_the_one_before():
    out = train(*WORDS)
    first, second = (result(stage) for stage in stages(out))
    whole = result(out)
    assert second["teacher"]["weights"] == first["student"]["weights"] != first["teacher"]["weights"]
    assert whole["student"] == second["student"] and whole["last"] == second["last"]
    assert len({first["seed"], second["seed"], 0}) == 3
    assert [entry["name"] for entry in whole["stages"]] == ["1-generation1", "2-generation2"]
    assert whole["choices"]["procedure"] == "born_again" and whole["formula"] == first["formula"]
    kept = (out / "predictions.npz").read_bytes()
    assert kept == (stages(out)[1] / "predictions.npz").read_bytes()


def test_a_teacher_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def watched(self: Series, stage: Stage, teacher: TaughtBy) -> dict:
        found = run(self, stage, teacher)
        network = teacher.network
        assert network is not None and not network.training and weight_hash(network.state_dict()) == teacher.weights
        assert all(p.grad is None and not p.requires_grad for p in teacher.teacher.network.parameters())  # type: ignore[attr-defined]
        assert not teacher.teacher.network.training  # type: ignore[attr-defined]
        seen.append(teacher.weights)
        return found

    run = Series.run
    monkeypatch.setattr(Series, "run", watched)
    train(*WORDS, "teacher.dropout=0.5")
    assert len(set(seen)) == 2


def test_the_student_is_the_teachers_network_unless_another_is_typed():
    words = [word for word in WORDS if not word.startswith("student")]
    assert result(train(*words))["choices"]["student"] == "mlp"
    other = result(train(*words, "student=resnet8", "procedure.generations=1", out="other"))
    assert other["student"]["name"] == "resnet8" and other["teacher"]["name"] == "mlp"


def test_ensembles_average_the_predictions_with_and_without_the_first_teacher():
    out = train(*WORDS)
    folders = [Path(result(stages(out)[0])["teacher"]["folder"]), *stages(out)]
    from kdbench.data.readers.fake import fake
    from kdbench.models.mlp import MLP

    source = fake(n=64, n_test=48, num_classes=4, size=8, channels=1)
    images, labels = source.test_inputs, source.test_labels
    from kdbench.data.bundle import statistics

    mean, std = statistics(source.inputs)
    inputs = (images.float() / 255 - mean[0]) / std[0]
    answers = []
    for folder in folders:
        network = MLP(hidden=[24], num_classes=4, in_channels=1, image_size=8)
        network.load_state_dict(load_file(folder / "student.safetensors"))
        answers.append(network.eval()(inputs).logits.softmax(1).detach())
    figures = result(out)["figures"]
    for name, members in (
        ("ensemble/1", answers[1:2]),
        ("ensemble/2", answers[1:]),
        ("ensemble_with_teacher/2", answers),
    ):
        probability = torch.stack(members).mean(0)
        assert figures[f"{name}/test/top1"] == pytest.approx((probability.argmax(1) == labels).float().mean().item())
        nll = -probability.gather(1, labels[:, None]).log().mean().item()
        assert figures[f"{name}/test/nll"] == pytest.approx(nll, abs=1e-5)


def test_shared_layers_are_the_teachers_and_stay():
    deep = ["student.hidden=[24,24]", "teacher.hidden=[24,24]"]
    out = train(*WORDS, *deep, "procedure.share=[first,last]", "optimizer.weight_decay=0.1")
    teacher = load_file(Path(result(stages(out)[0])["teacher"]["folder"]) / "student.safetensors")
    student = load_file(out / "student.safetensors")
    shared = ("hidden.0.weight", "hidden.0.bias", "fc.weight", "fc.bias")
    assert all(teacher[key].equal(student[key]) for key in shared)
    assert not teacher["hidden.1.weight"].equal(student["hidden.1.weight"])
    more = load_file(
        train(*WORDS, "procedure.share=[last]", "student.hidden=[16,24]", "teacher.hidden=[24,24]", out="b")
        / "student.safetensors"
    )
    assert more["fc.weight"].equal(teacher["fc.weight"]) and more["hidden.0.weight"].shape == (16, 64)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["procedure.generations=0"], ["procedure.generations = 0: must be in [1, 1000]"]),
        (["procedure.share=[middle]"], ["procedure.share", "middle", "first"]),
        (["procedure.share=[first]", "student.hidden=[16]"], ["procedure.share", "first", "differ"]),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], parts: list[str]):
    message = refusal(*WORDS, *words)
    assert all(part in message for part in parts), message


def test_an_ensemble_has_no_layers_to_share():
    words = ["procedure=born_again", "teacher=ensemble", "teacher.network=mlp", "student=mlp"]
    message = refusal(*words, "procedure.share=[last]")
    assert all(part in message for part in ("procedure.share", "last", "ensemble", "no single network")), message
    assert not Path("outputs").exists(), "no member was trained"


@pytest.mark.parametrize("loss", ["ban", "ban_l", "cwtm", "dkpp"])
def test_every_loss_of_the_paper(loss: str):
    out = train("procedure=born_again", f"loss={loss}", "procedure.generations=1", *MLPS, "schedule.epochs=1")
    assert result(out)["choices"]["loss"] == loss
