"""Whole epochs of `kdbench train`, and its steps beside others', against what is promised."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from device_check.check import PAIR, SMALL, Check, Found, kdbench, set_aside
from kdbench.bench.machine import peak_memory
from kdbench.engine.device import place
from kdbench.engine.options import TrainerOptions

SOLO, SWEEP = 180.0, 45.0  # seconds a run that are promised on one H100: alone, and in a cohort of 16
# What 240 epochs of a first run have the teacher compute: the share of samples in one of 162 views not seen before. The
# epochs that are timed are the first ones, in which nearly all are.
FILLED = 162 / 240 * (1 - math.exp(-240 / 162))


def run(check: Check) -> None:
    words = ["teacher.table=on", f"trainer.cuda_graph={check.on}"]
    _goal(check, "one run, its table is filled", words, None)
    _goal(check, "one run, table full", [*words, "dataset/augment=none"], SOLO)  # one view: full after an epoch
    check.judge("a first run", lambda: _first(check))


def _first(check: Check) -> Found:
    """Of the time of an epoch that fills a table, and of one that finds it full."""
    filled, full = (check.figures[f"one run, {name}"] for name in ("its table is filled", "table full"))
    epoch = full["epoch"] + FILLED * max(0.0, filled["epoch"] - full["epoch"])
    seconds = filled["start"] + 240 * epoch
    ok = seconds <= SOLO if check.cuda and not check.quick else None
    return ok, f"240 epochs {seconds:.0f} s (promised: {SOLO:.0f}), as {FILLED:.2f} of what is asked has to be computed"


def live(check: Check) -> None:
    _goal(check, "one run, live teacher", ["teacher.table=off", f"trainer.cuda_graph={check.on}"], SOLO)


def eager(check: Check) -> None:
    _goal(check, "one run, table, not recorded", ["teacher.table=on", "trainer.cuda_graph=off"], None, epochs=3)


def sweep(check: Check) -> None:
    runs = 2 if check.quick else 16
    words = ["teacher.table=on", f"trainer.cuda_graph={check.on}", "-m", "hydra/launcher=cohort"]
    _goal(check, f"{runs} runs, table", [*words, f"seeds.init=range({runs})"], SWEEP, runs)


def _goal(check: Check, name: str, words: Sequence[str], limit: float | None, runs: int = 1, epochs: int = 5) -> None:
    """Some epochs, and what 240 of them would take."""
    fixed = ["teacher.schedule.epochs=1", "teacher.allow_chance=true", "trainer.progress=none", "force=true"]
    fixed += [f"paths.outputs={check.scratch / 'goals'}", f"schedule.epochs={3 if check.quick else epochs}"]

    def goal() -> Found:
        found = timed_epochs([*check.whole, *fixed, *words])
        each = (found["start"] + 240 * found["epoch"]) / runs
        check.figures[name] = found | {"seconds a run of 240 epochs": each}
        said = f"{found['epoch']:.3f} s an epoch, start {found['start']:.1f} s: 240 epochs {each:.0f} s a run"
        promised = f" (promised: {limit:.0f})" if limit else ""
        ok = each <= limit if limit and check.cuda and not check.quick else None
        return ok, f"{said}{promised}; peak {found['peak'] / 2**30:.2f} GiB"

    check.judge(name, goal)


def timed_epochs(words: Sequence[str]) -> dict[str, float]:
    """Seconds an epoch of `kdbench train words...` in this process, from the second one on: steps, evaluation, log and
    checkpoint, and a table's missing entries. `start`: what the command took besides, its teacher's training too;
    `peak`: bytes of memory."""
    from kdbench import cli
    from kdbench.engine.log import ProgressView

    ends: list[tuple[int, float]] = []
    epoch = ProgressView.epoch

    def noted(view: ProgressView, number: int, epochs: int, values: dict[str, float]) -> None:
        epoch(view, number, epochs, values)
        ends.append((number, time.perf_counter()))

    with set_aside(ProgressView, "epoch", noted), set_aside(sys, "argv", ["kdbench", "train", *words]):
        begin = time.perf_counter()
        try:
            code = cli.main()
        except SystemExit as left:
            code = left.code
        seconds = time.perf_counter() - begin
    if code:
        raise RuntimeError(f"kdbench train ended with {code}")
    last = max(i for i, (number, _) in enumerate(ends) if number == 1)  # of the students, after the teacher's own
    marks = [at for _, at in ends[last:]]
    each = sorted(b - a for a, b in pairwise(marks))
    middle = each[len(each) // 2]
    peak = float(peak_memory(place(TrainerOptions())))
    return {"epoch": middle, "start": seconds - middle * len(marks), "peak": peak}


def bench(check: Check) -> None:
    pairs = ["resnet8:resnet8"] if check.quick else ["resnet56:resnet20", "resnet32x4:resnet8x4"]
    for pair in pairs:
        check.judge(f"bench {pair}", lambda p=pair: _pair(check, p))  # type: ignore[misc]


def _pair(check: Check, pair: str) -> Found:
    teacher, _, student = pair.partition(":")
    file, quick = check.scratch / "bench.json", check.quick
    words = [*SMALL, f"paths.outputs={check.scratch}"] if quick else ["dataset=cifar100", *PAIR]
    words += [f"teacher={teacher}", f"student={student}", f"trainer.cuda_graph={check.on}"]
    if check.peer:
        script = Path(__file__).parent.parent / "bench_peer.py"
        command = [sys.executable, script, "--peer", check.peer, "--teacher", teacher, "--student", student]
        words.append(f"--against=RepDistiller={shlex.join(map(str, command))}")
    members = 2 if quick else 16
    seconds = 0.1 if quick else check.seconds
    kdbench("bench", "--baseline", f"--members={members}", f"--seconds={seconds}", f"--json={file}", *words)
    check.figures[pair] = json.loads(file.read_text(encoding="utf-8"))
    ratios = check.figures[pair]["ratios"]
    return None, "; ".join(f"{name}: {ratio['median']:.1f}" for name, ratio in ratios.items())
