"""Losses that add to the student for good, and losses with a training before the main one: whole runs of them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdbench import build
from kdbench.configure.naming import group_choices, without_hydra
from kdbench.engine.learner import Learner
from kdbench.engine.schedule import lr_factors
from kdbench.results.result import RunResult
from kdbench.runs.lifecycle import run_stages
from kdbench.runs.obtain import obtain
from kdbench.runs.recipe import Recipe
from kdbench.runs.stage import first_stage, student_stage
from tests.support.losses import build as build_loss
from tests.support.procedures import TINY as SMALL
from tests.support.procedures import composed, in_hydra
from tests.support.shell import TINY, kdbench, result, train

SIMKD = ("loss=simkd", "teacher=resnet14", "schedule.epochs=1", "teacher.schedule.epochs=1")
FT = ("loss=ft", "loss.epochs=2", "schedule.epochs=2", "teacher.schedule.epochs=1")
AB = ("loss=ab", "loss.epochs=2", "schedule.epochs=2", "teacher.schedule.epochs=1")


@pytest.fixture(scope="module")
def simkd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simkd")
    train(*SIMKD, f"hydra.run.dir={folder}/run", f"paths.teachers={folder}/teachers")
    return folder / "run"


def test_a_student_keeps_the_teacher_s_classifier(simkd):
    found = result(simkd)
    kept, teacher = (
        load_file(simkd / "student.safetensors"),
        load_file(Path(found["teacher"]["folder"]) / "student.safetensors"),
    )
    assert torch.equal(kept["classifier.weight"], teacher["fc.weight"])
    assert torch.equal(kept["classifier.bias"], teacher["fc.bias"])
    assert not any(name.startswith("network.fc") for name in kept)
    assert found["student"]["added"] == "a projector and the teacher's classifier (64 dimensions) in place of its own"
    assert found["student"]["parameters"] == sum(
        value.numel() for name, value in kept.items() if "running" not in name and "num_batches" not in name
    )
    assert found["formula"].startswith("mean (p(f_s) - f_t)^2, s = the teacher's classifier")


def test_an_extended_student_is_evaluated_and_teaches(simkd, capsys):
    assert kdbench("evaluate", str(simkd), "--json") == 0
    assert json.loads(capsys.readouterr().out)["top1"] == result(simkd)["last"]["test/top1"]
    taught = result(train("loss=kl", f"teacher.run={simkd}", "schedule.epochs=1", "hydra.run.dir=taught"))
    assert taught["teacher"]["weights"] == result(simkd)["student"]["weights"]
    # and one more time: its student stands on it
    again = result(train("loss=simkd", f"teacher.run={simkd}", "schedule.epochs=1", "hydra.run.dir=again"))
    assert again["student"]["added"]


def test_an_extended_student_goes_on_from_a_training_before():
    """The boundaries' student is the plain one; SimKD's has it inside, without its classifier."""
    both = ["loss=sum", *(f"+loss@loss.parts.{name}={name}" for name in ("simkd", "ab"))]
    more = ["loss.weights={task: 0, kl: 0, crd: 0}", "loss.parts.ab.epochs=1", "loss.parts.ab.lr=0.01"]
    run = train(*both, *more, "schedule.lr=0", "schedule.epochs=1")
    first, kept = (load_file(run / place / "student.safetensors") for place in ("stages/1-first", ""))
    assert torch.equal(kept["network.conv1.weight"], first["conv1.weight"])
    assert not torch.equal(kept["classifier.weight"], first["fc.weight"])


HUGE = [("inputs", 10**7), ("outputs", 10**7), ("widths", [10**6] * 4), ("outputs", 10**12), ("inputs", 10**30)]


@pytest.mark.parametrize("key, value", HUGE)
def test_sizes_that_its_weights_do_not_have_take_no_memory(simkd, key, value, tmp_path, capsys):
    copied = shutil.copytree(simkd, tmp_path / "copied")
    about = json.loads((copied / "network.json").read_text())
    inner = json.loads(about["config"]["network"])
    (inner if key in inner else about["config"])[key] = value  # up to 300 TB
    about["config"]["network"] = json.dumps(inner)
    (copied / "network.json").write_text(json.dumps(about))
    assert kdbench("evaluate", str(copied)) == 1
    err = capsys.readouterr().err
    assert "network.json: damaged: a network of" in err
    assert "its weights have 9" in err or "than can be counted" in err


def test_a_first_training_is_a_stage_of_the_run(monkeypatch):
    taught = []
    begin = Learner.begin_epoch

    def noted(self: Learner, epoch: int) -> None:
        if type(self.distiller.loss).__name__ == "FT":
            taught.append({name: value.clone() for name, value in self.distiller.loss.state_dict().items()})
        begin(self, epoch)

    monkeypatch.setattr(Learner, "begin_epoch", noted)
    found = result(train(*FT))
    (stage,) = found["stages"]
    assert stage["folder"] == "stages/1-first" and stage["formula"].startswith("mean (d(e(f_t)) - f_t)^2")
    assert found["seconds"] >= stage["seconds"] > 0
    kept = load_file("run/stages/1-first/loss.safetensors")
    paraphraser = [name for name in kept if name.startswith("paraphraser")]
    assert paraphraser and all(torch.equal(kept[name], taught[0][name]) for name in paraphraser)


def test_boundaries_are_learned_before_the_labels(monkeypatch):
    seen = []
    begin = Learner.begin_epoch
    monkeypatch.setattr(
        Learner, "begin_epoch",
        lambda self, epoch: (seen.append((type(self.distiller.loss).__name__, self.steps_done)), begin(self, epoch)),
    )  # fmt: skip
    train(*AB, "loss.lr=0.001")
    assert [name for name, _ in seen if name != "CE"] == ["Boundaries", "Boundaries", "AB", "AB"]
    first, final = (load_file(f"run/{path}student.safetensors") for path in ("stages/1-first/", ""))
    assert torch.equal(first["fc.weight"], first["fc.weight"]) and not torch.equal(
        first["conv1.weight"], final["conv1.weight"]
    )


CUTS = [(FT, 8, "stages/1-first"), (AB, 14, "."), ((*SIMKD, "schedule.epochs=2"), 8, ".")]  # 3 steps an epoch


@pytest.mark.parametrize(("words", "step", "folder"), CUTS, ids=["ft in its first", "ab after it", "simkd"])
def test_stopped_anywhere_it_goes_on_to_the_same_weights(words, step, folder, monkeypatch):
    whole = train(*words, "hydra.run.dir=whole")
    take, taken = Learner.step, itertools.count(1)

    def stopped(self: Learner, *args: object) -> None:
        if next(taken) == step:
            raise KeyboardInterrupt
        take(self, *args)

    other = [*words, "hydra.run.dir=cut", "paths.teachers=others"]
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", stopped)
        assert kdbench("train", *TINY, *other) != 0
    assert Path("cut", folder, "checkpoint.pt").exists() and not Path("cut", folder, "result.json").exists()
    cut = train(*other)
    assert result(cut)["student"]["weights"] == result(whole)["student"]["weights"]


def recipe(loss: str) -> Recipe:
    words = [*SMALL, "dataset.n=20", "teacher=resnet8", "student=resnet8", f"loss={loss}"]
    root = composed(*words)
    with in_hydra():
        return build.make_recipe(without_hydra(root), words, group_choices(root.hydra))


def test_the_rate_of_a_first_training_may_fall():
    """SSKD's authors divide it by ten after 30 and 45 of 60 epochs, HSAKD's after 30, 60 and 90 of 100."""
    made = recipe("ft")
    stage = student_stage(made, made.data(), Path("run"))
    first = build_loss("sskd", epochs=4, falls=[0.5, 0.75]).first_training
    falling, level = (first_stage(stage, one).recipe.schedule for one in (first, first._replace(falls=())))
    assert [round(factor, 9) for factor in lr_factors(falling, 2)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert lr_factors(level, 2) == [1.0] * 8 and build_loss("hsakd", falls=[0.3]).first_training.falls == [0.3]


def test_a_cohort_of_them_is_as_alone():
    recipes = [recipe(loss) for loss in ("simkd", "norm", "srrl", "ofd", "semckd", "ft", "ab", "nd")]
    data = recipes[0].data()
    teacher = obtain(recipes[0].teacher, recipes[0], data)
    found = []
    for folder, lots in (("together", [recipes]), ("alone", [[one] for one in recipes])):
        stages = [[student_stage(one, data, Path(folder, one.loss.name)) for one in lot] for lot in lots]
        results = [result for lot in stages for result in run_stages(lot, teacher)]
        found.append([result.student.weights for result in results if isinstance(result, RunResult)])
    assert found[0] == found[1] and len(set(found[0])) == 8
