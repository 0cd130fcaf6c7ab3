"""What the scripts conclude from results, on results that are made up."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

from kdbench.errors import UserError
from kdbench.results import claims
from tests.support import losses
from tests.support.results import result as made_result
from tests.support.results import write


def loaded(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # named tuples look their module up
    spec.loader.exec_module(module)
    return module


def finished(folder: Path, seed: int, top1: float, **config: object) -> None:
    folder.mkdir(parents=True)
    result = {
        "seed": seed, "choices": {"loss": "kl"}, "config": config, "student": {}, "figures": {"offset": 2.5},
        "last": {"test/top1": top1}, "best": None, "teacher": {"test/top1": 0.9, "members/test/top1": 0.7},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def test_figures_by_seed(tmp_path):
    for seed, top1 in enumerate((0.5, 0.75)):
        for tau in (1, 4):
            finished(tmp_path / "hinton2015_soft" / f"{seed}-{tau}", seed, top1, **{"loss.tau": tau})
    runs = claims.Runs(tmp_path, "hinton2015")
    found = runs("soft", loss__tau=4)
    assert found[claims.last] == {0: 50.0, 1: 75.0} and found[claims.teacher].mean == {0: 90.0}
    assert found[claims.teacher] - found[claims.last] == {0: 40.0, 1: 15.0}
    assert found[claims.figure("offset", 1)] == {0: 2.5, 1: 2.5}
    for wanted in ({}, {"loss__tau": 2}):  # two runs of a seed; none
        with pytest.raises(LookupError):
            runs("soft", **wanted)
    with pytest.raises(LookupError):
        runs("hard")


@pytest.mark.parametrize(
    ("values", "relation", "bound", "verdict"),
    [
        ((1.0, 1.1, 0.9), ">", 0, "holds"), ((1.0, 1.1, 0.9), "<=", 0, "does not hold"),
        ((-1.0, 2.0, 0.5), ">", 0, "cannot be told with n = 3"),
        ((0.28, 1.67, 0.56), ">", 0, "cannot be told with n = 3"),
        ((1.0, 1.1), ">", 0, "cannot be told with n = 2"), ((1.0,), ">", 0, "cannot be told with n = 1"),
    ],
)  # fmt: skip
def test_verdicts_are_those_of_an_interval(values, relation, bound, verdict):
    claim = claims.Claim("X", "claim", "a difference", relation, bound, lambda runs: None)
    found = claims.BySeed(enumerate(values))
    told = claims.row("a paper", claim, found, 10_000)
    mean, error, interval, _, kept, word = told[4:]
    assert word == verdict and mean == f"{np.mean(values):.2f}"
    keeping = [value > bound if relation == ">" else value <= bound for value in values]
    assert kept == f"{sum(keeping)} of {len(values)}"
    if len(values) > 1:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert error == f"{stats.sem(values):.2f}" and interval == f"{low:.2f} to {high:.2f}"
    reported = claim._replace(kind="reported")
    assert claims.row("a paper", reported, found, 10_000)[-1] == f"reported: {verdict}"


def test_figures_that_agree_are_certain_to_one_image_only():
    claim = claims.Claim("X", "claim", "a difference", ">", 0, lambda runs: None)
    found = claims.BySeed(dict.fromkeys(range(3), 0.2))
    assert claims.row("a paper", claim, found, 360)[-1] == "cannot be told with n = 3"
    assert claims.row("a paper", claim, found, 10_000)[-1] == "holds"
    nothing = claims.BySeed(dict.fromkeys(range(3), 0.0))
    assert claims.row("a paper", claim._replace(relation="<=", exact=True), nothing, 360)[-1] == "holds"
    assert claims.row("a paper", claim._replace(exact=True), nothing, 360)[-1] == "does not hold"


def test_claims_whose_runs_are_not_there_are_left_out(tmp_path, capsys):
    for name, top1 in (("hard", 0.8), ("soft", 0.85)):
        finished(tmp_path / "hinton2015-small" / f"hinton2015_{name}" / "run", 0, top1)
    found = list(claims.rows(loaded("claims").CLAIMS, tmp_path, "small"))
    assert [line[:2] for line in found] == [["hinton2015", "H1"], ["hinton2015", "H1"]]
    assert found[0][-3:] == ["5.00", "1 of 1", "cannot be told with n = 1"]
    assert found[1][-3:] == ["50.00", "1 of 1", "cannot be told: one figure of all seeds"]
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("hinton2015 H2: ")]) == 1  # four of its claims lack these runs
    assert [line for line in told if line.startswith("kim2021")] == [
        f"kim2021: not run: kdbench reproduce kim2021 small writes {tmp_path / 'kim2021-small'}"
    ]


def test_what_moved_between_two_machines(tmp_path, capsys, monkeypatch):
    for place, soft in (("here", (0.85, 0.86, 0.87)), ("there", (0.85, 0.86, 0.77))):
        for seed, top1 in enumerate(soft):
            for name, value in (("hard", 0.80 + seed / 1000), ("soft", top1)):
                finished(tmp_path / place / "hinton2015-small" / f"hinton2015_{name}" / str(seed), seed, value)
    here, there = (list(claims.rows(loaded("claims").CLAIMS, tmp_path / place, "small")) for place in ("here", "there"))
    first, second = claims.moved(here, there)
    assert first[4:] == [
        "5.90", "5.00, 5.90, 6.80", "holds", "2.57", "5.00, 5.90, -3.20", "cannot be told with n = 3", "10.00",
    ]  # fmt: skip
    assert [line[10] for line in claims.moved(here, here)] == ["-", "-"] and not list(claims.moved(here, []))
    assert claims.summary([first, second]).startswith(
        "2 claims: the figures of 0 are the same in every seed, and 1 say"
    )
    monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path / "here"), "--against", str(tmp_path / "there")])
    assert loaded("claims").main() == 0
    captured = capsys.readouterr()
    assert "by seed there" in captured.out and "2 claims: " in captured.err


def test_the_house_is_measured_as_it_is(tmp_path, monkeypatch):
    house = loaded("measure_house")
    (tmp_path / "rooms.py").write_text(
        "class Room:\n    def enter(self, *, a: dict[str, Any], **more):\n        def door(b):\n            pass\n\n\n"
        "def leave(c, /, d, *e): return 1\n"
    )
    monkeypatch.setattr(house, "PACKAGE", tmp_path)
    found = house.source(names=True)
    assert (found["files"], found["lines"], found["dict[str, Any]"], found["Mapping[str, Any]"]) == (1, 7, 1, 0)
    assert found["most parameters"] == 3 and found["function lines, longest"] == 3 and found["parameters"] == {}


def test_how_often_a_setting_is_called_better_than_itself(tmp_path, monkeypatch, capsys):
    rate, random = loaded("aa_rate"), np.random.default_rng(0)
    for seed in range(60):
        made = made_result(float(0.9 + 0.01 * random.normal()), seed=seed)
        write(tmp_path / "aa" / str(seed), made)
    monkeypatch.setattr(sys, "argv", ["aa_rate", str(tmp_path / "aa"), "--repeats", "3", "--json"])
    assert rate.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == 60 and found["tables"] == 10 and sum(found["verdicts"].values()) == 2 * 3 * 10
    for one in found["wrong"].values():
        assert one["share"] <= 0.2 and one["low"] <= one["first dealing"] / 10 <= one["high"]
    assert set(found["wrong"]) == {"other seeds, this test set", "same seeds, this test set"}
    for seed in range(6):
        write(tmp_path / "few" / str(seed), made_result(0.9 if seed % 2 else 0.5, seed=seed, loss__tau=seed % 2))
    monkeypatch.setattr(sys, "argv", ["aa_rate", str(tmp_path / "few")])
    with pytest.raises(UserError, match="holds 2 settings"):
        rate.main()


@pytest.fixture(scope="module")
def crd_table():
    return loaded("crd_table")


def test_the_crd_table_is_what_the_experiments_say(crd_table):
    """Every figure of every header is found, with the settings that it is of."""
    assert len(crd_table.pairs()) == 13
    for pair in crd_table.pairs():
        figures = crd_table.published(pair)
        header = (crd_table.EXPERIMENTS / f"tian2020_{pair}.yaml").read_text(encoding="utf-8").split("\ndefaults:")[0]
        table = [line for line in header.splitlines() if line.startswith(("#   loss=", "#   teacher"))]
        shown = [float(number) for line in table for number in re.findall(r" (\d\d\.\d\d)\b", line)]
        assert sorted(shown[1:]) == sorted(figure.accuracy for figure in figures), pair  # the first is the teacher's
        assert all(figure.words[0].startswith(("loss=", "teacher=none")) for figure in figures)
    (dkd,) = [figure for figure in crd_table.published("vgg13_vgg8") if "loss=dkd" in figure.words]
    assert dkd == ("vgg13_vgg8", ("loss=dkd", "loss.nckd=6"), 74.68, True) and dkd.bound == 73.88
    (fsp,) = [figure for figure in crd_table.published("vgg13_vgg8") if "loss=fsp" in figure.words]
    assert fsp.words[1:] == ("schedule.epochs=270", "schedule.milestones=[180,210,240]") and fsp.bound == 69.73


def test_the_crd_table_judges_what_is_there(crd_table, tmp_path):
    for seed, top1 in enumerate((0.7460, 0.7475, 0.7468)):
        run = tmp_path / "tian2020_vgg13_vgg8" / f"dkd-{seed}"
        finished(run, seed, top1, **{"loss.nckd": 6})
        tree = json.loads((run / "result.json").read_text())
        tree["choices"] |= {"loss": "dkd", "optimizer": "sgd"}
        (run / "result.json").write_text(json.dumps(tree))
        for optimizer, low in (("sgd", 0.70), ("dot", 0.74)):  # KL under DOT is no KL of another seed
            run = tmp_path / "tian2020_vgg13_vgg8" / f"kl-{optimizer}-{seed}"
            finished(run, seed, low + 0.001 * seed)
            tree = json.loads((run / "result.json").read_text())
            tree["choices"]["optimizer"] = optimizer
            (run / "result.json").write_text(json.dumps(tree))
    (kl, dkd, dot) = crd_table.judged(tmp_path)
    assert dot[1:4] == ["loss=kl optimizer=dot optimizer@teacher.optimizer=sgd", "73.77 best", "74.10"]
    assert kl[:4] == ["vgg13_vgg8", "loss=kl", "72.98", "70.10"] and kl[-2:] == ["3", "does not hold"]
    assert dkd[:4] == ["vgg13_vgg8", "loss=dkd loss.nckd=6", "74.68 best", "74.68"] and dkd[-2:] == ["3", "holds"]


@pytest.fixture
def all_methods(tmp_path):
    """Words of every training that scripts/reproduce_all_methods.sh begins, by a kdbench that only writes them down."""
    script, said = Path(__file__).parent.parent / "scripts/reproduce_all_methods.sh", tmp_path / "said"
    (tmp_path / "kdbench").write_text(f'#!/bin/sh\necho "$@" >>{said}\n')
    (tmp_path / "kdbench").chmod(0o755)

    def begun(size: str, **environment: str) -> list[list[str]]:
        said.write_text("")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", script, size], check=True, env={**os.environ, "PATH": path, **environment})
        lines = [line.split() for line in said.read_text().splitlines()]
        return [words for words in lines if words[0] == "train"]

    return begun


def losses_of(begun: list[list[str]]) -> list[str]:
    return [name for words in begun for word in words if word.startswith("loss=") for name in word[5:].split(",")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
@pytest.mark.parametrize("size", ["small", "full"])
def test_the_table_of_all_methods_leaves_no_loss_out(all_methods, size):
    """tfkd_self, deit and vitkd were begun by no line: whoever adds a loss that needs its own words adds a line."""
    assert set(losses_of(all_methods(size))) == {name for name in losses.NAMES if not losses.build(name).of_embeddings}


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
@pytest.mark.parametrize("name", ["deit", "ab", "tfkd_self", "kl"])
def test_few_of_all_methods_are_compared_with_kl(all_methods, name):
    found = losses_of(all_methods("small", LOSSES=name))
    assert name in found and set(found) == {name, "kl"}
    assert "" not in found
