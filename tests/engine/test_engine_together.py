"""Together: several processes train what one trains, whatever the loss, the network and the procedure."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdbench import world
from kdbench.data.batches import Normalise
from kdbench.engine import together as engine
from kdbench.engine.device import Placement
from kdbench.runs import stage as stages_of
from kdbench.types import Outputs
from tests.support import together
from tests.support.procedures import MLPS, result, stages, train

RESNETS = ["teacher=resnet8", "student=resnet8"]  # with batch norm and feature maps
SHORT = ("dataset.n=40", "schedule.epochs=1", "teacher.schedule.epochs=1")  # two steps


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and inputs in double precision, where only the order of sums is left to differ."""
    put, normalised, learn = Placement.put, Normalise.__call__, stages_of.Distiller
    monkeypatch.setattr(Placement, "put", lambda self, module: put(self, module).double())
    monkeypatch.setattr(Placement, "cast", lambda self, network: network)
    monkeypatch.setattr(Normalise, "__call__", lambda self, inputs: normalised(self, inputs).double())
    monkeypatch.setattr(stages_of, "Distiller", lambda student, loss, where: learn(student, loss.double(), where))


def in_two(*runs: tuple[str, ...], processes: int = 2, prefix: str = "two") -> None:
    """Train each of the runs with two processes, into folders <prefix>0, <prefix>1, ..."""

    def work() -> None:
        world.join()
        for number, words in enumerate(runs):
            train(*words, out=f"{prefix}{number}")

    together.run(work, processes)


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "student.safetensors")


def distance(one: Path | str, other: Path | str) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


@pytest.mark.usefixtures("in_float64")
def test_the_weights_are_those_of_one_process_for_losses_of_whole_batches_features_and_memories():
    crd = ("loss=crd", "loss.negatives=16")
    runs = [(*RESNETS, *words, *SHORT) for words in [("loss=kl",), ("loss=rkd",), ("loss=at",), crd]]
    in_two(*runs)
    for number, words in enumerate(runs):
        alone = train(*words, out=f"one{number}")
        assert distance(alone, f"two{number}") < 1e-12
        last = result(alone)["last"]
        assert result(f"two{number}")["last"]["train/loss"] == pytest.approx(last["train/loss"], rel=1e-6)
        assert result(f"two{number}")["last"]["train/top1"] == last["train/top1"]


@pytest.mark.usefixtures("in_float64")
def test_uneven_shares_unlabelled_rows_and_mixtures_are_no_exception():
    odd = ("teacher=mlp", "student=resnet8", "schedule.batch_size=13", *SHORT)  # 13, 13 and 4 rows
    runs = [odd, (*odd, "dataset.mix.kind=cutmix"), (*MLPS, "dataset.transfer.noise_images=16")]
    in_two(*runs, processes=3)
    for number, words in enumerate(runs):
        assert distance(train(*words, out=f"one{number}"), f"two{number}") < 1e-12


class Halves(nn.Module):
    """A network that sees the two halves of a training batch one after the other."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Outputs:
        if not self.training:
            return self.network(input)
        first, second = (self.network(half) for half in input.chunk(2))
        return Outputs(torch.cat([first.logits, second.logits]), {})


def test_bit_equal_to_one_process_with_two_micro_steps_and_batch_norm_of_each(monkeypatch):
    words = ("teacher=none", "loss=ce", "student=resnet8", "schedule.epochs=3")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "WholeBatchNorm", nullcontext)
        in_two(words)
    learn = stages_of.Distiller
    monkeypatch.setattr(stages_of, "Distiller", lambda student, *rest: learn(Halves(student), *rest))
    alone = train(*words, out="one")
    one = {key.removeprefix("network."): value for key, value in weights(alone).items()}
    two = weights("two0")
    trained = [key for key in two if "running" not in key and "num_batches" not in key]
    assert len(trained) > 20
    assert all(torch.equal(one[key], two[key]) for key in trained)


@pytest.mark.usefixtures("in_float64")
def test_procedures_of_several_stages():
    born = (*MLPS, "procedure=born_again", "procedure.generations=2", "loss=ban")
    mutual = ("teacher=none", "student=mlp", "student.hidden=[24]", "procedure=mutual", "loss=kl")
    runs = [born, mutual]
    in_two(*runs)
    for number, words in enumerate(runs):
        alone = train(*words, out=f"one{number}", without=["teacher"] if "teacher=none" in words else ())
        assert distance(alone, f"two{number}") < 1e-12
        assert [stage.name for stage in stages(alone)] == [stage.name for stage in stages(Path(f"two{number}"))]


def test_dropout_draws_for_each_process_its_own_and_replays():
    words = (*MLPS, "student.dropout=0.5", "loss=kl")
    in_two(words, words, prefix="a")
    assert distance("a0", "a1") == 0

    def draw() -> None:
        world.join()
        block = engine.OwnRandom(7, torch.device("cpu"))
        torch.manual_seed(3)
        with block:
            own = torch.rand(3)
        print(json.dumps([own.tolist(), torch.rand(3).tolist()]))

    (one, common), (two, also) = map(json.loads, together.run(draw))
    assert one != two
    assert common == also == torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist()


def test_a_table_is_shared_and_every_file_is_written_once():
    words = (*RESNETS, "teacher.table=on", "schedule.epochs=3")
    in_two(words)
    assert len(list(Path("outputs/teachers").rglob("*.table"))) == 1
    epochs = [json.loads(line)["epoch"] for line in Path("two0/metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]
    assert len(list(Path("two0").glob("events*"))) == 1
    assert not list(Path().rglob(".*.tmp"))
    live = train(*RESNETS, "teacher.table=off", "schedule.epochs=3", out="live")
    assert result(live)["last"]["train/loss"] == pytest.approx(result("two0")["last"]["train/loss"], rel=1e-3)


@pytest.mark.parametrize("batch", [(8, 3), (8, 3, 4), (8, 3, 2, 2)])
def test_batch_norm_over_all_processes_is_torchs_over_the_whole_batch(batch):
    values = torch.randn(batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, bias = torch.rand(3, dtype=torch.float64) + 0.5, torch.rand(3, dtype=torch.float64)

    def work(part: Tensor, mode: type) -> list[Tensor]:
        mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        leaves = [part.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        with mode():
            made = nn.functional.batch_norm(leaves[0], mean, var, leaves[1], leaves[2], True)
        (made.sin() * made).sum().backward()
        return [made.detach(), leaves[0].grad, mean, var, leaves[1].grad, leaves[2].grad]

    def one_of_two() -> None:
        world.join()
        first, last = world.own(8)
        torch.save(work(values[first:last], engine.WholeBatchNorm), f"{first}.pt")

    together.run(one_of_two)
    parts, alone = [torch.load(f"{first}.pt") for first in (0, 4)], work(values, nullcontext)
    found = [torch.cat([part[i] for part in parts]) for i in (0, 1)] + parts[0][2:4]
    found += [parts[0][i] + parts[1][i] for i in (4, 5)]
    for mine, theirs in itertools.zip_longest(found, alone):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)
