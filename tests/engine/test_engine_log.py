"""What TensorBoard reads back: curves, text, and one HParams row a run."""

import json
import math
import os
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from kdbench.engine.log import RunLog
from tests.support.full import POSIX, files_of_at_most
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
        "accuracy/train",
        "train/agreement",
        "lr",
        "time/images_per_second",
    }
    wanted |= {f"{s}/{k}" for s in ("val", "test") for k in ("top5", "nll", "ece", "agreement")}
    wanted |= {"accuracy/val", "accuracy/test"}
    assert wanted <= tags
    assert [e.step for e in board.Scalars("accuracy/test")] == [1, 2, 3]
    assert board.Scalars("accuracy/test")[-1].value == pytest.approx(result(folder)["last"]["test/top1"])
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


def rows(folder: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def log_of(folder: Path, epochs: int, resume: int = 0) -> None:
    log = RunLog(folder, resume)
    for epoch in range(resume + 1, epochs + 1):
        log.write(epoch, {"loss": 1.0 / epoch})
    log.close()


def test_rows_are_never_lost_by_a_kill_while_a_log_is_opened(tmp_path, monkeypatch):
    log_of(tmp_path, 5)

    def killed(*_arguments):
        raise KeyboardInterrupt

    for where in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, where, killed)
            with pytest.raises(KeyboardInterrupt):
                RunLog(tmp_path, 4)
        assert rows(tmp_path) == [1, 2, 3, 4, 5]
    log_of(tmp_path, 6, resume=4)
    assert rows(tmp_path) == [1, 2, 3, 4, 5, 6]


DAMAGED = [b"{not json}\n", b"\xff\xfe\x00\n", b"[1]\n", b"[" * 50_000 + b"\n", b'{"loss": 1}\n']


@pytest.mark.parametrize("damaged", DAMAGED, ids=lambda line: str(line[:9]))
def test_one_unreadable_row_is_named_and_the_later_ones_stay(tmp_path, caplog, damaged):
    log_of(tmp_path, 5)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = damaged
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"epoch": 6, "lo')
    log_of(tmp_path, 5, resume=5)
    assert rows(tmp_path) == [1, 2, 4, 5]
    assert "metrics.jsonl: line 3 is damaged" in caplog.text and caplog.text.count("damaged") == 1


def test_rows_are_those_of_the_checkpoint_or_are_left_out(tmp_path, caplog):
    log = RunLog(tmp_path)
    for epoch in range(1, 6):
        log.write(epoch, {"loss": 1.0 / epoch})
    log.close()
    sums, lines = log.sums[:4], (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for changed, left, said in (
        (lines, [1, 2, 3, 4], ""),
        ([lines[0], lines[1].replace(b"0.5", b"0.4"), *lines[2:]], [1, 3, 4], "line 2 is damaged or edited"),
        ([lines[0], *lines[3:]], [1, 4], "2 of its rows are gone"),
        ([], [], "4 of its rows are gone"),
    ):
        caplog.clear()
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(changed))
        again = RunLog(tmp_path, 4, sums)
        again.close()
        assert rows(tmp_path) == left and len(again.sums) == len(left)
        assert said in caplog.text if said else not caplog.text


def test_numbers_that_json_does_not_have_are_shown_as_text(tmp_path):
    log = RunLog(tmp_path)
    log.hparams_start({"loss.tau": math.inf, "lr": 0.5, "bad": math.nan, "low": -math.inf, "milestones": [1, 2]}, "run")
    log.close()
    shown = hparams(events(tmp_path))
    assert shown == {"loss.tau": "inf", "lr": 0.5, "bad": "nan", "low": "-inf", "milestones": "[1, 2]"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_said_with_the_file_and_without_a_traceback(tmp_path, capfd):
    log = RunLog(tmp_path)
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    os.dup2(full.fileno(), log._lines.fileno())
    with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
        log.write(1, {"loss": 1.0})
    assert capfd.readouterr().err == ""


@POSIX
@pytest.mark.parametrize("size", [0, 500, 3000])
def test_a_disk_that_fills_up_under_the_curves_is_said_with_the_folder(tmp_path, size, capfd):
    """TensorBoard writes in a thread of its own: what stops it is raised at the next point, text or end."""
    log = RunLog(tmp_path)
    with files_of_at_most(size):
        with pytest.raises(OSError, match="too large") as caught:
            for epoch in range(1, 2000):
                log.write(epoch, {"loss": 1.0, "test/top1": 0.5})
        assert str(caught.value.filename).startswith(str(tmp_path))
        for further in (lambda: log.text("formula", "x"), lambda: log.hparams_end(True), log.close):
            with pytest.raises(OSError, match="too large") as caught:
                for _ in range(1000):  # what a thread met is raised a little later
                    further()
                    time.sleep(0.002)
            assert str(caught.value.filename).startswith(str(tmp_path))
    assert "Traceback" not in capfd.readouterr().err


def test_a_board_whose_first_words_do_not_fit_prints_no_traceback(tmp_path, monkeypatch):
    """The thread that writes may end before the writer is made."""
    from tensorboard.summary.writer import event_file_writer

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    make = event_file_writer._AsyncWriter.__init__

    def made(self, *given: object) -> None:
        make(self, *given)
        self._writer.write = full
        self._byte_queue.put(b"words")
        self._worker.join(10)

    monkeypatch.setattr(event_file_writer._AsyncWriter, "__init__", made)
    printed: list[object] = []
    hook = printed.append
    monkeypatch.setattr("threading.excepthook", hook)
    with pytest.raises(OSError, match="No space left"):
        RunLog(tmp_path).write(1, {"loss": 1.0})
    assert threading.excepthook is hook and not printed
