"""What no training could be made of is refused when the networks are tried: before a teacher or a folder is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from kdbench.arguments import Trust
from kdbench.build import ConfigCatalogue
from kdbench.errors import UserError
from kdbench.runs import lifecycle
from tests.support.procedures import MLPS, refusal

LINES = [
    (["loss=fitnet"], "loss: the loss reads the feature"),
    (["loss=at"], "loss=at compares maps [B, D, H, W]; stage1 has the shape"),
    (["loss=ptloss", "loss.epsilon=[[0.1],[0.2]]"], "loss.epsilon = 2 rows: must be one row for each of the 4 classes"),
    (["loss=logit_std", "dataset.num_classes=2"], "loss = logit_std: must be another with 2 classes"),
    (["monitor=val/top1", "dataset.validation=0"], "monitor = val/top1: must be a figure of train or test"),
    (["monitor=best/test/top1", "dataset.validation=0"], "monitor = best/test/top1: must be a figure of train or test"),
]


@pytest.mark.parametrize(("words", "message"), LINES, ids=[" ".join(words) for words, _ in LINES])
def test_it_is_refused_before_any_training(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    def begin(*_: object) -> None:
        raise AssertionError("a training was begun")

    monkeypatch.setattr(lifecycle, "run_stages", begin)
    own = [word for word in MLPS if word.partition("=")[0] not in {typed.partition("=")[0] for typed in words}]
    assert refusal(*own, *words).startswith(message)
    assert not Path("run").exists() and not Path("outputs").exists()


def test_features_of_an_ensemble_are_missed_before_its_members_are_trained():
    words = ["teacher=ensemble", "teacher.network=mlp", "student=resnet8", "dataset.size=16", "loss=at"]
    assert refusal(*words).startswith("loss = at: must be a loss without features (")
    assert not Path("run").exists() and not Path("outputs").exists()


def test_names_of_networks_and_losses_are_found_outside_of_a_command():
    assert not GlobalHydra.instance().is_initialized()
    catalogue = ConfigCatalogue(Trust(None))
    assert catalogue.node("student", "resnet20")["depth"] == 20 and catalogue.node("loss", "kl")["tau"] == 4.0
    with pytest.raises(UserError, match="resnet21"):
        catalogue.node("student", "resnet21")
