"""Whether what makes training fast gives the numbers of the plain way."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from device_check.check import CLOSE, SMALL, Check, Found, distance, kdbench, set_aside, state
from kdbench.engine.learner import Learner
from kdbench.engine.rehearsal import why_not
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR
from kdbench.tables import store

GRAPHS = "graphs"
CASES: dict[str, tuple[list[str], int]] = {  # words, and how many students
    "plain": ([], 1), "live teacher": (["teacher.table=off"], 1),
    "ema and clip": (["trainer.ema=0.9", "trainer.clip=1"], 1),
    "adamw": (["optimizer=adamw", "optimizer.lr=0.001"], 1), "parts of a batch": (["trainer.accumulate=2"], 1),
    "dropout": (["student=mlp", "student.dropout=0.3", "teacher=mlp"], 2),
    "cohort of 4": ([], 4), "sp in a cohort": (["loss=sp"], 4), "crd in a cohort": (["loss=crd"], 4),
    "features in a cohort": (["loss=at"], 2),
}  # fmt: skip


def equal(check: Check) -> None:
    check.judge("eager steps repeat themselves", lambda: _repeats(check))
    check.judge("what trainer.cuda_graph=auto tries", lambda: _trial(check), GRAPHS)
    for name, (words, count) in CASES.items():
        check.on_cuda(f"recorded: {name}", lambda w=words, k=count: _recorded(check, w, k), GRAPHS)  # type: ignore[misc]
    check.on_cuda("recorded: a table of windows", lambda: _windows(check), GRAPHS)
    check.on_cuda("a second training in the process", lambda: _twice(check), GRAPHS)
    check.on_cuda("a checkpoint of eager steps goes on recorded", lambda: _resumed_recorded(check), GRAPHS)
    check.on_cuda("no step waits for the device", lambda: _sync(check))
    check.on_cuda("a step that waits is not recorded and harms nothing", lambda: _waits(check), GRAPHS)


def _trial(check: Check) -> Found:
    """In this process, so that what breaks is seen."""
    if not check.cuda:
        return None, "needs a CUDA device"
    begin = time.perf_counter()
    why = why_not("cuda")
    return not why, why or f"ends where plain steps end, {time.perf_counter() - begin:.1f} s and the start of a process"


def _recorded(check: Check, words: Sequence[str], count: int) -> Found:
    eager, again, graph = (
        check.trained([*words, f"trainer.cuda_graph={mode}"], count) for mode in ("off", "off", check.on)
    )
    far = max(distance(a, b) for a, b in zip(graph, eager, strict=True))
    noise = max(distance(a, b) for a, b in zip(again, eager, strict=True))
    limit = 1e-6 if noise == 0 else max(CLOSE, 10 * noise)
    return far <= limit, f"relative distance {far:.2g}; two eager runs differ by {noise:.2g}"


def _windows(check: Check) -> Found:
    """Of a table that is too large for the device, only what the next steps ask for is there."""
    with set_aside(store, "ON_DEVICE", 0.0):
        return _recorded(check, [], 1)


def _repeats(check: Check) -> Found:
    plain = distance(*(check.trained([])[0] for _ in range(2)))
    strict = distance(*(check.trained(["trainer.deterministic=true"])[0] for _ in range(2)))
    return strict == 0.0, f"two runs differ by {plain:.2g}, with trainer.deterministic by {strict:.2g}"


def _twice(check: Check) -> Found:
    ended = []
    for _ in range(3):
        ended.append(check.trained([f"trainer.cuda_graph={check.on}", "loss=sp"])[0])
        gc.collect()
        torch.cuda.empty_cache()
    far = max(distance(other, ended[0]) for other in ended[1:])
    return far <= CLOSE, f"relative distance {far:.2g}"


def _resumed_recorded(check: Check) -> Found:
    bench = check.bench()
    cut = bench.learner()
    check.epochs(bench, [cut], 1)
    bench = check.bench(f"trainer.cuda_graph={check.on}")
    resumed = bench.learner()
    resumed.restore(cut.state())
    check.epochs(bench, [resumed], 2, first=1)
    far = distance(state(resumed), check.trained([])[0])
    return far <= CLOSE, f"relative distance {far:.2g}"


def _waits(check: Check) -> Found:
    bench = check.bench(f"trainer.cuda_graph={check.on}")
    learner, update = bench.learner(), Learner.update

    def waiting(self: Learner, *data: Any) -> None:
        update(self, *data)
        float(self.lr + self.meters.step)

    learner.update = waiting.__get__(learner)  # type: ignore[method-assign]
    check.epochs(bench, [learner], 1)
    after = distance(check.trained([f"trainer.cuda_graph={check.on}"])[0], check.trained([])[0])
    said = type(learner.failure).__name__
    return said == "UserError" and after <= CLOSE, f"refused with {said}; the next training differs by {after:.2g}"


def _sync(check: Check) -> Found:
    for served in ("table", "live"):
        bench = check.bench()
        batches, teacher = (bench.table() if served == "table" else None) or bench.live()
        learner = bench.learner()
        learner.begin_epoch(0)
        for number, batch in enumerate(batches.epoch(0, 1)):
            if check.cuda:
                torch.cuda.set_sync_debug_mode("error" if number == 3 else "default")
            learner.step(batch, teacher(batch))
            if check.cuda:
                torch.cuda.set_sync_debug_mode("default")
            if number == 3:
                break
        if learner.failure:
            return False, f"{served}: {learner.failure}"
    return True, "table and live teacher"


TURNED = ["dataset/augment=rotations"]
NEEDS = {"crld": ["dataset/augment=weak_strong"], "hsakd": TURNED, "sskd": TURNED}  # what a loss cannot do without
WAITING = ("kdsvd",)  # torch asks the device whether a decomposition has converged: its steps are not recorded
LEFT_OUT = ("aekd", "camkd", "deit", "vitkd")  # they need several teachers, a token for the teacher, or transformers


def losses(check: Check) -> None:
    """On the smallest networks: there are many losses."""
    check.words = SMALL
    names = sorted(path.stem for path in (Path(CONFIG_DIR) / "loss").glob("*.yaml"))
    for name in (name for name in names if name not in LEFT_OUT):
        check.on_cuda(f"loss {name}", lambda n=name: _loss(check, n), GRAPHS)  # type: ignore[misc]


def _loss(check: Check, name: str) -> Found:
    ended = []
    for mode in ("off", check.on):
        bench = check.bench(
            f"loss={name}", *NEEDS.get(name, []), "dataset.validation=0.1", f"trainer.cuda_graph={mode}"
        )
        learner = bench.learner()
        try:
            bench.steps(bench.live(), [learner])(8)
        except UserError as error:
            if name in WAITING and "waits for the device" in str(error):
                return True, "not recorded, and says so: its step waits for the device"
            raise
        ended.append(state(learner))
    far = distance(ended[1], ended[0])
    return far <= 1e-2, f"relative distance {far:.2g}"


def follow(check: Check) -> None:
    for precision in ("bf16", "tf32", "fp16") if check.cuda else ("bf16",):
        check.judge(f"{precision} follows fp32", lambda p=precision: _follows(check, p))  # type: ignore[misc]
    check.judge("a table equals the live teacher", lambda: _table(check))
    check.judge("a cohort equals solo runs", lambda: _cohort(check))
    check.judge("a resumed run equals the whole one", lambda: _resume(check))


def compiled(check: Check) -> None:
    """What a compiled student's numbers are: the CPU has a compiler too, but not the minute that it takes."""
    if check.cuda:
        words = ("trainer.compile=on", f"trainer.cuda_graph={check.on}")
        check.judge("a compiled student follows", lambda: _follows(check, "fp32", *words, limit=0.05), "compile")


def _follows(check: Check, precision: str, *words: str, limit: float = 0.7) -> Found:
    """How far the weights are from float32's, in parts of the way that was trained."""
    start = state(check.bench("trainer.precision=fp32").learner())
    full = check.trained(["trainer.precision=fp32"])[0]
    other = check.trained([f"trainer.precision={precision}", *words])[0]
    far = distance(other, full) / max(distance(start, full), 1e-12)
    return far < limit, f"{far:.2g} of the way that was trained"


def _table(check: Check) -> Found:
    bench = check.bench()
    live, table = (bench.learner() for _ in range(2))
    bench.steps(bench.live(), [live])(6)
    bench.steps(bench.table() or bench.live(), [table])(6)
    far = distance(state(table), state(live))
    return far <= (CLOSE if check.cuda else 0.0), f"relative distance {far:.2g}"


def _cohort(check: Check) -> Found:
    together, alone = check.trained([], 3), check.trained([])[0]
    far = max(distance(member, alone) for member in together)
    return far <= (CLOSE if check.cuda else 0.0), f"relative distance {far:.2g}"


def _resume(check: Check) -> Found:
    words = ["train", *SMALL, "schedule.epochs=2", "teacher=none", "loss=ce", "trainer.progress=none"]
    words = [*words, "trainer.deterministic=true", f"trainer.cuda_graph={check.on}"]
    whole, cut = check.scratch / "whole", check.scratch / "cut"
    kdbench(*words, f"hydra.run.dir={whole}")
    stop = "import kdbench.engine.trainer as t, kdbench.cli as c, os, sys\nend = t._end_epoch\n"
    stop += "def once(*a):\n    end(*a)\n    a[4].flush()\n    os._exit(9)\nt._end_epoch = once\n"
    stop += f"sys.argv = {['kdbench', *words, f'hydra.run.dir={cut}']!r}\nc.main()"
    killed = subprocess.run([sys.executable, "-c", stop], capture_output=True, text=True).returncode
    kdbench(*words, f"hydra.run.dir={cut}")
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (whole, cut)]
    hashes = [result["student"]["weights"] for result in results]
    return killed == 9 and hashes[0] == hashes[1], f"same weights: {hashes[0] == hashes[1]}"
