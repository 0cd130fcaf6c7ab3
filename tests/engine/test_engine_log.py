"""What TensorBoard reads back: curves, text, and one HParams row a run."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.support.shell import TINY, kdbench, result, tiny, train


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def hparams(board: EventAccumulator) -> dict:
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    return {k: getattr(v, v.WhichOneof("kind")) for k, v in values.items()}


def test_curves_text_and_ends():
    folder = train()
    board = events(folder)
    tags = set(board.Tags()["scalars"])
    wanted = {
        "train/loss",
        "train/loss_task",
        "train/loss_distill",
        "train/top1",
        "train/agreement",
        "lr",
        "images_per_second",
    }
    wanted |= {f"{s}/{k}" for s in ("val", "test") for k in ("top1", "top5", "nll", "ece", "agreement")}
    assert wanted <= tags
    assert [e.step for e in board.Scalars("test/top1")] == [1, 2, 3]
    assert board.Scalars("test/top1")[-1].value == pytest.approx(result(folder)["last"]["test/top1"])
    assert any("formula" in tag for tag in board.Tags()["tensors"]) and any(
        "config" in tag for tag in board.Tags()["tensors"]
    )
    assert "_hparams_/session_end_info" in board.summary_metadata


def test_a_sweep_has_one_row_a_run_with_its_own_values():
    words = [*TINY, "schedule.epochs=1", "paths.runs=runs"]
    assert kdbench("train", "-m", *words, "loss=kl", "loss.tau=1,2,4") == 0
    assert kdbench("train", "-m", *words, "loss=mse", "seed=1") == 0
    folders = sorted(p.parent for p in Path("runs").rglob("result.json"))
    assert len(folders) == 4
    rows = [hparams(events(folder)) for folder in folders]
    assert sorted(row["loss.tau"] for row in rows if row["loss"] == "kl") == [1, 2, 4]
    assert [row["seed"] for row in rows if row["loss"] == "mse"] == [1]
    assert all(len(list(folder.glob("events.*"))) == 1 for folder in folders)
    assert not [p for p in Path("runs").rglob("events.*") if p.parent not in folders]


def test_a_sweep_skips_what_is_finished():
    words = ["train", "-m", *tiny("teacher=none"), "schedule.epochs=1", "paths.runs=runs", "teacher=none", "loss=ce"]
    assert kdbench(*words, "seed=0,1") == 0
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}
    assert kdbench(*words, "seed=0,1,2") == 0
    after = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("result.json")}
    assert len(after) == 3 and before.items() <= after.items()
