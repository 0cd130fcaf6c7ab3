"""`kdbench evaluate` on a real run: the figures of result.json, read back from the run folder alone."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from kdbench import cli
from kdbench.results.predictions import LEVELS, read_predictions
from kdbench.results.result import read_result
from kdbench.runs.folder import clear


def kdbench(*words: str) -> int:
    before = sys.argv
    sys.argv = ["kdbench", *words]
    try:
        return cli.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    smoke = ["debug=smoke", "trainer.progress=none", "teacher=none", "loss=ce", f"hydra.run.dir={folder}"]
    assert kdbench("train", *smoke) == 0
    return folder


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_figures_are_the_runs_own(run, split, capsys):
    assert kdbench("evaluate", str(run), "--split", split, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    last = json.loads((run / "result.json").read_text())["last"]
    for name in ("top1", "top5", "nll", "ece"):
        assert figures[name] == pytest.approx(last[f"{split}/{name}"], abs=1e-6)


def test_a_run_keeps_what_it_says_of_each_test_image(run, tmp_path):
    kept, last = read_predictions(run), read_result(run).last
    assert kept is not None and kept.teacher is None and kept.label.dtype.itemsize == 1
    assert (kept.answer == kept.label).mean() == pytest.approx(last["test/top1"])
    surer = ((kept.confidence - 0.5) / LEVELS).mean() - (kept.answer == kept.label).mean()
    assert abs(surer) <= last["test/ece"] + 1 / LEVELS
    whole = tmp_path / "run"
    shutil.copytree(run, whole)
    clear(whole)
    assert not (whole / "predictions.npz").exists()


def test_for_people_shares_are_in_percent(run, capsys):
    assert kdbench("evaluate", str(run / "student.safetensors")) == 0
    out = capsys.readouterr().out
    top1 = json.loads((run / "result.json").read_text())["last"]["test/top1"]
    assert out.splitlines()[0] == f"{run} on test"
    assert f"{100 * top1:.2f} %" in next(line for line in out.splitlines() if line.split()[0] == "top1")


def test_on_changed_data(run, capsys):
    assert kdbench("evaluate", str(run), "dataset.n_test=20", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "digit"], "dataset = digit: must be a name"),
        (["--dataset", "digits"], "dataset = "),  # 8x8 gray images do not fit
        (["dataset.nn=3"], "dataset.nn"),
        (["loss.tau=3"], "only changes to the dataset"),
    ],
)
def test_mistakes_are_messages(run, words, message, capsys):
    assert kdbench("evaluate", str(run), *words) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_a_folder_of_runs_is_not_a_run(run, capsys):
    assert kdbench("evaluate", str(run.parent)) == 1
    assert f"Runs in it: {run}" in capsys.readouterr().err


def test_against_another_run_and_against_itself(run, capsys):
    assert kdbench("evaluate", str(run), "--against", str(run), "--split", "train", "--json") == 0
    same = json.loads(capsys.readouterr().out)
    assert same["agreement"] == 1 and same["logit_distance"] == 0 == same["logit_shift"]
    assert same["tld"] == same["teacher_tld"] and same["feature_norm"] == same["teacher_feature_norm"] > 0


def test_against_a_teacher_that_is_not_there(run, capsys):
    assert kdbench("evaluate", str(run), "--against", "teacher") == 1
    assert "no teacher taught it" in capsys.readouterr().err


def copied(run: Path, folder: Path, **changes: str) -> Path:
    """The run in another folder, with `old -> new` in files named by keys: config_yaml, network_json, ..."""
    shutil.copytree(run, folder)
    for name, content in changes.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return folder


def crafted(run: Path, where: str) -> dict[str, str]:
    """The files of a stranger's run folder that name code of their own; it would leave a file `ran`."""
    if where.startswith("network"):
        about = json.loads((run / "network.json").read_text())
        code = {"_target_": "evil.run"}
        about["config"] = code if where == "network" else {**about["config"], "options": {"x": [code]}}
        return {"network_json": json.dumps(about)}
    tree = yaml.safe_load((run / "config.yaml").read_text())
    if where == "dataset":
        tree["dataset"] = {"_target_": "evil.run"}
    else:
        tree["dataset"][where] = "evil.run" if where == "reader" else {"_target_": "evil.run"}
    return {"config_yaml": yaml.safe_dump(tree)}


EVIL = "from pathlib import Path\nPath('ran').touch()\ndef run(*a, **k): return None\n"


@pytest.mark.parametrize("where", ["dataset", "augment", "reader", "network", "network options"])
def test_what_a_strangers_folder_names_is_not_run(run, where, tmp_path, capsys, monkeypatch):
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = copied(run, tmp_path / "theirs", **crafted(run, where))
    assert kdbench("evaluate", str(folder)) == 1
    err = capsys.readouterr().err
    assert "evil.run is not kdbench's own" in err and str(folder) in err and "--trust" in err
    smoke = ["debug=smoke", "trainer.progress=none", "loss=kl", "teacher.allow_chance=true"]
    if where.startswith("network"):
        assert kdbench("train", *smoke, f"teacher.run={folder}") == 1
        assert "teacher.trust=true" in capsys.readouterr().err
        assert kdbench("evaluate", str(run), "--against", str(folder)) == 1
    assert not (tmp_path / "ran").exists()
    if where != "network options":  # this run's network has no such key
        kdbench("evaluate", str(folder), "--trust")
        assert (tmp_path / "ran").exists()


def test_an_own_configuration_folder_is_a_word_of_trust(run, tmp_path, capsys):
    folder = copied(run, tmp_path / "theirs", **crafted(run, "network"))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.yaml").write_text("_target_: evil.run\n", encoding="utf-8")
    assert kdbench("evaluate", str(folder), "--config-dir", str(tmp_path)) == 1
    assert "not kdbench's own" not in capsys.readouterr().err


# 600 bytes that are 10^30 values once they are gone through
BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 31)) + "dataset: {x: *a30}"
DEEP = '{"a": ' * 890 + "1" + "}" * 890


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config_yaml", "dataset: {}\ntrainer: {}\ndataset: {}"), ("config_yaml", "dataset: {a: 1, a: 1}\ntrainer: {}"),
        ("config_yaml", BOMB), ("config_yaml", f"trainer: {{}}\ndataset: {DEEP}"),
        ("config_yaml", f"trainer: {{}}\ndataset: {{x: '[{'[' * 9000}'}}"),
        ("network_json", f'{{"name": "x", "config": {DEEP}, "info": [3, 3, 32]}}'),
        ("config_yaml", "a: [1"), ("config_yaml", "null"), ("config_yaml", "trainer: {}"),
        ("config_yaml", "dataset: 3"),
        ("config_yaml", "a: !!python/object:os.system {}"), ("config_yaml", "[" * 9000), ("config_yaml", "\x00\x1b[2J"),
        ("network_json", "{}"), ("network_json", "null"), ("network_json", "[" * 9000),
        ("network_json", '{"name": "x", "config": {"_target_": 1}, "info": [3, 3, 32]}'),
        ("network_json", '{"name": "x", "config": {}, "info": [1, 2]}'), ("network_json", '{"name": 1, "config": 2}'),
        ("result_json", "[" * 9000), ("result_json", "null"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(run, file, content, tmp_path, capsys):
    folder = copied(run, tmp_path / "theirs", **{file: content})
    assert kdbench("evaluate", str(folder)) == 1
    err = capsys.readouterr().err
    assert str(folder / file.replace("_", ".")) in err and "unexpected" not in err and "\x1b" not in err


@pytest.mark.parametrize("key", ["std", "size", "classes"])
def test_an_edited_network_json_is_no_other_network(run, tmp_path, capsys, key):
    about = json.loads((run / "network.json").read_text())
    value = about[key][::-1] if key == "classes" else about[key] + 1 if key == "size" else [9.0 for _ in about[key]]
    folder = copied(run, tmp_path / "edited", network_json=json.dumps(about | {key: value}))
    assert kdbench("evaluate", str(folder)) == 1
    assert f"edited/network.json: its {key} (" in (err := capsys.readouterr().err) and "put it back" in err


def test_a_flipped_bit_or_another_runs_weights_are_seen(run, tmp_path, capsys):
    folder = copied(run, tmp_path / "copy")
    raw = bytearray((folder / "student.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 64
    (folder / "student.safetensors").write_bytes(raw)
    assert kdbench("evaluate", str(folder)) == 1 and "student.safetensors: damaged" in capsys.readouterr().err
    state = load_file(run / "student.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, folder / "student.safetensors")
    assert kdbench("evaluate", str(folder)) == 1
    assert "not the weights that result.json is of" in capsys.readouterr().err


def pictures(root: Path, classes: Sequence[str], add: int = 0, kinds: Sequence[int] = (0, 1, 2)) -> None:
    """20 noisy 8x8 images a class: class k of `kinds` is brightest in channel k."""
    for name, kind in zip(classes, kinds, strict=True):
        (root / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.random.default_rng([kind, i]).integers(0, 60, (8, 8, 3)) + add
            pixels[:, :, kind] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def photo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("photos")
    pictures(base / "own", ("bear", "cat", "dog"))
    pictures(base / "shifted", ("bear", "cat", "dog"), add=60)
    pictures(base / "reordered", ("bear", "cat", "ant"), kinds=(1, 0, 2))
    pictures(base / "fewer", ("dog", "bear"), kinds=(2, 0))
    words = ["dataset=imagefolder", f"dataset.root={base / 'own'}", "teacher=none", "loss=ce", "student=resnet8"]
    words += ["schedule.epochs=4", "schedule.batch_size=8", "trainer.progress=none", f"hydra.run.dir={base / 'run'}"]
    assert kdbench("train", *words) == 0
    return base / "run"


def figures_of(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, float], str]:
    """What `evaluate` prints, and what it says besides."""
    capsys.readouterr()
    assert kdbench("evaluate", str(run), *words, "--json") == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_a_shift_of_the_data_is_not_measured_away(photo_run, capsys, caplog):
    root = f"dataset.root={photo_run.parent / 'shifted'}"
    about = json.loads((photo_run / "network.json").read_text())
    shifted, _ = figures_of(photo_run, capsys, root)
    assert "mean and std that it was trained with" in caplog.text
    caplog.clear()
    own = [f"dataset.mean={about['mean']}", f"dataset.std={about['std']}"]
    assert figures_of(photo_run, capsys, root, *own)[0] == shifted and not caplog.text
    at_home, _ = figures_of(photo_run, capsys)
    assert at_home["top1"] == 1 and shifted["nll"] > at_home["nll"] + 0.1


def test_data_of_other_classes_are_refused_by_name(photo_run, capsys):
    assert kdbench("evaluate", str(photo_run), f"dataset.root={photo_run.parent / 'reordered'}") == 1
    assert "It has 3 classes (bear, cat, dog), and not ant" in capsys.readouterr().err


def test_of_fewer_classes_those_are_asked_for(photo_run, capsys, caplog):
    figures, _ = figures_of(photo_run, capsys, f"dataset.root={photo_run.parent / 'fewer'}")
    assert figures["top1"] == 1 and "answers without 1 of its classes" in caplog.text and "(cat)" in caplog.text


def test_a_run_of_the_first_edition_is_seen_as_the_data_are(photo_run, tmp_path, capsys, caplog):
    old = Path(shutil.copytree(photo_run, tmp_path / "old"))
    about = json.loads((old / "network.json").read_text())
    kept = {key: about[key] for key in ("name", "config", "classes", "dataset")}
    (old / "network.json").write_text(json.dumps(kept | {"info": [3, 3, 8]}))
    assert figures_of(old, capsys)[0] == figures_of(photo_run, capsys)[0]
    said = [record.message for record in caplog.records if "not known; those of dataset" in record.message]
    assert len(said) == 1


def test_data_that_changed_since_the_training_are_told(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for number in range(24):
        place = tmp_path / "photos" / ("left", "right")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (8, 8, 3), np.uint8)).save(place / f"{number}.png")
    words = ["dataset=imagefolder", f"dataset.root={tmp_path / 'photos'}", f"dataset.cache={tmp_path / 'cache'}"]
    words += ["teacher=none", "loss=ce", "student=mlp", "student.hidden=[4]", "schedule.epochs=1", "schedule.warmup=0"]
    assert kdbench("train", *words, "trainer.progress=none", f"hydra.run.dir={tmp_path / 'run'}") == 0
    capsys.readouterr()
    assert kdbench("evaluate", str(tmp_path / "run")) == 0
    assert "its data are not those" not in "".join(capsys.readouterr())
    (tmp_path / "photos/left/0.png").rename(tmp_path / "photos/right/0.png")
    assert kdbench("evaluate", str(tmp_path / "run")) == 0
    said = "".join(capsys.readouterr())
    assert "its data are not those that it was trained and measured on: imagefolder: training" in said
