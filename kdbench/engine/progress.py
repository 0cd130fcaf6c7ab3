"""What a person sees while a training runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from kdbench.results.metrics import CLASSIFICATION, Task, metric_of

PLAIN_EVERY = 5.0  # seconds between plain lines: a log file stays readable


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
