"""What the scripts conclude from results, on results that are made up."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from scipy import stats

import kdbench
from kdbench import build
from kdbench.errors import UserError
from kdbench.results import claims
from tests.support import losses
from tests.support.procedures import put
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
    """Every published figure stands in its experiment by method, with its marks and source; no other does."""
    assert len(crd_table.pairs()) == 13
    for pair in crd_table.pairs():
        figures = crd_table.published(pair)
        header = (crd_table.EXPERIMENTS / f"tian2020_{pair}.yaml").read_text(encoding="utf-8").split("\ndefaults:")[0]
        assert "\n".join(["as published:", *crd_table.header(pair), "# Command:"]) in header, pair
        lines = header.replace("\n#     ", " ").splitlines()
        shown = [line[4:].split(": ", 1) for line in lines if line.startswith("#   ")]
        found = {(source, entry) for source, entries in shown for entry in entries.split("; ")}
        sources = {figure.source for figure in figures}
        said = {(figure.source, f"{figure.method} {figure.said}") for figure in figures}
        assert found - said == {("HobbitLong/RepDistiller", f"teacher {crd_table.table()[0][pair]:.2f}")}
        assert said <= found and sources == {source for source, _ in shown}
        assert len({figure.method for figure in figures}) == len({figure.words for figure in figures}) == len(figures)
        known = {path.stem for path in crd_table.EXPERIMENTS.glob("tian2020_*_*.yaml")}
        assert f"tian2020_{pair}" in known and set(pair.split("_")) <= set(re.split(r"[_ :\n]", header))
    assert len(crd_table.table()[1]) == 513  # whoever adds one counts it here
    (dkd,) = [figure for figure in crd_table.published("vgg13_vgg8") if figure.method == "DKD"]
    assert dkd.words == ("loss=dkd", "loss.steps=epoch", "loss.nckd=6") and dkd.said == "74.68*" and dkd.bound == 73.88
    (fsp,) = [figure for figure in crd_table.published("vgg13_vgg8") if figure.method == "FSP"]
    assert fsp.words[1:] == ("schedule.epochs=270", "schedule.milestones=[180,210,240]") and fsp.bound == 69.73
    (cat,) = [figure for figure in crd_table.published("resnet32x4_shufflenetv1") if figure.method == "CAT-KD"]
    assert cat.said == "78.26+~" and cat.bound == 77.46


def test_the_crd_table_writes_its_figures_into_the_experiments(crd_table, tmp_path, monkeypatch):
    files = {f"tian2020_{pair}.yaml": crd_table.EXPERIMENTS / f"tian2020_{pair}.yaml" for pair in crd_table.pairs()}
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        (tmp_path / name).write_text(re.sub(r"KD (\d\d)\.\d\d", r"KD \1.00", text), encoding="utf-8")
        assert (tmp_path / name).read_text(encoding="utf-8") != text
    monkeypatch.setattr(crd_table, "EXPERIMENTS", tmp_path)
    crd_table.write_headers()
    assert all((tmp_path / name).read_bytes() == path.read_bytes() for name, path in files.items())


def test_every_command_of_the_crd_table_composes(crd_table):
    """Each word names a key that there is, with a value that its loss or schedule takes."""
    lines = dict.fromkeys(figure.words for figure in crd_table.table()[1])
    assert len(lines) > 100
    for words in lines:
        groups = tuple(word for word in words if "." not in word.split("=")[0] or "@" in word.split("=")[0])
        values = [word for word in words if word not in groups]
        assert not any(word.startswith("+") for word in values)  # so that an unknown key is refused
        cfg = OmegaConf.masked_copy(chosen(groups), list({"loss", *(word.split(".")[0] for word in values)}))
        put(cfg, *values)
        build.make_loss(" ".join(groups), plain(cfg.loss)).make()
        if "schedule" in cfg:
            build.make_schedule(plain(cfg.schedule), "schedule")


def plain(node: DictConfig) -> dict[str, Any]:
    return {str(key): value for key, value in OmegaConf.to_container(node, resolve=True).items()}


@functools.cache
def chosen(groups: tuple[str, ...]) -> DictConfig:
    """A configuration with these options. What is another loss alone, or a part more, is not composed: 0.2 s each."""
    first, *more = groups
    if not first.startswith("loss=") or not all(word.startswith("+loss@loss.parts.") for word in more):
        return kdbench.compose("schedule=crd240", list(groups))
    loss = losses.settings(first.removeprefix("loss="))
    for word in more:
        place, name = word.removeprefix("+loss@loss.parts.").split("=")
        loss["parts"][place] = losses.settings(name)
    return OmegaConf.create({"loss": loss, "schedule": chosen(("teacher=resnet20",)).schedule})


def test_a_line_that_is_no_figure_is_named(crd_table):
    block = {"method": "KD", "source": "a paper", "epoch": "last", "words": "loss=kl"}
    (one,) = crd_table._of(block | {"vgg13_vgg8": "70.00?^ loss.tau=2"}, ["vgg13_vgg8"])
    assert one.said == "70.00?^" and one.words == ("loss=kl", "loss.tau=2")
    figure = {"vgg13_vgg8": "70.00"}
    for wrong in ({"vgg13_vgg8": "70.0"}, {"vgg13_vgg8": "70.00!"}, {"vgg8": "70.00"}, figure | {"epoch": "some"}):
        with pytest.raises(ValueError, match="KD: vgg"):
            list(crd_table._of(block | wrong, ["vgg13_vgg8"]))


def test_the_crd_table_judges_what_is_there(crd_table, tmp_path, capsys):
    def trained(method: str, seed: int, top1: float, optimizer: str = "sgd", **config: object) -> None:
        run = tmp_path / "tian2020_vgg13_vgg8" / method / f"{optimizer}-{seed}-{len(config)}"
        finished(run, seed, top1, **config)
        tree = json.loads((run / "result.json").read_text())
        tree["choices"] |= {"loss": "dkd" if method == "DKD" else "kl", "optimizer": optimizer}
        (run / "result.json").write_text(json.dumps(tree))

    for seed, top1 in enumerate((0.7460, 0.7475, 0.7468)):
        trained("DKD", seed, top1, **{"loss.nckd": 6, "loss.steps": "epoch"})
        trained("DKD", seed, 0.5, **{"loss.nckd": 8})  # another setting, met in the same folder
        for optimizer, method, low in (
            ("sgd", "KD", 0.70),
            ("dot", "KD+DOT", 0.74),
        ):
            trained(method, seed, low + 0.001 * seed, optimizer)
        trained("CTKD", seed, 0.74)  # of another loss than its folder says
    kl, dkd, dot = crd_table.judged(tmp_path)
    assert dot[1:4] == ["KD+DOT", "73.77*", "74.10"]
    assert kl[:4] == ["vgg13_vgg8", "KD", "72.98", "70.10"] and kl[-2:] == ["3", "does not hold"]
    assert dkd[:4] == ["vgg13_vgg8", "DKD", "74.68*", "74.68"] and dkd[-2:] == ["3", "holds"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("vgg13_vgg8 CTKD: ") and told[0].endswith("0 runs of 0 seeds")


def test_the_crd_table_is_legible(crd_table, tmp_path, capsys):
    """All figures of the pair with the longest name, each with runs, in 120 columns."""
    for figure in crd_table.published("resnet50_mobilenetv2_half"):
        given = [word.split("=", 1) for word in figure.words if "@" not in word]
        config = {key: yaml.safe_load(value) for key, value in given if "/" not in key}  # as results have them
        for seed in range(3):
            run = tmp_path / "tian2020_resnet50_mobilenetv2_half" / figure.method / str(seed)
            finished(run, seed, figure.accuracy / 100 + seed / 1000, **config)
            tree = json.loads((run / "result.json").read_text())
            tree["choices"] |= {"loss": config["loss"], "optimizer": config.get("optimizer", "sgd")}
            (run / "result.json").write_text(json.dumps(tree))
    crd_table.show(tmp_path, False)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert not captured.err and max(map(len, lines)) <= 120
    rows = [line.split() for line in lines if line.startswith("resnet50_mobilenetv2_half ")]
    said = [[figure.method, figure.said] for figure in crd_table.published("resnet50_mobilenetv2_half")]
    assert [row[1:3] for row in rows] == said and len(said) == 38
    assert lines[-4].startswith("Plain figures are of the last epoch; *")


@pytest.mark.skipif(shutil.which("bash") is None, reason="a script of bash")
def test_few_of_the_crd_table_are_run_into_folders_of_their_own(crd_table, tmp_path):
    script, said = Path(__file__).parent.parent / "scripts/reproduce_crd_table.sh", tmp_path / "said"
    for program, does in (("kdbench", f'echo "$@" >>{said}'), ("python", f'exec {sys.executable} "$@"')):
        (tmp_path / program).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / program).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUTPUTS": str(tmp_path / "out")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True)

    done = run("full", "pair=resnet56_resnet20", "method=KD,KD++", "schedule.epochs=1")
    begun = [line.split() for line in said.read_text().splitlines()]
    top = f"{tmp_path}/out/crd_table"
    assert done.returncode == 0 and done.stdout.startswith("pair  method  published"), done.stderr
    assert begun[0] == [
        "train", "-m", "experiment=tian2020_resnet56_resnet20", f"paths.outputs={top}",
        f"paths.runs={top}/tian2020_resnet56_resnet20/KD", "seed=0,1,2", "loss=kl", "schedule.epochs=1",
    ]  # fmt: skip
    assert (
        f"paths.runs={top}/tian2020_resnet56_resnet20/KD++" in begun[1] and "loss.parts.kd.weights.tckd=1" in begun[1]
    )
    refused = run("full", "method=KDD")
    assert refused.returncode and "KDD: must be one of" in refused.stderr
    small = run("small", "debug=smoke")
    assert small.returncode == 2 and "kdbench reproduce tian2020" in small.stderr
    assert len(said.read_text().splitlines()) == 2


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
