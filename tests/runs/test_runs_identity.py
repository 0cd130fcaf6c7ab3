"""Identity: a folder is believed only for what its result is a result of, and the message names what differs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdbench import build
from kdbench.data.content import Content, Part
from kdbench.runs import identity as identities
from kdbench.runs.folder import describe_git
from kdbench.runs.identity import Identity, Kept, differences
from tests.support.shell import kdbench

FAKE = ["dataset=fake", "dataset.n=32", "dataset.n_test=16", "dataset.size=8", "dataset.num_classes=4"]
SHORT = ["student=mlp", "schedule.epochs=1", "schedule.batch_size=8", "trainer.device=cpu", "trainer.progress=none"]
ALONE = ["teacher=none", "loss=ce"]
PHOTOS = ["dataset=imagefolder", "dataset.root=photos", *SHORT, *ALONE]
HERE = "hydra.run.dir=run"


def photos(folder: str = "photos", count: int = 8, swapped: bool = False, seed: int = 0) -> Path:
    for label, name in enumerate(("cat", "dog")):
        place = Path(folder) / name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([seed, label, i]).integers(0, 90, (8, 8, 3))
            pixels[:, :, label ^ swapped] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.bmp")
    return Path(folder)


def result(folder: str = "run") -> dict:
    return json.loads((Path(folder) / "result.json").read_text())


@pytest.fixture
def train(capsys):
    """Exit code, and all that was said."""

    def run(*words: str) -> tuple[int, str]:
        code = kdbench("train", *words)
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return run


@pytest.fixture
def never_read(monkeypatch):
    """From here on no data may be read."""

    def forbid() -> None:
        monkeypatch.setattr(build, "construct", lambda *given: pytest.fail("the data were read"))
        build._loaded.clear()

    return forbid


def test_another_configuration_in_a_folder_is_refused_by_name(train):
    assert train(*FAKE, *SHORT, *ALONE, HERE)[0] == 0
    code, said = train(*FAKE, *SHORT, "teacher=none", "loss=focal", "optimizer.lr=0.5", "seed=7", HERE)
    assert code == 1 and "a finished run of another configuration" in said and "force=true" in said
    assert "loss ce -> focal" in said and "optimizer.lr 0.1 -> 0.5" in said and "seed 0 -> 7" in said
    assert result()["choices"]["loss"] == "ce"


def test_images_and_labels_that_changed_are_said(train):
    photos()
    assert train(*PHOTOS, HERE)[0] == 0
    photos(swapped=True, seed=1)
    code, said = train(*PHOTOS, HERE)
    assert code == 1 and "training images changed" in said and "something that has changed since" in said
    photos(count=12)
    assert re.search(r"imagefolder: 1\d -> 20 training images", train(*PHOTOS, HERE)[1])
    assert train(*PHOTOS, HERE, "force=true")[0] == 0 and result()["images"]["train"] == 20
    (Path("photos") / "dog").rename("photos/wolf")
    assert "class names" in train(*PHOTOS, HERE)[1]


def test_an_unfinished_run_is_not_continued_on_other_images(train):
    photos()
    assert train(*PHOTOS, HERE)[0] == 0
    Path("run/result.json").unlink()
    photos(swapped=True)
    code, said = train(*PHOTOS, HERE)
    assert code == 1 and "an unfinished run of this configuration" in said and "training images changed" in said


def test_what_has_not_changed_is_shown_without_reading_it(train, never_read):
    photos()
    assert train(*PHOTOS, HERE)[0] == 0
    never_read()
    code, said = train(*PHOTOS, HERE)
    assert code == 0 and "finished before" in said


def test_touched_and_copied_images_are_read_once_and_believed(train, never_read):
    photos()
    assert train(*PHOTOS, HERE)[0] == 0
    for path in Path("photos").rglob("*.bmp"):
        os.utime(path, ns=(1, 1))
    assert "finished before" in train(*PHOTOS, HERE)[1]
    never_read()
    assert "finished before" in train(*PHOTOS, HERE)[1]


def test_a_link_to_other_images_is_seen(train):
    photos("first"), photos("second", swapped=True)
    Path("photos").symlink_to("first")
    assert train(*PHOTOS, HERE)[0] == 0
    Path("photos").unlink()
    Path("photos").symlink_to("second")
    assert "training images changed" in train(*PHOTOS, HERE)[1]


def test_a_finished_run_on_a_disk_that_cannot_be_written_is_shown(train, monkeypatch):
    photos()
    assert train(*PHOTOS, HERE)[0] == 0
    os.utime("photos/cat/0.bmp", ns=(1, 1))

    def full(*given: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(identities, "write_json", full)
    assert "finished before" in train(*PHOTOS, HERE)[1]


def test_own_code_that_changed_is_another_run_and_named_in_a_folder_that_was_typed(train, monkeypatch):
    Path("my/loss").mkdir(parents=True)
    Path("my/loss/mine.yaml").write_text("# Mine.\n_target_: own_loss.Mine\nweights: {task: 1.0}\n")
    Path("own_loss.py").write_text("from own_helper import CE as Mine\n")
    Path("own_helper.py").write_text("from kdbench.losses.ce import CE\n")
    monkeypatch.syspath_prepend(os.getcwd())
    words = ["--config-dir", "my", *FAKE, *SHORT, "teacher=none", "loss=mine"]
    assert train(*words)[0] == 0 and train(*words, HERE)[0] == 0
    Path("own_helper.py").write_text("from kdbench.losses.ce import CE  # other\nX = 1\n")
    for name in ("own_loss", "own_helper"):
        sys.modules.pop(name, None)
    assert "finished before" not in train(*words)[1] and len(list(Path("outputs/runs/fake").iterdir())) == 2
    code, said = train(*words, HERE)
    assert code == 1 and "loss own_loss.Mine: its code changed (own_helper)" in said
    assert list(result()["identity"]["code"]["loss own_loss.Mine"]) == ["own_helper", "own_loss"]


def test_a_stored_teacher_of_ones_own_network_is_trained_anew_when_its_code_changes(train, monkeypatch):
    Path("my/student").mkdir(parents=True)
    Path("my/student/mine.yaml").write_text("# Mine.\n_target_: own_net.Net\n")
    text = """from kdbench.models.mlp import MLP
class Net(MLP):
    def __init__(self, num_classes: int, in_channels: int, image_size: int):
        super().__init__([8], num_classes=num_classes, in_channels=in_channels, image_size=image_size)
"""
    Path("own_net.py").write_text(text)
    monkeypatch.syspath_prepend(os.getcwd())
    words = [
        "--config-dir",
        "my",
        *FAKE,
        *SHORT,
        "teacher=mine",
        "teacher.schedule.epochs=1",
        "teacher.allow_chance=true",
    ]
    assert train(*words)[0] == 0
    Path("own_net.py").write_text(text.replace("[8]", "[9]"))
    sys.modules.pop("own_net")
    code, said = train(*words)
    assert code == 0 and "trained now, once" in said
    assert len([p for p in Path("outputs/teachers/fake").iterdir() if p.is_dir()]) == 2


def test_a_run_that_teaches_counts_by_its_weights_and_names_the_student_it_taught(train):
    teacher = ["teacher=resnet8", "teacher.run=t", "teacher.allow_chance=true", "loss=kl"]
    assert train(*FAKE, *SHORT, *ALONE, "hydra.run.dir=t")[0] == 0
    assert train(*FAKE, *SHORT, *teacher)[0] == 0 and train(*FAKE, *SHORT, *teacher, HERE)[0] == 0
    (first,) = Path("outputs/runs/fake").iterdir()
    assert first.name.startswith("mlp-mlp-kl"), "named after the network that taught"
    assert train(*FAKE, *SHORT, *ALONE, "hydra.run.dir=t", "schedule.lr=0.3", "force=true")[0] == 0
    assert "finished before" not in train(*FAKE, *SHORT, *teacher)[1]
    code, said = train(*FAKE, *SHORT, *teacher, HERE)
    assert code == 1 and "teacher.run: t holds something else now" in said


def test_an_edition_of_kdbench_with_other_figures_is_said(train, monkeypatch):
    assert train(*FAKE, *SHORT, *ALONE, HERE)[0] == 0
    monkeypatch.setattr("kdbench.counted.RESULT_FORMAT", 99)
    assert "figures have changed since (format 2 -> 99)" in train(*FAKE, *SHORT, *ALONE, HERE)[1]


def test_a_revised_loss_is_another_edition_for_its_own_runs_alone(train, monkeypatch):
    """Whether it is the loss itself or a part of a sum; both keep their hashes and folders."""
    both = ["loss=sum", "+loss@loss.parts.own=ce", "loss.weights={task: 0, kl: 0, crd: 0}"]
    losses = {"ce": ["loss=ce"], "bce": ["loss=bce"], "sum": both}
    alone = [*FAKE, *SHORT, "teacher=none"]
    lines = [[*alone, *loss, f"hydra.run.dir={name}"] for name, loss in losses.items()]
    assert [train(*line)[0] for line in lines] == [0, 0, 0]
    assert all("finished before" in train(*line)[1] for line in lines)
    monkeypatch.setattr("kdbench.counted.REVISED", {"kdbench.losses.ce.CE": 3})
    said = [train(*line) for line in lines]
    assert [code for code, _ in said] == [1, 0, 1] and "finished before" in said[1][1]
    assert all("kdbench's figures have changed since (format 2 -> 3)" in said[i][1] for i in (0, 2))
    assert train(*lines[0], "force=true")[0] == 0
    assert "finished before" in train(*lines[0])[1]


def test_renamed_moved_and_copied_folders_keep_their_identity(train, tmp_path, monkeypatch):
    photos()
    assert train(*PHOTOS, HERE)[0] == 0
    shutil.copytree(Path.cwd(), tmp_path / "elsewhere", copy_function=shutil.copyfile)  # times are lost
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("run").rename("renamed")
    assert "finished before" in train(*PHOTOS, "hydra.run.dir=renamed")[1]


def test_a_first_editions_run_is_shown_with_a_word(train):
    assert train(*FAKE, *SHORT, *ALONE, HERE)[0] == 0
    old = result()
    del old["identity"], old["config"]["teacher.checkpoint_key"]
    Path("run/result.json").write_text(json.dumps({**old, "hash": "ab", "format": 1}))
    Path("run/run.json").write_text('{"hash": "ab"}')
    code, said = train(*FAKE, *SHORT, *ALONE, HERE)
    assert code == 0 and "before kdbench kept with a run what it is of" in said and "finished before" in said
    assert "seed 0 -> 1" in train(*FAKE, *SHORT, *ALONE, HERE, "seed=1")[1]


def test_a_sweep_is_refused_before_its_first_point_runs(train):
    sweep = ["-m", *FAKE, *SHORT, "teacher=none", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=s${seed}"]
    assert train(*sweep, "loss=ce", "seed=0")[0] == 0
    code, said = train(*sweep, "loss=focal", "seed=1,0")
    assert code == 1 and "loss ce -> focal" in said and not Path("sweep/s1").exists()
    code, said = train(*sweep, "loss=ce,focal", "seed=5")
    assert code == 1 and "would hold two runs" in said and "loss=focal" in said and not Path("sweep/s5").exists()


def test_two_projects_may_share_a_folder_for_outputs(train, tmp_path, monkeypatch):
    shared = f"paths.outputs={tmp_path / 'shared'}"
    for name, swapped in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        photos(swapped=swapped)
        code, said = train(*PHOTOS, shared)
        assert code == 0 or "training images changed" in said, "never the other project's result"


def test_differences_in_words():
    part = Part(24, "a", "b")
    data = Content("photos", "x", 24, 2, "c", part, part, Part(6, "t", "l"), None)
    old = Identity(
        "h", named={"teacher.checkpoint": "1"}, code={"loss m.L": {"m": "1", "n": "1"}}, data=data, teacher="w"
    )
    assert differences(old, old) == [] == differences(old, Identity.read(json.loads(json.dumps(old.as_json())), {}))
    assert differences(old, replace(old, data=replace(data, rows=48))) == ["photos: 24 -> 48 training images"]
    assert differences(old, replace(old, teacher="v")) == ["the teacher's weights are others"]
    assert differences(old, replace(old, hash="i")) == ["another configuration"]
    other = replace(old, hash="i", code={"loss m.L": {"m": "2", "n": "1"}}, settings={"optimizer.lr": 0.5, "seed": 0})
    told = differences(replace(old, settings={"optimizer.lr": 0.1, "seed": 0}), other)
    assert told == ["optimizer.lr 0.1 -> 0.5", "loss m.L: its code changed (m)"]
    later = replace(old, hash="i", settings={"seed": 0, "dataset.trim": True})  # at false it is no part of a run
    assert differences(later, replace(old, settings={"seed": 0})) == ["dataset.trim true -> false"]


def test_the_start_of_a_run_says_what_it_is_of(train):
    assert train(*FAKE, *SHORT, *ALONE, HERE)[0] == 0
    kept = Kept(Path("run"))
    assert kept.start["identity"] == result()["identity"] and kept.unchanged()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are no UTF-8")
def test_a_repository_with_a_name_in_another_encoding_is_described(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    for words in ("init -q", "config core.quotepath false", "add .", "-c user.name=a -c user.email=a commit -qm one"):
        with open(file, "a") as text:
            text.write("a line\n")
        subprocess.run(["git", *words.split()], check=True)
    describe_git.cache_clear()
    try:
        found = describe_git()
    finally:
        describe_git.cache_clear()
    assert found is not None and found["changed"] and len(str(found["commit"])) == 40
