"""What a training tells while it runs: metrics.jsonl and TensorBoard behind one `write`; a bar or plain lines."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from kdbench.engine.loggers import Guarded
from kdbench.files import naming, write_atomically
from kdbench.results.metrics import CLASSIFICATION, Task, metric_of

log = logging.getLogger(__name__)
_WRITER = "_AsyncWriterThread"  # TensorBoard's, that writes the file
PLAIN_EVERY = 5.0  # seconds between plain lines: a log file stays readable


class RunLog:
    """Metrics of one run folder. `resume_epoch` > 0 continues a log: later lines and points are dropped first.

    sums: checksums of the rows so far, as a checkpoint has them: a row that is another one now is left out.
    """

    def __init__(
        self, folder: Path, resume_epoch: int = 0, sums: Sequence[int] | None = None, shown: Guarded | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._shown = shown
        self._file = folder / "metrics.jsonl"
        kept = _lines_up_to(self._file, resume_epoch, sums)
        self.sums = [zlib.crc32(line) for line in kept]
        if not resume_epoch:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        # Never emptied and filled again: a kill in between would lose every row.
        write_atomically(self._file, lambda temporary: temporary.write_bytes(b"".join(kept)))
        self._lines = open(self._file, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        purge = resume_epoch + 1 if resume_epoch else None
        with naming(folder):
            self._board = _quiet_board(folder, purge)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        """One line and one point a curve; `epoch` counts from 1."""
        line = json.dumps({"epoch": epoch, **values}) + "\n"
        with naming(self._file):
            self._lines.write(line)
            self._lines.flush()
        self.sums.append(zlib.crc32(line.encode()))
        with naming(self._file.parent):
            for name, value in values.items():
                if name == "step":  # for reading the file; as a curve it would be a straight line
                    continue
                self._board.add_scalar(board_tag(name), value, epoch)
        if self._shown is not None:
            self._shown.write(epoch, values)

    def text(self, name: str, text: str) -> None:
        with naming(self._file.parent):
            self._board.add_text(name, text)

    def figure(self, name: str, figure: Any) -> None:
        with naming(self._file.parent):
            self._board.add_figure(name, figure)

    def hparams_start(self, values: dict[str, object], trial: str) -> None:
        """Announce the run in the HParams tab, in the run's own event file.

        Not `add_hparams`: that makes a second run beside each run, and its Experiment summary hides the
        hyper-parameters that only later runs have. With a session start and no Experiment, TensorBoard takes the union.
        """
        from tensorboard.plugins.hparams import summary_v2

        scalars = {name: _hparam(value) for name, value in values.items() if value is not None}
        self._add_summary(summary_v2.hparams_pb(scalars, trial_id=trial))

    def end(self, ok: bool) -> None:
        """Say how the run ended, where it is shown."""
        self.hparams_end(ok)
        if self._shown is not None:
            self._shown.end(ok)

    def hparams_end(self, ok: bool) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        status = api_pb2.STATUS_SUCCESS if ok else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        about = SummaryMetadata.FromString(about.SerializeToString())
        self._add_summary(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about)]))

    def close(self) -> None:
        if self._shown is not None:
            self._shown.end(False)  # of a training that was stopped; one that ended has said so
        try:
            with naming(self._file):
                self._lines.close()
        finally:
            with naming(self._file.parent):
                self._board.close()

    def _add_summary(self, summary: Any) -> None:
        with naming(self._file.parent):
            self._board._get_file_writer().add_summary(summary)


class NoLog(RunLog):
    """Of a process that is not the first of its training: nothing is written."""

    def __init__(self) -> None:
        self.sums = []
        self._shown = None

    def write(self, epoch: int, values: dict[str, float]) -> None:
        pass

    def text(self, name: str, text: str) -> None:
        pass

    def figure(self, name: str, figure: Any) -> None:
        pass

    def _add_summary(self, summary: Any) -> None:
        pass

    def close(self) -> None:
        pass


def board_tag(name: str) -> str:
    """A figure's name in TensorBoard, which sorts by it: accuracies come first, in charts and in the HParams tab."""
    split, _, metric = name.rpartition("/")
    if metric == "top1" and split:
        return f"accuracy/{split}"
    return f"time/{name}" if name == "images_per_second" else name


def _quiet_board(folder: Path, purge: int | None) -> SummaryWriter:
    """TensorBoard's writer. What stops its thread (a full disk) is raised at the next point: no traceback beside it,
    also where its first words do not fit, while this process is still making it."""
    told = threading.excepthook
    threading.excepthook = lambda args: None if type(args.thread).__name__ == _WRITER else told(args)
    try:
        board = SummaryWriter(str(folder), purge_step=purge, flush_secs=5)
        with suppress(AttributeError):
            thread: Any = board._get_file_writer().event_writer._async_writer._worker
            thread._invoke_excepthook = lambda _thread: None
    finally:
        threading.excepthook = told
    return board


def _hparam(value: Any) -> bool | int | float | str:
    """As the tab can show it: a list, or a number that JSON does not have (inf, nan), as text."""
    shown = isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if shown else str(value)


def _lines_up_to(file: Path, epoch: int, sums: Sequence[int] | None = None) -> list[bytes]:
    """The whole lines of a metrics file up to an epoch. A damaged or edited one is named and left out, those after it
    stay; a half-written last line is dropped."""
    if not epoch:
        return []
    kept, wrong = [], 0
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines, start=1):
        known = _epoch(line)
        if not line.endswith(b"\n") or (known or 0) > epoch:
            continue
        if known is None or (sums is not None and zlib.crc32(line) not in sums):
            wrong += 1
            log.warning("%s: line %d is damaged or edited, and left out", file, number)
        else:
            kept.append(line)
    if sums is not None and len(kept) + wrong < len(sums):
        log.warning("%s: %d of its rows are gone", file, len(sums) - len(kept) - wrong)
    return kept


def _epoch(line: bytes) -> int | None:
    """Of a row; None for what is no UTF-8, no JSON, or no row."""
    try:
        return int(json.loads(line.decode("utf-8"))["epoch"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


class ProgressView:
    """Throughput, time left and the newest figures of one training."""

    def __init__(
        self,
        title: str,
        total_steps: int,
        done: int,
        per_step: int,
        kind: Literal["auto", "bar", "plain", "none"],
        task: Task = CLASSIFICATION,
        samples: str = "images",
    ) -> None:
        self._console = Console()
        self._title, self._total, self._done, self._per_step = title, total_steps, done, per_step
        self._task, self._samples = task, {"images": "img"}.get(samples, samples)
        self._kind = ("bar" if self._console.is_terminal else "plain") if kind == "auto" else kind
        self._start, self._first, self._last_line = time.monotonic(), done, time.monotonic()
        self._bar: Progress | None = None
        if self._kind == "bar":
            columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bar.start()
            self._shown = self._bar.add_task(title, total=total_steps, completed=done, note="")

    def advance(self) -> None:
        """One step is done (enqueued, on a GPU)."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._shown, completed=self._done)

    def epoch(self, epoch: int, epochs: int, values: dict[str, float]) -> None:
        """An epoch (counted from 1) ended with these figures."""
        elapsed = time.monotonic() - self._start
        rate = (self._done - self._first) * self._per_step / max(elapsed, 1e-9)
        left = (self._total - self._done) * self._per_step / max(rate, 1e-9)
        note = f"epoch {epoch}/{epochs}  {self._short(values)}  {rate:,.0f} {self._samples}/s"
        if self._bar is not None:
            self._bar.update(self._shown, note=note)
        elif self._kind == "plain" and (epoch == epochs or time.monotonic() - self._last_line > PLAIN_EVERY):
            self._last_line = time.monotonic()
            print(f"{self._title}: {note}, {left:.0f} s left", flush=True)

    def _short(self, values: dict[str, float]) -> str:
        names = {"train/loss": "loss", **{self._task.on(split): split for split in ("val", "test")}}
        return "  ".join(f"{names[k]} {metric_of(k).text(values[k])}" for k in names if k in values)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
