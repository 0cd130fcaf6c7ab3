"""Check on this machine that what makes kdbench fast changes nothing, and time it. One command, one verdict.

    python scripts/device_check.py [--out FOLDER] [--seconds 20] [--quick] [--pairs resnet56:resnet20,resnet110:resnet8]

On a CUDA device: a recorded step (CUDA graph) equals the eager step, for every loss; a compiled step agrees with it;
bfloat16 learns what float32 learns; a table gives the live teacher's logits; a cohort's members equal their solo runs,
in turn and in streams; a resumed training equals an uninterrupted one. Then every way to run a step, and a cohort's
steps, is timed, and `kdbench bench --baseline` runs for the pairs. On a CPU the same without graphs; `--quick` is a
small form. Writes device_check.json and device_check.md into FOLDER; exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from kdbench.bench.machine import describe, measure_roofline
from kdbench.bench.standin import stand_in
from kdbench.bench.timing import Contender, race
from kdbench.bench.workbench import Workbench, prepare
from kdbench.build import load_data, make_recipe
from kdbench.configure import register
from kdbench.engine.learner import Learner
from kdbench.paths import CONFIG_DIR
from kdbench.results.result import read_result
from kdbench.runs.recipe import Recipe

SMALL = ["dataset=fake", "dataset.n=512", "teacher=resnet8", "student=resnet8", "schedule.batch_size=32"]
REAL = ["dataset=cifar100", "teacher=resnet56", "student=resnet20", "schedule=crd240"]


class Verdict(NamedTuple):
    name: str
    ok: bool | None  # None: does not apply on this machine
    detail: str


class Check:
    """One machine's checks: `words` is the experiment that they are made with."""

    def __init__(self, words: list[str], scratch: Path, steps: int) -> None:
        self.words, self.scratch, self.steps = words, scratch, steps
        self.cuda = torch.cuda.is_available()

    def bench(self, *words: str) -> Workbench:
        made = recipe(*self.words, *words)
        return prepare(made, data_of(made), self.scratch)

    def trained(self, bench: Workbench, steps: int | None = None, table: bool = False) -> dict[str, torch.Tensor]:
        """The state of a fresh student after some steps."""
        learner = bench.learner()
        served = (bench.table() if table else None) or bench.live()
        bench.steps(served, [learner])(steps or self.steps)
        return state(learner)

    def graph(self) -> Verdict:
        """A recorded step is the eager step to the last bit; not where a library's kernels add up in another order."""
        if not self.cuda:
            return Verdict(
                "graph equals eager", None, "needs a CUDA device; tests/engine/test_engine_graph.py replays a tape"
            )
        found = {}
        for precision in ("fp32", "bf16"):
            eager, graph = (
                self.trained(
                    self.bench(f"trainer.precision={precision}", f"trainer.cuda_graph={mode}", "trainer.compile=off")
                )
                for mode in ("off", "on")
            )
            found[precision] = distance(eager, graph)
        again = self.bench("trainer.cuda_graph=off", "trainer.compile=off")
        noise = distance(self.trained(again), self.trained(again))
        ok = all(value <= max(1e-3, 10 * noise) for value in found.values())
        return Verdict("graph equals eager", ok, f"{found}; two eager runs differ by {noise:.2g}")

    def losses(self) -> Verdict:
        """Every loss can be recorded, and its recorded step is the eager one."""
        if not self.cuda:
            return Verdict("every loss in a graph", None, "needs a CUDA device")
        bad = {}
        for name in sorted(path.stem for path in (Path(CONFIG_DIR) / "loss").glob("*.yaml")):
            try:
                words = (f"loss={name}", "dataset.validation=0.1", "trainer.compile=off")
                eager, graph = (self.trained(self.bench(*words, f"trainer.cuda_graph={m}"), 12) for m in ("off", "on"))
                if (far := distance(eager, graph)) > 1e-2:
                    bad[name] = f"{far:.2g}"
            except Exception as error:
                bad[name] = str(error).splitlines()[0][:120]
        return Verdict("every loss in a graph", not bad, str(bad) if bad else "all")

    def compiled(self) -> Verdict:
        """A compiled student learns the same up to rounding."""
        if not self.cuda:
            return Verdict("compiled agrees with eager", None, "off on CPUs: nothing gained")
        plain, fast = (
            self.trained(self.bench(f"trainer.compile={mode}", "trainer.precision=fp32")) for mode in ("off", "on")
        )
        far = distance(plain, fast)
        return Verdict(
            "compiled agrees with eager", far < 0.05, f"relative distance {far:.2g} after {self.steps} steps"
        )

    def bf16(self) -> Verdict:
        """The weights that bfloat16 reaches lie near those of float32, seen from the start."""
        start = state(self.bench("trainer.precision=fp32").learner())
        low, full = (
            self.trained(self.bench(f"trainer.precision={p}", "trainer.compile=off")) for p in ("bf16", "fp32")
        )
        far = distance(low, full) / max(distance(start, full), 1e-12)
        return Verdict("bf16 follows fp32", far < 0.7, f"{far:.2g} of the way that was trained")

    def table(self) -> Verdict:
        """Students of the table and of the live teacher end with the same weights."""
        bench = self.bench("trainer.compile=off")
        far = distance(self.trained(bench), self.trained(bench, table=True))
        return Verdict("table equals live", far <= (1e-3 if self.cuda else 0.0), f"relative distance {far:.2g}")

    def cohort(self) -> Verdict:
        """Three students side by side end with the weights that each reaches alone."""
        bench = self.bench("trainer.compile=off")
        members = [bench.learner() for _ in range(3)]
        bench.steps(bench.live(), members)(self.steps)
        alone = self.trained(bench)
        far = max(distance(state(member), alone) for member in members)
        return Verdict("cohort equals solo", far <= (1e-3 if self.cuda else 0.0), f"relative distance {far:.2g}")

    def streams(self) -> Verdict:
        """Students side by side in CUDA streams, recorded, end with the weights of those that take turns."""
        if not self.cuda:
            return Verdict("streams equal turns", None, "needs a CUDA device")
        ended = []
        for mode in ("off", "on"):
            bench = self.bench("trainer.compile=off", "trainer.cuda_graph=on", f"trainer.streams={mode}")
            members = [bench.learner() for _ in range(4)]
            bench.steps(bench.live(), members)(self.steps)
            ended.append([state(member) for member in members])
        far = max(distance(a, b) for a, b in zip(*ended, strict=True))
        return Verdict("streams equal turns", far <= 1e-3, f"relative distance {far:.2g}")

    def resume(self) -> Verdict:
        """`kdbench train`, ended after its first epoch and started again, reaches the uninterrupted run's weights."""
        words = ["train", *SMALL, "schedule.epochs=2", "teacher=none", "loss=ce", "trainer.progress=none"]
        whole, cut = self.scratch / "whole", self.scratch / "cut"
        kdbench(*words, f"hydra.run.dir={whole}")
        stop = "import kdbench.engine.trainer as t, kdbench.cli as c, os, sys\n"
        stop += "epochs = t._train_epoch\n"
        stop += "def once(*a, **k):\n    epochs(*a, **k)\n    a[6].flush()\n    os._exit(9)\nt._train_epoch = once\n"
        stop += f"sys.argv = {['kdbench', *words, f'hydra.run.dir={cut}']!r}\nc.main()"
        killed = subprocess.run([sys.executable, "-c", stop], capture_output=True, text=True).returncode
        kdbench(*words, f"hydra.run.dir={cut}")
        hashes = [read_result(folder).student.weights for folder in (whole, cut)]
        same = hashes[0] == hashes[1]
        return Verdict("resumed equals uninterrupted", killed == 9 and (same or self.cuda), f"same weights: {same}")

    def ways(self, seconds: float) -> dict[str, Any]:
        """Milliseconds a step of every way to run it, taking turns."""
        options = {
            "eager": ("off", "off"),
            "graph": ("on", "off"),
            "compiled": ("off", "on"),
            "graph + compiled": ("on", "on"),
        }
        contenders = {}
        for precision in ("fp32", "bf16"):
            for name, (graph, compiled) in options.items():
                if self.cuda or name == "eager":
                    words = (
                        f"trainer.precision={precision}",
                        f"trainer.cuda_graph={graph}",
                        f"trainer.compile={compiled}",
                    )
                    bench = self.bench(*words)
                    served = bench.table() or bench.live()
                    contenders[f"{precision}, {name}"] = bench.steps(served, [bench.learner()])
        return timed(contenders, seconds)

    def cohorts(self, seconds: float, count: int) -> dict[str, Any]:
        """The same for `count` students: in turn, in a stream each, and (forward and backward only) as one stack."""
        contenders = {}
        for mode in ("off", "on") if self.cuda else ("off",):
            words = (f"trainer.streams={mode}", f"trainer.cuda_graph={'on' if self.cuda else 'auto'}")
            bench = self.bench(*words)
            served = bench.table() or bench.live()
            name = f"{count} students, {'a stream each' if mode == 'on' else 'in turn'}"
            contenders[name] = bench.steps(served, [bench.learner() for _ in range(count)])
        contenders[f"{count} students, vmapped stack, no optimizer"] = stacked(self.bench(), count)
        return timed(contenders, seconds)


def timed(contenders: dict[str, Contender], seconds: float) -> dict[str, Any]:
    raced = race(contenders, seconds, turn=min(1.0, seconds / 10))
    return {name: raced.step(name)._asdict() for name in raced.seconds}


def stacked(bench: Workbench, count: int) -> Contender:
    """Forward and backward pass of `count` students as one vmapped network: what a stack of them could gain at best.

    Batch norm takes each batch's own statistics and keeps none, since vmap cannot update them in place.
    """
    networks = [bench.learner().distiller.student for _ in range(count)]
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
    weights, buffers = stack_module_state(networks)
    batch = next(iter(bench.live()[0].epoch(0, 1)))

    def loss(weights: Any, buffers: Any) -> torch.Tensor:
        with bench.placement.autocast():
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


def recipe(*words: str) -> Recipe:
    """The recipe that `kdbench train words...` would run."""
    GlobalHydra.instance().clear()
    register([])
    typed = dict(word.partition("=")[::2] for word in words)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose("train", overrides=list(words))
    groups = ("dataset", "teacher", "student", "loss", "optimizer", "schedule")
    defaults = {"dataset": "digits", "teacher": "resnet20", "student": "resnet8", "loss": "kl", "optimizer": "sgd"}
    return make_recipe(cfg, list(words), {g: typed.get(g) or defaults.get(g, "cosine") for g in groups})


def data_of(made: Recipe) -> Any:
    node = made.record.tree["dataset"]
    return load_data(json.dumps(stand_in(node) or node))


def state(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights and batch-norm statistics in float64 on the CPU; counters left out."""
    tensors = learner.distiller.state_dict().items()
    return {key: value.double().cpu() for key, value in tensors if value.is_floating_point()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b| over all weights; infinite where one is not finite."""
    difference = sum(float((a[key] - b[key]).square().sum()) for key in b)
    size = sum(float(value.square().sum()) for value in b.values())
    relative = (difference / max(size, 1e-30)) ** 0.5
    return relative if relative == relative else float("inf")


def kdbench(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "kdbench", *words], check=True, capture_output=True, text=True)


def benchmark(pair: str, seconds: float, scratch: Path) -> dict[str, Any]:
    """`kdbench bench --baseline` of a pair, with a cohort of 16."""
    teacher, _, student = pair.partition(":")
    file = scratch / "bench.json"
    words = ["dataset=cifar100", f"teacher={teacher}", f"student={student}", "schedule=crd240"]
    if torch.cuda.is_available():  # auto is off until this check has passed (engine/device.py, PROVEN_ON_CUDA)
        words += ["trainer.cuda_graph=on", "trainer.streams=on"]
    kdbench("bench", "--baseline", "--members=16", f"--seconds={seconds}", f"--json={file}", *words)
    return json.loads(file.read_text())


def judged(name: str, check: Callable[[], Verdict]) -> Verdict:
    begin = time.perf_counter()
    try:
        verdict = check()
    except Exception as error:
        traceback.print_exc()
        verdict = Verdict(name, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    word = {True: "ok  ", False: "FAIL", None: "n/a "}[verdict.ok]
    print(f"{word} {verdict.name}: {verdict.detail} ({time.perf_counter() - begin:.1f} s)", flush=True)
    return verdict


def run(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    check = Check(SMALL if arguments.quick else REAL, scratch, 6 if arguments.quick else 40)
    names = ("graph", "losses", "compiled", "bf16", "table", "cohort", "streams", "resume")
    verdicts = [judged(name, getattr(check, name)) for name in names]
    placement, seconds = check.bench().placement, 0.1 if arguments.quick else arguments.seconds
    result: dict[str, Any] = {
        "machine": describe(placement),
        "roofline": measure_roofline(placement._replace(dtype=torch.bfloat16), small=arguments.quick)._asdict(),
        "checks": [verdict._asdict() for verdict in verdicts],
        "ways": check.ways(seconds) | check.cohorts(seconds, 3 if arguments.quick else 16),
        "bench": {},
    }
    for pair in [] if arguments.quick else arguments.pairs.split(","):
        result["bench"][pair] = benchmark(pair, arguments.seconds, scratch)
    return result


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine, roofline = result["machine"], result["roofline"]
    marks = {True: "ok", False: "**failed**", None: "n/a"}
    lines = [f"# {machine['name']} ({machine['device']}), torch {machine['torch']}", ""]
    lines += [
        f"Copies {roofline['bandwidth'] / 1e9:,.0f} GB/s, bf16 matrices {roofline['rate'] / 1e12:,.2f} TFLOP/s.",
        "",
    ]
    lines += ["| check | | detail |", "|---|---|---|"]
    lines += [f"| {check['name']} | {marks[check['ok']]} | {check['detail']} |" for check in result["checks"]]
    lines += ["", "| way to run a step | ms | quartiles | n |", "|---|--:|--:|--:|"]
    for name, step in result["ways"].items():
        low, high = 1e3 * step["low"], 1e3 * step["high"]
        lines.append(f"| {name} | {1e3 * step['median']:.3f} | {low:.3f} to {high:.3f} | {step['n']} |")
    for pair, bench in result["bench"].items():
        lines += ["", f"## {pair}", "", "| | ms a step | images/s | 240 epochs |", "|---|--:|--:|--:|"]
        for name, step in bench["steps"].items():
            whole = step["median"] * bench["configuration"]["steps_per_epoch"] * 240
            lines.append(
                f"| {name} | {1e3 * step['median']:.3f} | {step['images_per_second']:,.0f} | {whole / 60:.1f} min |"
            )
        lines += ["", *(f"- {name}: {r['median']:.1f} times as long" for name, r in bench["ratios"].items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/device_check"))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", default="resnet56:resnet20,resnet110:resnet8,resnet32x4:resnet8x4")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdbench-check-") as scratch:
        result = run(arguments, Path(scratch))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "device_check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "device_check.md").write_text(page(result), encoding="utf-8")
    print(page(result))
    return int(any(check["ok"] is False for check in result["checks"]))


if __name__ == "__main__":
    raise SystemExit(main())
