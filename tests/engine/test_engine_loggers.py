"""Loggers beside TensorBoard: offline modes, a service that fails, and none imported without being asked for."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from kdbench.engine.log import RunLog, board_tag
from kdbench.engine.loggers import KEPT, About, Guarded
from tests.support.shell import kdbench

SMOKE = ["debug=smoke", "teacher=none", "loss=ce", "trainer.progress=none"]


class Listed:
    """A service of the test's own."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[object] = []

    def start(self, about, known):
        self._do("start", known)
        return "mine"

    def write(self, epoch, values):
        self._do("write", epoch, dict(values))

    def end(self, ok):
        self._do("end", ok)

    def _do(self, what, *arguments):
        if what == self.fails:
            raise ConnectionError("gone")
        self.calls.append((what, *arguments))


def test_rows_go_to_the_service_and_a_resumed_run_is_the_same_one(tmp_path):
    service = Listed()
    log = RunLog(tmp_path, 0, None, Guarded(service, About(tmp_path, {}), False))
    log.write(1, {"val/top1": 0.5})
    log.end(True)
    log.close()
    assert service.calls == [("start", None), ("write", 1, {"val/top1": 0.5}), ("end", True)]
    assert json.loads((tmp_path / KEPT).read_text()) == {"Listed": "mine"}
    again = Listed()
    Guarded(again, About(tmp_path, {}), True)
    assert again.calls == [("start", "mine")]


@pytest.mark.parametrize("fails", ["start", "write", "end"])
def test_a_service_that_fails_ends_no_training(tmp_path, fails, caplog):
    service = Listed(fails)
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path, 0, None, Guarded(service, About(tmp_path, {}), False))
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 0.5})
        log.end(False)
        log.close()
    assert caplog.text.count("ConnectionError: gone") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_board_opens_on_accuracies():
    names = ["images_per_second", "epsilon", "val/top1", "test/top1", "train/top1", "test/nll", "lr"]
    assert sorted(map(board_tag, names))[:3] == ["accuracy/test", "accuracy/train", "accuracy/val"]


def test_mlflow_without_a_server():
    pytest.importorskip("mlflow"), pytest.importorskip("sqlalchemy")
    assert kdbench("train", *SMOKE, "logger=mlflow", "hydra.run.dir=run") == 0
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri="sqlite:///outputs/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("kdbench").experiment_id])
    assert len(found) == 1 and found[0].info.status == "FINISHED"
    last = json.loads(Path("run/result.json").read_text())["last"]
    assert found[0].data.metrics["test/top1"] == pytest.approx(last["test/top1"])
    assert found[0].data.params["schedule.epochs"] == "2"


def test_wandb_offline(monkeypatch):
    pytest.importorskip("wandb")
    assert kdbench("train", *SMOKE, "logger=wandb", "logger.mode=offline", "hydra.run.dir=run") == 0
    assert list(Path("outputs/wandb").glob("offline-run-*/*.wandb"))
    assert "warning" not in Path("run/train.log").read_text().lower()


def test_trackio_on_this_machine(monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    code = f"""
import sys
from kdbench import cli
sys.argv = ["kdbench", "train", *{SMOKE!r}, "logger=trackio", "hydra.run.dir=run"]
raise SystemExit(cli.main())"""
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import os

    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0 and "go on" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert list((tmp_path / "trackio").glob("kdbench*"))


def test_nothing_of_an_extra_is_imported_without_being_asked_for():
    extras = ["wandb", "mlflow", "trackio", "onnx", "onnxruntime", "onnxscript", "pandas", "pyarrow", "mkdocs"]
    code = f"""
import sys
from kdbench import cli
sys.argv = ["kdbench", "train", *{SMOKE!r}, "hydra.run.dir=run"]
assert cli.main() == 0
assert not {{"torchvision", "timm", "sklearn"}} & set(sys.modules)  # each a second or more before the first step
for words in (["list", "logger"], ["compare", "run"], ["evaluate", "run"], ["explain", "trainer"]):
    sys.argv = ["kdbench", *words]
    assert cli.main() == 0, words
print(sorted(set({extras!r}) & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_service_that_is_not_installed_is_said_before_anything_else(monkeypatch, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kdbench("train", *SMOKE, "logger=wandb", "hydra.run.dir=run") == 1
    assert "pip install 'kdbench[wandb]'" in capsys.readouterr().err
    assert not Path("run/config.yaml").exists()
