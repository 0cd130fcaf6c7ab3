"""kdbench in Python: a notebook's ten lines."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import kdbench
from kdbench.errors import UserError

TINY = "debug=smoke trainer.progress=none teacher=none loss=ce"


def test_a_training_is_a_folder_and_a_result_and_leaves_the_process_as_it_was():
    before = sys.argv, list(logging.getLogger().handlers), logging.getLogger().level
    run = kdbench.train(f"{TINY} seed=3")
    assert run.folder.is_dir() and run.result.seed == 3 and 0 <= run.result.last["test/top1"] <= 1
    assert (sys.argv, list(logging.getLogger().handlers), logging.getLogger().level) == before
    assert GlobalHydra.instance().hydra is None
    again = kdbench.train([*TINY.split(), "seed=3"])  # finished: it is read
    assert again.folder == run.folder and again.result == run.result
    assert kdbench.compose("loss=dkd").loss["_target_"].endswith("DKD")
    student = kdbench.load(run)
    picture = Image.new("RGB", (20, 10))
    assert student.network(student.transform(picture)[None]).logits.shape == (1, 10)
    assert student.predict([picture]).sum().item() == pytest.approx(1, abs=1e-5)
    if run.result.best is not None:
        assert kdbench.load(run, "best.safetensors").classes == student.classes


def test_threads_take_turns():
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda seed: kdbench.train(f"{TINY} seed={seed}"), (1, 2, 1)))
        losses = list(threads.map(lambda name: kdbench.compose(f"loss={name}").loss["_target_"], ["dkd", "kl"] * 3))
    assert [run.result.seed for run in found] == [1, 2, 1] and found[0] == found[2]
    assert [name.rpartition(".")[2] for name in losses] == ["DKD", "KL"] * 3


def test_a_student_that_another_thread_loads_changes_no_training():
    words = f"{TINY} student=mlp student.dropout=0.5"
    alone = kdbench.train(f"{words} paths.outputs=alone")
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(kdbench.train, f"{words} paths.outputs=beside")
        while not found.done():
            kdbench.load(alone)
    assert found.result().result.student.weights == alone.result.student.weights


def test_a_sweep_and_its_table():
    found = kdbench.sweep(f"{TINY} seed=0,1")
    assert [run.result.seed for run in found] == [0, 1]
    table = kdbench.read_runs("outputs/runs")
    assert list(kdbench.runs("outputs/runs")) == list(table)
    pandas = pytest.importorskip("pandas")
    assert isinstance(table, pandas.DataFrame) and len(table) == 2
    assert set(table["seed"]) == {0, 1} and table["test/top1"].between(0, 1).all()
    assert {"dataset", "loss", "config.schedule.epochs", "folder", "best/val/top1"} <= set(table.columns)


def test_without_pandas_the_table_is_a_list(monkeypatch):
    kdbench.train(TINY)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert [row["loss"] for row in kdbench.read_runs()] == ["ce"]


@pytest.mark.parametrize("words", ["loss=kll", "loss.tau=-1", "-m seed=0,1", "--cfg job", "name='open", "--epochs 3"])
def test_what_is_no_training_is_refused(words):
    with pytest.raises(UserError):
        kdbench.train(words)
    assert not list(Path().rglob("config.yaml"))


def test_words_are_one_line_or_several_and_wrong_ones_are_explained():
    assert kdbench.compose("loss=dkd", ["loss.tau=2", "seed=3"]).seed == 3
    with initialize_config_module("kdbench.configs", version_base="1.3"):
        for words, said in (("tau=4", "Did you mean loss.tau=4"), ("loss=kd", "Did you mean loss=kl")):
            with pytest.raises(UserError, match=said):
                kdbench.compose(words)
        assert GlobalHydra.instance().is_initialized(), "the notebook's own"
    with pytest.raises(UserError, match=r"Did you mean loss.tau=4,5"):
        kdbench.sweep("tau=4,5", "debug=smoke")


def test_what_is_no_list_of_inputs_is_refused():
    student = kdbench.load(kdbench.train(TINY))
    for inputs in ("photo.jpg", [], Image.new("RGB", (8, 8))):
        with pytest.raises(UserError, match=r"inputs = .*: must be a list of one input or more"):
            student.predict(inputs)


def test_importing_it_loads_nothing_and_its_names_are_there():
    code = "import sys, kdbench; assert not {'torch', 'hydra'} & set(sys.modules); print(*dir(kdbench))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"train", "sweep", "load", "read_runs", "compose"} <= set(done.stdout.split())
    assert (Path(kdbench.__file__).parent / "py.typed").exists()
