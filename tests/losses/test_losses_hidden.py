"""Distances of hidden states: what they are by hand, padding, and a student of transformers that takes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdbench.errors import UserError
from kdbench.types import Outputs, Target
from tests.support.losses import build
from tests.support.shell import kdbench

TARGET = Target(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.tensor(0.5))


def states(seed: int, channels: int = 8) -> Outputs:
    """Of three texts of 4, 2 and 1 tokens, 0 on padding."""
    torch.manual_seed(seed)
    here = (torch.arange(4) < torch.tensor([[4], [2], [1]])).float()[:, None, None]
    maps = {name: torch.randn(3, channels, 1, 4) * here for name in ("embeddings", "stage1", "stage2")}
    return Outputs(torch.randn(3, 2), {**maps, "pooled": torch.randn(3, channels)})


def distance(student: Outputs, teacher: Outputs, **keys) -> float:
    loss = build("hidden", **{"weights": {"task": 0.0, "distill": 1.0}, "adapter": "none", **keys})
    loss.setup(student, teacher)
    return loss(student, teacher, TARGET).total.item()


@pytest.mark.parametrize("layers", ["last", "all", ["embeddings", "stage2"]])
def test_distances_are_means_over_the_tokens_that_there_are(layers):
    s, t = states(0), states(1)
    names = {"last": ["stage2"], "all": ["stage1", "stage2"]}.get(layers if isinstance(layers, str) else "", layers)
    tokens = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0)]
    pairs = [[(s.features[n][b, :, 0, i], t.features[n][b, :, 0, i]) for b, i in tokens] for n in names]
    mse = sum(torch.stack([F.mse_loss(a, b) for a, b in pair]).mean() for pair in pairs)
    cosine = sum(torch.stack([1 - F.cosine_similarity(a, b, 0) for a, b in pair]).mean() for pair in pairs)
    assert distance(s, t, layers=layers) == pytest.approx(mse.item(), rel=1e-5)
    assert distance(s, t, layers=layers, distance="cosine") == pytest.approx(cosine.item(), rel=1e-5)
    assert distance(s, t, layers=layers, distance="normalised") == pytest.approx(2 * cosine.item(), rel=1e-5)
    for kind in ("mse", "cosine", "normalised"):
        assert distance(t, t, layers=layers, distance=kind) == pytest.approx(0, abs=1e-6)


def test_widths_that_differ_take_a_matrix_that_leaves_padding_alone():
    s, t = states(0, 8), states(1, 5)
    with pytest.raises(UserError, match="adapter = none: must be linear where channels differ"):
        distance(s, t)
    assert distance(s, t, adapter="linear") > 0
    assert distance(s, t, adapter="linear", layers=["pooled"]) > 0
    with pytest.raises(UserError, match=r"layers = .*: must be maps of both networks or vectors of both"):
        distance(s, t, adapter="linear", layers={"student": ["pooled"], "teacher": ["stage1"]})
    loss = build("hidden")
    loss.setup(s, t)
    assert not loss.adapters[0](s.features["stage2"])[2, :, 0, 1:].any()


def test_a_small_transformer_learns_from_states_and_attentions_of_a_larger_one():
    pytest.importorskip("transformers")
    own = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes = [f"+student.options.{key}={value}" for key, value in own.items()]
    sizes += [
        f"+teacher.options.{key}={value}" for key, value in {**own, "hidden_size": 16, "num_hidden_layers": 2}.items()
    ]
    parts = ["+loss@loss.parts.first=hidden", "loss.parts.first.layers=[embeddings]",
             "+loss@loss.parts.attention=hidden", "loss.parts.attention.adapter=none",
             "loss.parts.attention.layers={student: [attention1], teacher: [attention2]}",
             "loss.parts.hidden.distance=mse"]  # fmt: skip
    words = ["dataset=udhr", "dataset.subset=64", "dataset.length=12", "student=transformers", "teacher=transformers",
             "student.attentions=true", "teacher.attentions=true", "optimizer=adamw", "teacher.schedule.epochs=1",
             "schedule.epochs=1", "teacher.allow_chance=true", "trainer.device=cpu",
             "trainer.progress=none", "hydra.run.dir=run"]  # fmt: skip
    assert kdbench("train", "loss=distilbert", *words, *sizes, *parts) == 0
    last = json.loads(Path("run/result.json").read_text())["last"]
    assert {"train/loss_first_distill", "train/loss_attention_distill", "train/loss_hidden_distill"} <= last.keys()
