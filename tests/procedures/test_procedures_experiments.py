"""Every experiment says what it is, and takes its steps on made-up images with small networks in place of its own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from kdbench.configure.check import RATES
from kdbench.data.readers.udhr import languages as udhr_languages
from kdbench.paths import CONFIG_DIR
from tests.support.procedures import result, train

EXPERIMENTS = {path.stem: path for path in sorted((Path(CONFIG_DIR) / "experiment").glob("*.yaml"))}

SMALL = ["student=mlp", "student.hidden=[8,8]", "trainer.progress=none"]
LANGUAGE = [
    "dataset=corpus", "dataset.root=train.txt", "dataset.tokenizer=spaces", "dataset.context=2", "dataset.predicted=3",
    "dataset.subset=null", "student=lstm_lm", "student.width=8", "schedule=cosine", "schedule.batch_size=6",
    "teacher=lstm_lm", "teacher.width=8", "teacher.schedule.batch_size=6", "trainer.device=cpu",
    "trainer.progress=none",
]  # fmt: skip


def words(name: str) -> list[str]:
    """The experiment as a user tries it, debug=smoke, with perceptrons of eight units; of texts debug=short."""
    node = yaml.safe_load(EXPERIMENTS[name].read_text(encoding="utf-8"))
    options = [(key.split("/", 1)[1], value) for entry in node["defaults"] for key, value in entry.items()]
    chosen = {group: value for group, value in options if "@" not in group and "/" not in group}
    if chosen.get("dataset") in ("corpus", "shakespeare"):
        return [f"experiment={name}", "debug=short", *LANGUAGE]
    teacher, procedure = chosen.get("teacher", "resnet20"), node.get("procedure", {})
    masks = ("dataset/augment", "token_dropout") in options  # of tokens, and the data that are made up here are images
    found = [f"experiment={name}", "debug=smoke", *SMALL, *(["dataset/augment=none"] if masks else [])]
    if teacher == "ensemble":
        found += ["teacher=ensemble", "teacher.network=mlp", "teacher.members=[0,1]"]
    elif teacher != "none":
        found += ["teacher=mlp", "teacher.hidden=[8,8]"]
    for key in ("chain", "students"):
        if key in procedure:
            found += [f"procedure.{key}=[{','.join(['mlp'] * len(procedure[key]))}]"]
    return found


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_says_what_it_is(name: str):
    text = EXPERIMENTS[name].read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n# ")
    header = text.split("\ndefaults:")[0]
    assert f"experiment={name}" in header and "ardware" in header and re.search(r"n = \d", header)
    if not name.endswith("_small"):
        (small,) = re.findall(r"# Small: (itself|experiment=\w+)", header)
        small = name if small == "itself" else small.removeprefix("experiment=")
        own = EXPERIMENTS[small].read_text(encoding="utf-8")
        assert small.endswith("_small") or ("# Small: itself" in own and "of a busy CPU" in own)
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_rates_are_where_its_optimizer_takes_them(name: str):
    """Five experiments set schedule.lr beside optimizer=adamw, which has a rate of its own, and trained with that."""
    node = yaml.safe_load(EXPERIMENTS[name].read_text(encoding="utf-8"))
    options = {key: value for entry in node["defaults"] for key, value in entry.items()}
    typed = {"": node.get("schedule", {}), "teacher.": node.get("teacher", {}).get("schedule", {})}
    for place, schedule in typed.items():
        chosen = options.get("override /optimizer", "sgd")
        chosen = options.get("override /optimizer@teacher.optimizer", chosen) if place else chosen
        made = yaml.safe_load((Path(CONFIG_DIR) / "optimizer" / f"{chosen}.yaml").read_text(encoding="utf-8"))
        for rate in {*RATES} & schedule.keys() & made.keys():
            assert made[rate] == f"${{..schedule.{rate}}}", f"{place}schedule.{rate}"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all experiments: many have the same teacher, once its network is replaced."""
    return tmp_path_factory.mktemp("teachers")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_takes_its_steps(name: str, teachers: Path):
    Path("train.txt").write_text("one two three four five six\n" * 40, encoding="utf-8")
    out = train(*words(name), f"paths.teachers={teachers}", plain=True)
    runs = sorted((out / "stages").iterdir()) if (out / "stages").exists() else [out]
    found = [one for one in map(result, runs) if "step" in one["last"]]  # none where a stage only publishes a network
    for one in found:
        batches = math.ceil(one["images"]["train"] / one["config"]["schedule.batch_size"])
        assert one["last"]["step"] == one["last"]["epoch"] * min(batches, 3)
    assert found and {one["last"]["epoch"] for one in found} <= {1, 2}
    assert 0 <= result(out)["last"]["test/top1"] <= 1


TEXTS = [
    "dataset.words=40", "schedule.epochs=1", "teacher.schedule.epochs=1", "teacher.allow_chance=true",
    "trainer.device=cpu", "trainer.progress=none", "trainer.limit_steps=2", "trainer.evaluate_every=1",
]  # fmt: skip


def test_logits_go_into_a_bilstm_from_texts_with_masks():
    small = ["teacher.maps=4", "student.width=8", "student.hidden=4", "dataset.subset=200", "dataset.length=32",
             "teacher.table=off"]  # fmt: skip
    masked = result(train("experiment=tang2019_bilstm_small", *TEXTS, *small, plain=True, out="masked"))
    plain = ["dataset/augment=none", "experiment=tang2019_bilstm_small"]
    whole = result(train(*plain, *TEXTS, *small, plain=True, out="whole"))
    assert masked["formula"] == whole["formula"] and masked["choices"]["loss"] == "mse"
    assert masked["student"]["weights"] != whole["student"]["weights"]
    assert masked["teacher"]["weights"] == whole["teacher"]["weights"], "it is trained on texts as they are"


def test_languages_get_specialists_whose_groups_are_named():
    cut = ["procedure.specialists=3", "procedure.size=4", "procedure.epochs=1", "teacher.maps=4", "student.maps=4"]
    found = result(train("experiment=hinton2015_specialists_udhr", *TEXTS, *cut, plain=True, out="groups"))
    languages = {language.name for language in udhr_languages()}
    assert [len(group["classes"]) for group in found["tables"]["specialists"]] == [4, 4, 4]
    assert {name for group in found["tables"]["specialists"] for name in group["classes"]} <= languages


def test_frames_of_speech_with_those_around_them_go_through_an_ensemble_to_the_end():
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 600)
    frames = 9 * np.eye(6, 40)[labels] + random.normal(size=(600, 40))
    np.savez("frames.npz", inputs=frames.astype(np.float32), labels=labels, utterances=np.arange(600) // 30)
    words = ["experiment=hinton2015_speech", "dataset.root=frames.npz", "student=mlp", "student.hidden=[16]",
             "dataset.val=0.1", "dataset.test=0.2", "teacher.network=mlp_128", "teacher.members=[10,11]",
             "teacher.schedule.epochs=9", "schedule.epochs=9", "schedule.batch_size=32", "trainer.device=cpu",
             "teacher.schedule.batch_size=32", "trainer.progress=none"]  # fmt: skip
    found = result(train(*words, plain=True, out="speech"))
    assert found["last"]["test/top1"] > 0.5 and len(found["teacher"]["members"]) == 2
    assert found["images"] == {"train": 420, "val": 60, "test": 120}, "whole utterances"
    kept = json.loads(Path("speech/network.json").read_text())
    assert kept["info"]["dimensions"] == 26 * 40
