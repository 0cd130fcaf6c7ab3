"""Gaussian classes: what is drawn, the true probabilities, and what is measured and taught with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdbench.data.load import load_bundle
from kdbench.data.readers.gaussian import gaussian
from kdbench.engine.metrics import measure_logits
from kdbench.errors import UserError
from kdbench.results.read import Run
from kdbench.results.result import read_result
from kdbench.results.rows import compare
from kdbench.types import VectorInfo
from tests.support.killing import KILLED, in_its_own_process
from tests.support.procedures import refusal, result, train
from tests.support.shell import kdbench

WORDS = [
    "dataset=gaussian", "dataset.n=240", "dataset.n_val=60", "dataset.n_test=120", "teacher=mlp", "teacher.hidden=[16]",
    "student=mlp", "student.hidden=[8]", "schedule.epochs=3", "schedule.batch_size=32", "teacher.schedule.epochs=6",
    "teacher.schedule.batch_size=32", "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip


def load(**keys):
    return load_bundle("gaussian", "kdbench.data.readers.gaussian.gaussian", None, "cache", **keys)


def test_means_and_variance_are_those_of_the_paper():
    source = gaussian(n=30_000, n_val=0, n_test=30)
    means = torch.stack([source.inputs[source.labels == k].mean(0) for k in range(3)])
    assert means.round().abs().max() == 1 and (means - means.round()).abs().max() < 0.15
    rest = source.inputs - means.round()[source.labels]
    assert rest.var() == pytest.approx(6, rel=0.02) and abs(float(rest.mean())) < 0.02
    assert source.val is None and load().info == VectorInfo(3, 30)


def test_a_part_depends_on_the_seed_and_on_no_other_part():
    small, large = gaussian(n=90, n_val=6, n_test=9), gaussian(n=90, n_val=60, n_test=99)
    assert torch.equal(small.inputs, large.inputs)
    assert not torch.equal(small.inputs, gaussian(n=90, data_seed=1).inputs)
    assert not torch.equal(small.inputs[:9], small.test_inputs)


def test_as_many_means_as_there_can_be_and_no_more():
    source = gaussian(n=90, num_classes=9, dimensions=2, variance=0.001)
    centres = torch.stack([source.inputs[source.labels == k].mean(0).round() for k in range(9)])
    assert len(torch.unique(centres, dim=0)) == 9
    with pytest.raises(UserError, match=r"dataset\.num_classes = 10: must be at most 3\^dimensions = 9"):
        load(num_classes=10, dimensions=2)
    with pytest.raises(UserError, match=r"dataset\.variance = 0: must be above 0"):
        load(variance=0)


def test_the_posterior_is_bayes_rule():
    data = load(n=60, n_test=50)
    known = data.posterior_of(data.test)
    means = data.posterior.weight.double() * 6
    likelihood = torch.exp(-(torch.cdist(data.test.inputs.double(), means) ** 2) / 12)
    torch.testing.assert_close(known.double(), likelihood / likelihood.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    many = load(n_test=20_000)
    p = many.posterior_of(many.test)
    right = (p.argmax(1) == many.test.labels).float().mean()
    assert right == pytest.approx(p.amax(1).mean().item(), abs=0.01)  # it is as often right as it says
    assert load_bundle("fake", "kdbench.data.readers.fake.fake", None, "c").posterior is None


def test_distance_to_the_posterior():
    logits, known = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    found = measure_logits(logits, torch.tensor([0, 1]), posterior=known)
    assert found["posterior_l2"] == pytest.approx(0.5**0.5 / 2)
    assert "posterior_l2" not in measure_logits(logits, torch.tensor([0, 1]))


def test_a_search_for_epsilon_is_measured_against_the_posterior(capsys):
    words = ["loss=ptloss", "loss.epsilon=search", "loss.search.count=8", "loss.tau=1"]
    out = train(*WORDS, *words, plain=True)
    found = read_result(out)
    for values in (found.last, found.best, found.teacher.metrics):
        assert 0 < values["test/posterior_l2"] < 1 and 0 < values["val/posterior_l2"] < 1
    assert json.loads((out / "epsilon.json").read_text())["images"]["all"] == 60
    assert kdbench("evaluate", str(out), "--json") == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert found.samples == "vectors" and any("vectors/s on cpu" in line for line in shown)
    said = json.loads(last)
    assert said["vectors"] == 120 and said["posterior_l2"] == pytest.approx(found.last["test/posterior_l2"], rel=1e-5)


def test_the_posterior_teaches_through_a_table_as_live():
    kept = [word for word in WORDS if not word.startswith("teacher")]
    live = result(train(*kept, "teacher=posterior", "teacher.table=off", plain=True, out="live"))
    assert live["teacher"]["test/posterior_l2"] < 1e-5 and live["teacher"]["name"] == "posterior"
    table = result(train(*kept, "teacher=posterior", "teacher.table=on", plain=True, out="table"))
    assert table["student"] == live["student"] and list(Path("outputs/teachers").rglob("*.table"))


def test_a_killed_search_goes_on_to_the_same_student():
    # Its coefficients are found once, and a run of several students gives each what it would have had alone.
    words = [*WORDS, "loss=ptloss", "loss.epsilon=search", "loss.search.count=8", "hydra.run.dir=cut"]
    assert kdbench("train", *words[:-1], "hydra.run.dir=whole") == 0
    code = "from tests.support.killing import kill_at\nfrom tests.support.shell import kdbench\nkill_at(12, 'cut')\n"
    done = in_its_own_process(f"{code}kdbench('train', *{words})")
    assert done.returncode == KILLED and not Path("cut/result.json").exists(), done.stderr
    assert kdbench("train", *words) == 0
    whole = result("whole")
    assert whole["last"]["epoch"] == 3 and result("cut")["student"] == whole["student"]
    side_by_side = ["-m", "hydra/launcher=cohort", "hydra.sweep.dir=sweep", *words[:-1], "seed=0,1"]
    assert kdbench("train", *side_by_side) == 0
    found = [result(path.parent) for path in Path("sweep").rglob("result.json")]
    assert [run["student"] for run in found if run["seed"] == 0] == [whole["student"]] and len(found) == 2


def test_vectors_of_many_dimensions_fit_into_a_tables_key():
    out = train(*WORDS, "dataset.dimensions=2000", "teacher.table=on", "teacher.allow_chance=true", plain=True)
    assert result(out)["last"]["epoch"] == 3 and list(Path("outputs/teachers").rglob("*.table"))


def test_the_posterior_is_refused_where_it_is_not_known():
    said = refusal("teacher=posterior", "student=mlp", without=("teacher",))
    assert said.startswith("teacher = posterior: must be a network: the true probabilities of 4 classes of images")
    assert "dataset=gaussian has them" in said


def test_repetitions_with_data_of_their_own_are_one_setting():
    first = read_result(train(*WORDS, "schedule.epochs=1", plain=True))

    def run(loss: str, seed: int, data: str) -> Run:
        name = f"{loss}{seed}{data}"
        config = {**first.config, "seed": seed, "dataset.data_seed": seed}
        of = {**first.identity, "data": data}
        return Run(
            Path(name), replace(first, hash=name, choices={**first.choices, "loss": loss}, config=config, identity=of)
        )

    runs = [run(loss, seed, f"data of {seed}") for loss in ("kl", "dkd") for seed in (0, 1)]
    found = compare(runs)
    assert found.columns == ["loss"] and [len(row.runs) for row in found.rows] == [2, 2]
    assert [len(row.runs) for row in compare([*runs, run("kl", 0, "edited data")]).rows] == [2, 2, 1]
