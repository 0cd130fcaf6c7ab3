"""Check on this machine that what makes kdbench fast changes nothing, and time it against the goals.

    python scripts/device_check.py [--out FOLDER] [--only goals,equal] [--minutes 9] [--quick] [--seconds 10]

Each section runs in a process of its own with a time limit, so that a broken one (a sticky CUDA error, a compilation
without end) harms no other; device_check.json and device_check.md in FOLDER are written anew after every section, goals
first, so that a check that is stopped has shown what it found so far. The page ends with the flags of
kdbench/engine/device.py that the results justify. `--quick` runs every section with tiny sizes, also on a CPU, where
nothing is recorded: so nothing in here is untried but the device. Exits with 1 if a check failed.

  goals    whole epochs of `kdbench train` against what is promised: one run, and a sweep of 16
  equal    recorded steps against eager ones: schedules, optimizers, last batches, dropout, cohorts, resume, failures
  kernels  where a step's time goes on the device
  matrix   a step in every precision, memory layout and way to run it
  cohort   steps of many students: in turn, as one graph, as a vmapped stack
  losses   every loss, recorded and eager
  follow   other precisions against float32, a compiled student, a table, a cohort, a resumed run
  bench    `kdbench bench` beside the plain loop
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from kdbench.bench.machine import describe, measure_roofline, peak_memory
from kdbench.bench.standin import stand_in
from kdbench.bench.timing import Contender, race
from kdbench.bench.workbench import Workbench, prepare
from kdbench.build import load_data, make_recipe
from kdbench.configure import register
from kdbench.engine.device import own_stream, place
from kdbench.engine.evaluate import all_logits
from kdbench.engine.graph import cohort_graph
from kdbench.engine.learner import Learner, train_epoch
from kdbench.engine.options import TrainerOptions
from kdbench.paths import CONFIG_DIR

SECTIONS = {  # and their time limits in seconds
    "goals": 290, "equal": 150, "kernels": 45, "matrix": 150, "cohort": 150, "losses": 150, "follow": 180, "bench": 240,
}  # fmt: skip
SMALL = [
    "dataset=fake", "dataset.n=210", "dataset.n_test=64", "dataset.size=16", "teacher=resnet8", "student=resnet8",
    "schedule=cosine", "schedule.batch_size=32",
]  # fmt: skip
REAL = ["dataset=cifar100", "teacher=resnet56", "student=resnet20", "schedule=crd240"]
CIFAR = ["dataset=fake", "dataset.n=50000", "dataset.n_test=10000", "dataset.size=32", "dataset.num_classes=100"]
CLOSE = 1e-3  # relative distance of weights that steps in another order of addition may have
SOLO, SWEEP = 180.0, 45.0  # seconds a run that are promised on one H100: alone, and in a cohort of 16


class Verdict(NamedTuple):
    name: str
    ok: bool | None  # None: does not apply on this machine
    detail: str
    flag: str = ""  # the flag of engine/device.py that needs it


class Check:
    """One section's work: `words` is the experiment that it is done with."""

    def __init__(self, scratch: Path, quick: bool, seconds: float) -> None:
        self.words, self.scratch, self.quick, self.seconds = SMALL if quick else REAL, scratch, quick, seconds
        self.cuda, self.steps = torch.cuda.is_available(), 6 if quick else 40
        self.on = "on" if self.cuda else "auto"  # trainer.cuda_graph where it can be had
        self.verdicts: list[Verdict] = []
        self.figures: dict[str, Any] = {}

    def bench(self, *words: str) -> Workbench:
        made = recipe(*self.words, "trainer.compile=off", "trainer.cuda_graph=off", *words)
        return prepare(made, data_of(made), self.scratch)

    def judge(self, name: str, check: Callable[[], tuple[bool | None, str]], flag: str = "") -> None:
        """One verdict; what the check raises is one too."""
        begin = time.perf_counter()
        try:
            verdict = Verdict(name, *check(), flag)
        except Exception as error:
            traceback.print_exc()
            said = str(error).splitlines()[0][:200] if str(error) else ""
            verdict = Verdict(name, False, f"{type(error).__name__}: {said}", flag)
        word = {True: "ok  ", False: "FAIL", None: "n/a "}[verdict.ok]
        print(f"{word} {verdict.name}: {verdict.detail} ({time.perf_counter() - begin:.1f} s)", flush=True)
        self.verdicts.append(verdict)

    def on_cuda(self, name: str, check: Callable[[], tuple[bool | None, str]], flag: str = "") -> None:
        """A check that only a CUDA device can pass; elsewhere it is run without recordings, and can only break."""
        self.judge(name, check if self.cuda else lambda: (None, f"needs a CUDA device; without: {check()[1]}"), flag)

    # The sections.

    def goals(self) -> None:
        words = [*(SMALL if self.quick else [*CIFAR, "teacher=resnet56", "student=resnet20", "schedule=crd240"])]
        words += ["teacher.schedule.epochs=1", "teacher.allow_chance=true", "trainer.progress=none", "force=true"]
        words += ["trainer.eval_batch_size=2500", f"trainer.cuda_graph={self.on}"]
        words += [f"paths.outputs={self.scratch / 'goals'}"]
        epochs = 3 if self.quick else 5
        ways = {
            "one run, table": ["teacher.table=on"],
            "one run, live teacher": ["teacher.table=off"],
            "16 runs, table": ["teacher.table=on", "-m", "hydra/launcher=cohort", "seeds.init=range(16)"],
        }
        for name, own in ways.items():
            runs = 16 if "-m" in own else 1
            if self.quick and runs > 1:
                own, runs = [*own[:-1], "seeds.init=0,1"], 2

            def goal(own: Sequence[str] = own, name: str = name, runs: int = runs) -> tuple[bool | None, str]:
                figures = timed_epochs([*words, *own, f"schedule.epochs={epochs}"])
                whole = (figures["start"] + 240 * figures["epoch"]) / runs
                self.figures[name] = figures | {"seconds a run of 240 epochs": whole}
                limit = SWEEP if runs > 1 else SOLO
                text = (
                    f"{figures['epoch']:.3f} s an epoch, start {figures['start']:.1f} s: 240 epochs {whole:.0f} s a run"
                )
                ok = whole <= limit if self.cuda and not self.quick else None
                return ok, f"{text} (promised: {limit:.0f}); peak {figures['peak'] / 2**30:.2f} GiB"

            self.judge(name, goal)

    def equal(self) -> None:
        graphs = "graphs"
        cases: dict[str, tuple[list[str], int]] = {
            "plain": ([], 1), "live teacher": (["teacher.table=off"], 1),
            "ema and clip": (["trainer.ema=0.9", "trainer.clip=1"], 1),
            "adamw": (["optimizer=adamw"], 1), "dropout": (["student=mlp", "student.dropout=0.3", "teacher=mlp"], 2),
            "cohort of 4": ([], 4), "sp in a cohort": (["loss=sp"], 4), "crd in a cohort": (["loss=crd"], 4),
        }  # fmt: skip
        for name, (words, count) in cases.items():
            self.on_cuda(f"recorded: {name}", lambda w=words, k=count: self._recorded(w, k), graphs)  # type: ignore[misc]
        self.judge("eager steps repeat themselves", self._repeats)
        self.on_cuda("a second training in the process", self._twice, graphs)
        self.on_cuda("a checkpoint of eager steps goes on recorded", self._resumed_recorded, graphs)
        self.on_cuda("a step that waits is not recorded and harms nothing", self._waits, graphs)
        self.on_cuda("no step waits for the device", self._sync)

    def _recorded(self, words: Sequence[str], count: int) -> tuple[bool, str]:
        eager, again, graph = (
            self.trained([*words, f"trainer.cuda_graph={mode}"], count) for mode in ("off", "off", self.on)
        )
        far = max(distance(a, b) for a, b in zip(graph, eager, strict=True))
        noise = max(distance(a, b) for a, b in zip(again, eager, strict=True))
        limit = 1e-6 if noise == 0 else max(CLOSE, 10 * noise)
        return far <= limit, f"relative distance {far:.2g}; two eager runs differ by {noise:.2g}"

    def _repeats(self) -> tuple[bool | None, str]:
        plain = distance(*(self.trained([])[0] for _ in range(2)))
        strict = distance(*(self.trained(["trainer.deterministic=true"])[0] for _ in range(2)))
        return strict == 0.0, f"two runs differ by {plain:.2g}, with trainer.deterministic by {strict:.2g}"

    def _twice(self) -> tuple[bool, str]:
        ended = []
        for _ in range(3):
            ended.append(self.trained([f"trainer.cuda_graph={self.on}", "loss=sp"])[0])
            gc.collect()
            torch.cuda.empty_cache()
        far = max(distance(other, ended[0]) for other in ended[1:])
        return far <= CLOSE, f"relative distance {far:.2g}"

    def _resumed_recorded(self) -> tuple[bool, str]:
        cut = self.bench().learner()
        self.epochs(self.bench(), [cut], 1)
        bench = self.bench(f"trainer.cuda_graph={self.on}")
        resumed = bench.learner()
        resumed.restore(cut.state())
        self.epochs(bench, [resumed], 3, first=1)
        far = distance(state(resumed), self.trained([])[0])
        return far <= CLOSE, f"relative distance {far:.2g}"

    def _waits(self) -> tuple[bool, str]:
        bench = self.bench(f"trainer.cuda_graph={self.on}")
        learner, update = bench.learner(), Learner.update

        def waiting(self: Learner, *data: Any) -> None:
            update(self, *data)
            float(self.lr + self.meters._step)

        learner.update = waiting.__get__(learner)  # type: ignore[method-assign]
        self.epochs(bench, [learner], 1)
        after = distance(self.trained([f"trainer.cuda_graph={self.on}"])[0], self.trained([])[0])
        said = type(learner.failure).__name__
        return said == "UserError" and after <= CLOSE, f"refused with {said}; the next training differs by {after:.2g}"

    def _sync(self) -> tuple[bool, str]:
        for served in ("table", "live"):
            bench = self.bench()
            batches, teacher = (bench.table() if served == "table" else None) or bench.live()
            learner = bench.learner()
            learner.begin_epoch(0)
            for number, batch in enumerate(batches.epoch(0, 1)):
                if self.cuda:
                    torch.cuda.set_sync_debug_mode("error" if number == 3 else "default")
                learner.step(batch, teacher(batch))
                if self.cuda:
                    torch.cuda.set_sync_debug_mode("default")
                if number == 3:
                    break
            if learner.failure:
                return False, f"{served}: {learner.failure}"
        return True, "table and live teacher"

    def kernels(self) -> None:
        def profile() -> tuple[bool | None, str]:
            bench = self.bench(f"trainer.cuda_graph={self.on}")
            turn = bench.steps(bench.table() or bench.live(), [bench.learner()])
            turn(20 if self.cuda else 2)
            steps = 10 if self.cuda else 2
            kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * self.cuda]
            with torch.profiler.profile(activities=kinds) as profiled:
                seconds = turn(steps)
            rows = sorted(profiled.key_averages(), key=lambda row: -time_of(row, self.cuda))
            rows = [row for row in rows if time_of(row, self.cuda) > 0]
            total, calls = sum(time_of(row, self.cuda) for row in rows), sum(row.count for row in rows)
            self.figures["top"] = [
                [row.key[:80], row.count / steps, time_of(row, self.cuda) / steps] for row in rows[:15]
            ]
            self.figures |= {"kernels a step": calls / steps, "kernel us a step": total / steps}
            return None, f"{calls / steps:.0f} a step, {total / steps:.0f} us of {1e6 * seconds / steps:.0f}"

        self.judge("kernels", profile)

    def matrix(self) -> None:
        contenders: dict[str, Contender] = {}
        for precision in ("fp32", "tf32", "bf16", "fp16") if self.cuda else ("fp32", "bf16"):
            for layout in ("true", "false"):
                for graph, compiled in (
                    (("off", "off"), ("on", "off"), ("on", "on")) if self.cuda else (("off", "off"),)
                ):
                    name = f"{precision}, {'channels last' if layout == 'true' else 'contiguous'}"
                    name += f"{', graph' if graph == 'on' else ', eager'}{', compiled' if compiled == 'on' else ''}"
                    words = [f"trainer.precision={precision}", f"trainer.channels_last={layout}"]
                    words += [f"trainer.cuda_graph={graph}", f"trainer.compile={compiled}"]
                    self._contend(contenders, name, words, 1)
        torch.backends.cudnn.benchmark = True
        self.figures["ways"] = timed(contenders, self.seconds)
        if self.cuda:
            best = min(self.figures["ways"], key=lambda name: self.figures["ways"][name]["median"])
            self.judge("a recorded step is the quickest", lambda: ("graph" in best, f"best: {best}"), "graphs")
            self.judge("a compiled network pays", lambda: ("compiled" in best, f"best: {best}"), "compile")

    def cohort(self) -> None:
        for count in (2,) if self.quick else (4, 8, 16, 32):
            contenders: dict[str, Contender] = {}
            for mode in ("off", "on") if self.cuda else ("off",):
                name = f"{count} students, {'one graph' if mode == 'on' else 'in turn'}"
                self._contend(contenders, name, [f"trainer.cuda_graph={mode}"], count)
            self.judge(f"a stack of {count}", lambda k=count, c=contenders: self._stack(c, k))  # type: ignore[misc]
            self.figures.setdefault("ways", {}).update(timed(contenders, self.seconds / 3))
        self.judge("convolutions in groups", self._groups)

    def _contend(self, contenders: dict[str, Contender], name: str, words: Sequence[str], count: int) -> None:
        """A way to step that is tried before it is timed: one that fails is a verdict, not the end."""

        def ready() -> tuple[bool, str]:
            bench = self.bench(*words)
            turn = bench.steps(bench.table() or bench.live(), [bench.learner() for _ in range(count)])
            turn(5)
            contenders[name] = turn
            return True, "runs"

        self.judge(name, ready)

    def _stack(self, contenders: dict[str, Contender], count: int) -> tuple[bool, str]:
        turn = stacked(self.bench("trainer.precision=fp32"), count)
        turn(2)
        contenders[f"{count} students, vmapped stack, no optimizer"] = turn
        return True, "runs"

    def _groups(self) -> tuple[bool | None, str]:
        """16 students' convolutions as one of 16 groups, against 16 one after the other: forward and backward."""
        found = {}
        for channels, side in ((16, 32), (32, 16), (64, 8)):
            images, count = 8 if self.quick else 64, 2 if self.quick else 16
            device = self.bench().placement.device
            x = torch.randn(images, count * channels, side, side, device=device, requires_grad=True)
            w = torch.randn(count * channels, channels, 3, 3, device=device, requires_grad=True)
            parts = [part.detach().requires_grad_() for part in x.chunk(count, 1)]
            weights = [part.detach().requires_grad_() for part in w.chunk(count)]

            def grouped(x: Any = x, w: Any = w, count: int = count) -> None:
                nn.functional.conv2d(x, w, padding=1, groups=count).sum().backward()

            def apart(parts: Any = parts, weights: Any = weights) -> None:
                for one, weight in zip(parts, weights, strict=True):
                    nn.functional.conv2d(one, weight, padding=1).sum().backward()

            found[f"{channels}x{side}x{side}"] = [1e3 * clocked(grouped), 1e3 * clocked(apart)]
        self.figures["groups"] = found
        return None, "; ".join(f"{name}: {a:.2f} ms grouped, {b:.2f} apart" for name, (a, b) in found.items())

    def losses(self) -> None:
        names = sorted(path.stem for path in (Path(CONFIG_DIR) / "loss").glob("*.yaml"))
        for name in names[:3] if self.quick else names:
            self.on_cuda(f"loss {name}", lambda n=name: self._loss(n), "graphs")  # type: ignore[misc]

    def _loss(self, name: str) -> tuple[bool, str]:
        words = (f"loss={name}", "dataset.validation=0.1")
        ended = []
        for mode in ("off", self.on):
            bench = self.bench(*words, f"trainer.cuda_graph={mode}")
            learner = bench.learner()
            bench.steps(bench.live(), [learner])(8)
            ended.append(state(learner))
        far = distance(ended[1], ended[0])
        return far <= 1e-2, f"relative distance {far:.2g}"

    def follow(self) -> None:
        for precision in ("bf16", "tf32", "fp16") if self.cuda else ("bf16",):
            self.judge(f"{precision} follows fp32", lambda p=precision: self._follows(p))  # type: ignore[misc]
        self.judge("a table equals the live teacher", self._table)
        self.judge("a cohort equals solo runs", self._cohort)
        self.judge("a resumed run equals the whole one", self._resume)
        if self.cuda:
            compiled = "trainer.compile=on"
            self.judge("a compiled student follows", lambda: self._follows("fp32", compiled, limit=0.05), "compile")

    def _follows(self, precision: str, *words: str, limit: float = 0.7) -> tuple[bool, str]:
        """How far the weights are from float32's, in parts of the way that was trained."""
        start = state(self.bench("trainer.precision=fp32").learner())
        full = self.trained(["trainer.precision=fp32"])[0]
        other = self.trained([f"trainer.precision={precision}", *words])[0]
        far = distance(other, full) / max(distance(start, full), 1e-12)
        return far < limit, f"{far:.2g} of the way that was trained"

    def _table(self) -> tuple[bool, str]:
        bench = self.bench()
        live, table = (bench.learner() for _ in range(2))
        bench.steps(bench.live(), [live])(self.steps)
        bench.steps(bench.table() or bench.live(), [table])(self.steps)
        far = distance(state(table), state(live))
        return far <= (CLOSE if self.cuda else 0.0), f"relative distance {far:.2g}"

    def _cohort(self) -> tuple[bool, str]:
        together, alone = self.trained([], 3), self.trained([])[0]
        far = max(distance(member, alone) for member in together)
        return far <= (CLOSE if self.cuda else 0.0), f"relative distance {far:.2g}"

    def _resume(self) -> tuple[bool, str]:
        words = ["train", *SMALL, "schedule.epochs=2", "teacher=none", "loss=ce", "trainer.progress=none"]
        words = [*words, "trainer.deterministic=true", *["trainer.cuda_graph=on"] * self.cuda]
        whole, cut = self.scratch / "whole", self.scratch / "cut"
        kdbench(*words, f"hydra.run.dir={whole}")
        stop = "import kdbench.engine.trainer as t, kdbench.cli as c, os, sys\nend = t._end_epoch\n"
        stop += "def once(*a):\n    end(*a)\n    a[4].flush()\n    os._exit(9)\nt._end_epoch = once\n"
        stop += f"sys.argv = {['kdbench', *words, f'hydra.run.dir={cut}']!r}\nc.main()"
        killed = subprocess.run([sys.executable, "-c", stop], capture_output=True, text=True).returncode
        kdbench(*words, f"hydra.run.dir={cut}")
        hashes = [json.loads((folder / "result.json").read_text())["student"]["weights"] for folder in (whole, cut)]
        return killed == 9 and hashes[0] == hashes[1], f"same weights: {hashes[0] == hashes[1]}"

    def benchmark(self) -> None:
        pairs = ["resnet8:resnet8"] if self.quick else ["resnet56:resnet20", "resnet32x4:resnet8x4"]
        for pair in pairs:
            self.judge(f"bench {pair}", lambda p=pair: self._pair(p))  # type: ignore[misc]

    def _pair(self, pair: str) -> tuple[bool | None, str]:
        teacher, _, student = pair.partition(":")
        file, quick = self.scratch / "bench.json", self.quick
        words = [*SMALL, f"paths.outputs={self.scratch}"] if quick else ["dataset=cifar100", "schedule=crd240"]
        words += [f"teacher={teacher}", f"student={student}", *["trainer.cuda_graph=on"] * self.cuda]
        seconds = 0.1 if quick else self.seconds
        members = 2 if quick else 16
        kdbench("bench", "--baseline", f"--members={members}", f"--seconds={seconds}", f"--json={file}", *words)
        self.figures[pair] = json.loads(file.read_text())
        ratios = self.figures[pair]["ratios"]
        return None, "; ".join(f"{name}: {ratio['median']:.1f}" for name, ratio in ratios.items())

    # What they share.

    def trained(self, words: Sequence[str], count: int = 1) -> list[dict[str, torch.Tensor]]:
        """The states of fresh students after two epochs, with their evaluation between them."""
        bench = self.bench(*words)
        learners = [bench.learner() for _ in range(count)]
        self.epochs(bench, learners, 2)
        failed = next((one.failure for one in learners if one.failure), None)
        if failed is not None:
            raise failed
        return [state(one) for one in learners]

    def epochs(self, bench: Workbench, learners: Sequence[Learner], until: int, first: int = 0) -> None:
        """What the trainer does, without a run folder; on real data only the first steps of an epoch and its last."""
        live = bench.recipe.teacher is None or bench.recipe.teacher.table == "off"
        batches, teacher = (None if live else bench.table()) or bench.live()
        graph = cohort_graph(learners, bench.placement.device)
        with own_stream(bench.placement.device):
            for epoch in range(first, until):
                for learner in learners:
                    learner.begin_epoch(epoch)
                    learner.steps_done = epoch * learner.steps_per_epoch
                stream = some(batches.epoch(epoch, until), batches.steps, self.steps)
                train_epoch(learners, stream, teacher, lambda: None, graph)
                for learner in learners:
                    all_logits(learner.network, bench.sets["test"])


def some(stream: Iterator[Any], steps: int, first: int) -> Iterator[Any]:
    """The first batches of an epoch, and its last, smaller one."""
    for number, batch in enumerate(stream):
        if number < first or number == steps - 1:
            yield batch


def timed_epochs(words: Sequence[str]) -> dict[str, float]:
    """Seconds an epoch of `kdbench train words...` in this process, from the second one on: steps, evaluation, log and
    checkpoint. `start`: what the command took besides; `peak`: bytes of memory."""
    from kdbench import cli
    from kdbench.engine.progress import ProgressView

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
    return {
        "epoch": middle,
        "start": seconds - middle * len(marks),
        "peak": float(peak_memory(place(TrainerOptions()))),
    }


@contextmanager
def set_aside(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def timed(contenders: dict[str, Contender], seconds: float) -> dict[str, Any]:
    if not contenders:
        return {}
    raced = race(contenders, seconds, turn=min(1.0, seconds / 10))
    return {name: raced.step(name)._asdict() for name in raced.seconds}


def clocked(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of a piece of work on the device."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - begin) / repeats


def time_of(row: Any, cuda: bool) -> float:
    return float(row.self_device_time_total if cuda else row.self_cpu_time_total)


def stacked(bench: Workbench, count: int) -> Contender:
    """Forward and backward pass of `count` students as one vmapped network: what a stack of them could gain at best.

    Batch norm takes each batch's own statistics and keeps none: kept ones would have to be arguments of the map.
    """
    networks = [bench.learner().distiller.student for _ in range(count)]
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
    weights, buffers = stack_module_state(networks)
    batch = next(iter(bench.live()[0].epoch(0, 1)))

    def loss(weights: Any, buffers: Any) -> torch.Tensor:
        answer = functional_call(networks[0], (weights, buffers), (batch.input,)).logits
        return cross_entropy(answer.float(), batch.target.label)

    step = vmap(grad(loss), randomness="different")

    def turn(steps: int) -> float:
        bench.placement.wait()
        begin = time.perf_counter()
        for _ in range(steps):
            step(weights, buffers)
        bench.placement.wait()
        return time.perf_counter() - begin

    return turn


def recipe(*words: str) -> Any:
    """The recipe that `kdbench train words...` would run."""
    GlobalHydra.instance().clear()
    register([])
    typed = dict(word.partition("=")[::2] for word in words)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", overrides=list(words))
    groups = ("dataset", "teacher", "student", "loss", "optimizer", "schedule")
    defaults = {"dataset": "digits", "teacher": "resnet20", "student": "resnet8", "loss": "kl", "optimizer": "sgd"}
    return make_recipe(cfg, list(words), {g: typed.get(g) or defaults.get(g, "cosine") for g in groups})


def data_of(made: Any) -> Any:
    node = made.record.tree["dataset"]
    return load_data(json.dumps(stand_in(node) or node))


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights and batch-norm statistics in float64 on the CPU; counters left out."""
    tensors = learner.distiller.state_dict().items()
    return {key: value.cpu().double() for key, value in tensors if value.is_floating_point()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all weights; infinite where one is not finite."""
    difference = sum(float((a[key] - b[key]).square().sum()) for key in b)
    size = sum(float(value.square().sum()) for value in b.values())
    relative = (difference / max(size, 1e-30)) ** 0.5
    return relative if relative == relative else float("inf")


def kdbench(*words: str) -> None:
    """Run the command; what it wrote to stderr is part of the error if it fails."""
    done = subprocess.run([sys.executable, "-m", "kdbench", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"kdbench {words[0]} ended with {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])}"
        )


def run_section(name: str, out: Path, quick: bool, seconds: float) -> int:
    """The work of one process: its result as JSON in `out`, written after every verdict."""
    with tempfile.TemporaryDirectory(prefix="kdbench-check-") as scratch:
        check = Check(Path(scratch), quick, 0.2 if quick else seconds)
        placement = check.bench().placement

        def keep() -> None:
            found = {"verdicts": [verdict._asdict() for verdict in check.verdicts], "figures": check.figures}
            about = {"machine": describe(placement), "peak": peak_memory(placement)}
            out.write_text(json.dumps(about | found) + "\n", encoding="utf-8")

        judge = check.judge

        def kept(*words: Any) -> None:
            judge(*words)
            keep()

        check.judge = kept  # type: ignore[method-assign]
        getattr(check, "benchmark" if name == "bench" else name)()
        if name == "kernels":
            check.figures["roofline"] = measure_roofline(placement, small=quick)._asdict()
        keep()
    return 0


def supervise(name: str, arguments: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One section in a process of its own; what it found so far if it is stopped or dies."""
    file = arguments.out / f".{name}.json"
    file.unlink(missing_ok=True)
    words = ["--section", name, "--out", str(file), "--seconds", str(arguments.seconds)]
    words += ["--quick"] * arguments.quick
    begin = time.perf_counter()
    with open(arguments.out / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, __file__, *words], stdout=log, stderr=subprocess.STDOUT)
        try:
            ended = f"ended with {process.wait(limit)}" if process.wait(limit) else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"stopped after {limit:.0f} s"
    found: dict[str, Any] = {"verdicts": [], "figures": {}}
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
    if ended:
        found["verdicts"].append(Verdict(f"section {name}", False, f"{ended}; see {name}.log")._asdict())
    found["seconds"] = round(time.perf_counter() - begin, 1)
    return found


def justified(sections: dict[str, Any]) -> dict[str, str]:
    """What the flags of kdbench/engine/device.py may be, and why."""
    verdicts = [verdict for section in sections.values() for verdict in section["verdicts"]]
    found = {}
    for flag, constant in (("graphs", "PROVEN_GRAPHS"), ("compile", "PROVEN_COMPILE")):
        asked = [verdict for verdict in verdicts if verdict["flag"] == flag]
        bad = [verdict["name"] for verdict in asked if verdict["ok"] is False]
        missing = [verdict["name"] for verdict in asked if verdict["ok"] is None]
        reason = f"failed: {', '.join(bad)}" if bad else "not tried on a GPU" if missing or not asked else ""
        found[constant] = f"False ({reason})" if reason else f"True ({len(asked)} checks passed)"
    return found


def page(sections: dict[str, Any]) -> str:
    """The result so far as Markdown; the goals first."""
    machine = next((s["machine"] for s in sections.values() if "machine" in s), {})
    marks = {True: "ok", False: "**failed**", None: "n/a"}
    lines = [f"# {machine.get('name')} ({machine.get('device')}), torch {machine.get('torch')}", ""]
    for name, section in sections.items():
        lines += [f"## {name} ({section['seconds']:.0f} s)", "", "| check | | detail |", "|---|---|---|"]
        lines += [f"| {v['name']} | {marks[v['ok']]} | {v['detail']} |" for v in section["verdicts"]]
        ways = section["figures"].get("ways", {})
        if ways:
            lines += ["", "| way to run a step | ms | quartiles | n |", "|---|--:|--:|--:|"]
        for way, step in sorted(ways.items(), key=lambda item: item[1]["median"]):
            low, high = 1e3 * step["low"], 1e3 * step["high"]
            lines.append(f"| {way} | {1e3 * step['median']:.3f} | {low:.3f} to {high:.3f} | {step['n']} |")
        top = section["figures"].get("top", [])
        if top:
            lines += ["", "| kernel | a step | us a step |", "|---|--:|--:|"]
        lines += [f"| `{kernel}` | {count:.1f} | {us:.1f} |" for kernel, count, us in top]
        lines.append("")
    lines += ["## Flags that these results justify", ""]
    lines += [f"- `{constant} = {value}`" for constant, value in justified(sections).items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/device_check"))
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, in this order")
    parser.add_argument("--minutes", type=float, default=0, help="end after so many minutes (0: no limit)")
    parser.add_argument("--seconds", type=float, default=10, help="how long ways to step take turns")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        return run_section(arguments.section, arguments.out, arguments.quick, arguments.seconds)
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--only: no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    sections: dict[str, Any] = {}
    for name in names:
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: no time left", flush=True)
            continue
        sections[name] = supervise(name, arguments, min(SECTIONS[name], left))
        bad = [v["name"] for v in sections[name]["verdicts"] if v["ok"] is False]
        print(
            f"{name}: {sections[name]['seconds']:.0f} s, {'failed: ' + ', '.join(bad) if bad else 'nothing failed'}",
            flush=True,
        )
        (arguments.out / "device_check.json").write_text(
            json.dumps({"sections": sections}, indent=1) + "\n", encoding="utf-8"
        )
        (arguments.out / "device_check.md").write_text(page(sections), encoding="utf-8")
    print(page(sections))
    return int(any(v["ok"] is False for section in sections.values() for v in section["verdicts"]))


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; for trainer.deterministic
    raise SystemExit(main())
