"""Ensembles as teachers: their means, their members, and the share of their gain that a student keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdbench.models.ensemble import Ensemble, ensemble_logits, share_recovered
from tests.support.procedures import MLPS, refusal, result, train

ENSEMBLE = ["teacher=ensemble", "teacher.network=mlp", "student=mlp", "student.hidden=[24]"]


@pytest.fixture
def logits() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [5 * torch.randn(6, 7, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_the_arithmetic_mean_is_exact_at_its_temperature(
    logits: list[torch.Tensor], tau: float, weights: list[float] | None
):
    share = [w / 8 for w in weights] if weights else [1 / 3] * 3
    wanted = sum(w * F.softmax(z.double() / tau, 1) for w, z in zip(share, logits))
    got = F.softmax(ensemble_logits(logits, weights, "arithmetic", tau).double() / tau, 1)
    assert (got - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_geometric_mean_is_exact_at_every_temperature(logits: list[torch.Tensor], tau: float):
    product = torch.stack([F.log_softmax(z.double() / tau, 1) for z in logits]).mean(0).exp()
    got = F.softmax(ensemble_logits(logits, mean="geometric").double() / tau, 1)
    assert (got - product / product.sum(1, keepdim=True)).abs().max() < 1e-6


def test_limits(logits: list[torch.Tensor]):
    geometric = F.log_softmax(ensemble_logits(logits, mean="geometric"), 1)
    high = ensemble_logits(logits, tau=3000.0)
    assert (F.log_softmax(high, 1) - geometric).abs().max() < 0.05
    assert torch.equal(ensemble_logits(logits, tau=math.inf), ensemble_logits(logits, mean="geometric"))
    assert (F.log_softmax(ensemble_logits([logits[0]] * 2), 1) - F.log_softmax(logits[0], 1)).abs().max() < 1e-5
    extreme = ensemble_logits([torch.tensor([[1000.0, -1000.0]]), torch.tensor([[-1000.0, 1000.0]])])
    assert torch.isfinite(extreme).all() and extreme.softmax(1) == pytest.approx(0.5)


def test_share_recovered():
    assert share_recovered(0.608, 0.589, 0.611) == pytest.approx(0.8636, abs=1e-4)  # Hinton et al. 2015, table 1
    assert share_recovered(0.5, 0.6, 0.6) is None


def test_what_an_ensemble_is_made_with_is_part_of_its_weights():
    def keys(**options: object) -> list[float]:
        return Ensemble([torch.nn.Identity()], **options).state_dict()["made_with"].tolist()  # type: ignore[arg-type]

    assert keys(tau=2.0) != keys(tau=1.0) != keys(mean="geometric") == keys(mean="geometric", tau=5.0)


def test_three_seeds_of_one_network_teach_a_student():
    out = train(*ENSEMBLE)
    found = result(out)
    teacher, last = found["teacher"], found["last"]
    members = teacher["members"]
    assert teacher["name"] == "ensemble" and len({m["weights"] for m in members}) == 3
    mean = sum(m["test/top1"] for m in members) / 3
    assert teacher["members/test/top1"] == pytest.approx(mean)
    assert found["figures"]["recovered/test/top1"] == share_recovered(last["test/top1"], mean, teacher["test/top1"])
    assert found["figures"].keys() == {"recovered/test/top1", "recovered/val/top1"}


def test_members_of_every_kind():
    alone = train(*MLPS, out="alone")
    run = train(*MLPS[:2], "student=resnet8", out="other")
    weights = alone / "student.safetensors"
    members = f"teacher.members=[mlp,mlp,7,{run},{{network: resnet8, seed: 3}}]"
    words = ["teacher.weights=[1,1,1,2,3]", "teacher.mean=geometric", members]
    found = result(train(*ENSEMBLE, *words))["teacher"]["members"]
    assert [m["name"] for m in found] == ["mlp", "mlp", "mlp", "resnet8", "resnet8"]
    assert len({m["weights"] for m in found}) == 5 and found[3]["folder"] == str(run)
    again = result(train(*ENSEMBLE, "teacher.members=[1,7]", out="again"))["teacher"]["members"]
    assert [m["weights"] for m in again] == [found[1]["weights"], found[2]["weights"]]
    file = result(train(*MLPS, f"teacher.checkpoint={weights}", out="file"))["teacher"]
    assert file["weights"] == result(alone)["student"]["weights"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["teacher.members=[0]"], ["teacher.members", "at least two"]),
        (["teacher.members=[0,0]"], ["teacher.members", "same weights"]),
        (["teacher.weights=[1,2]"], ["teacher.weights", "3 numbers"]),
        (["teacher.tau=0"], ["teacher.tau", "0"]),
        (["teacher.members=[nothing,0]"], ["teacher.members[0] = nothing: must be a name"]),
        (["teacher.members=[1.5,0]"], ["teacher.members[0]"]),
        (["teacher.members=[[mlp],0]"], ["teacher.members[0] = [mlp]: must be"]),
        (["teacher.members=[{seed: abc},0]"], ["teacher.members[0].seed = abc: must be a whole number"]),
        (["teacher.members=[0,{network: 'no such'}]"], ["teacher.members[1] = no such: must be a name"]),
        (["teacher.members=[0,{run: a, checkpoint: b}]"], ["teacher.members[1].checkpoint = b: must be null"]),
        (["teacher.members=[{networks: mlp},0]"], ["teacher.members[0].networks: there is no such key", "network"]),
        (["loss=at"], ["at", "features", "ensemble"]),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], parts: list[str]):
    message = refusal(*ENSEMBLE, *words)
    assert all(part in message for part in parts), message


def test_how_good_an_ensemble_is_does_not_depend_on_the_loss():
    """Its figures are those of the mean of its members' predictions, at whatever temperature it teaches."""
    measured = [result(train(*ENSEMBLE, f"loss.tau={tau}", out=f"tau{tau}"))["teacher"] for tau in (1, 6)]
    assert measured[0]["weights"] != measured[1]["weights"]  # they teach differently
    for key in ("test/top1", "test/nll", "test/ece", "val/nll"):
        assert measured[0][key] == pytest.approx(measured[1][key], rel=1e-6), key
