"""`kdbench explain`, and the same words after `kdbench train --help`: what a key means, by the YAML's comments."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdbench.configure.comments import explain, of_option, usual
from kdbench.configure.explain import typed_as
from kdbench.configure.options import groups, options
from kdbench.paths import CONFIG_DIR
from tests.support.shell import kdbench

PLACES = [Path(CONFIG_DIR)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.clip"], "trainer.clip = null  largest gradient norm"),
        (["loss.tau", "loss=ttm"], "loss.tau = 10.0  the teacher's temperature"),
        (["loss.weights.task"], "loss.weights = {task: 0.1, distill: 0.9}  coefficients of CE and KL"),
        (["dataset.noise.rate"], "dataset.noise.rate = 0.0  share of each class"),
        (["dataset.augment.pixels"], "largest shift in each direction"),
        (["dataset.reader"], "dataset.reader = kdbench.data.readers.digits.digits"),
        (["dataset.size"], "(with dataset=fake) pixels a side"),
        (["teacher.table"], "keep its logits for every view of every image"),
        (["teacher.depth"], "6n + 2"),
        (["teacher.schedule.warmup"], "teacher.schedule.warmup = "),
        (["seed"], "sets every random choice"),
        (["seeds"], "order of the images"),
        (["loss=ttm"], "loss=ttm: task CE(y, s)"),
        (["loss.tau=2"], "loss.tau = 4.0  temperature"),
        (["dataset=imagefolder", "dataset.root=photos"], "dataset.root = null  the folder"),
    ],
)
def test_a_key_is_explained(words, said, capsys):
    assert kdbench("explain", *words) == 0
    assert said in capsys.readouterr().out


def test_help_with_a_key_explains_it(capsys):
    assert kdbench("train", "--help", "trainer") == 0
    out = capsys.readouterr().out
    assert "trainer.ema = null" in out and "== Groups" not in out
    assert kdbench("train", "trainer.ema", "--help") == 0
    assert capsys.readouterr().out.startswith("trainer.ema")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trainer.clp"], "Did you mean trainer.clip?"),
        (["sead"], "Did you mean seed"),
        (["los.tau"], "Did you mean loss?"),
        (["loss=kll"], "there is no such option"),
        ([], "which key?"),
    ],
)
def test_what_is_no_key_is_refused(words, said, capsys):
    assert kdbench("explain", *words) == 1
    assert said in capsys.readouterr().err


def test_every_key_of_every_usual_option_is_found():
    chosen = usual(PLACES)
    assert {"dataset", "loss", "student", "teacher", "trainer", "schedule", "optimizer", "procedure"} <= set(chosen)
    for group in groups(PLACES):
        for option in options(group, PLACES):
            if group.partition("/")[0] not in ("experiment", "debug"):
                found = of_option(group, option, PLACES)
                assert all(key.startswith(group.replace("/", ".")) for key in found), (group, option)
    text = explain("trainer.precision", chosen, PLACES)[0].text
    assert text.startswith("auto | fp32") and text.endswith("always float32")


@pytest.mark.parametrize(
    ("flag", "value", "typed"),
    [
        ("--lr", "0.1", "schedule.lr=0.1"), ("--seed", "3", "seed=3"), ("--distill", "kd", "loss=kl"),
        ("--kd-model-name", "resnet50", "teacher=timm teacher.name=resnet50"), ("--kd_T", "4", "loss.tau=4"),
        ("--alpha", "0.9", "loss.weights.distill=0.9"), ("--batch-size", "8", "schedule.batch_size=8"),
        ("--opt", "sgd", "optimizer=sgd"), ("--whatever", "1", "whatever=1"),
    ],
)  # fmt: skip
def test_flags_of_other_programs(flag, value, typed):
    assert typed_as(flag, value) == typed
