"""Where a step's time goes, and ways to run it against each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from device_check.check import Check, Found
from device_check.equal import compiled
from kdbench.bench.machine import measure_roofline
from kdbench.bench.timing import Contender
from kdbench.bench.workbench import Workbench
from kdbench.engine.device import own_stream
from kdbench.engine.recording import recording


def kernels(check: Check) -> None:
    for students in (1, 16):
        check.judge(f"kernels of a step, {students} students", lambda k=students: _profile(check, k))  # type: ignore[misc]
    check.figures["roofline"] = measure_roofline(check.bench().placement, small=check.quick)._asdict()


def _profile(check: Check, students: int) -> Found:
    bench = check.bench(f"trainer.cuda_graph={check.on}", whole=True)
    turn = bench.steps(bench.table() or bench.live(), [bench.learner() for _ in range(2 if check.quick else students)])
    turn(20 if check.cuda else 2)
    steps = 10 if check.cuda else 2
    kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * check.cuda]
    with torch.profiler.profile(activities=kinds) as profiled:
        seconds = turn(steps)
    # Operations carry the time of the kernels that they launched: only the device's own rows count there.
    own = DeviceType.CUDA if check.cuda else DeviceType.CPU
    rows = [(row, _time(row, check.cuda)) for row in profiled.key_averages() if row.device_type == own]
    rows = sorted(((row, us) for row, us in rows if us > 0), key=lambda pair: -pair[1])
    total, calls = sum(us for _, us in rows), sum(row.count for row, _ in rows)
    if students == 1:
        check.figures["top"] = [[row.key[:80], row.count / steps, us / steps] for row, us in rows[:15]]
    check.figures[str(students)] = {"kernels a step": calls / steps, "kernel us a step": total / steps}
    return None, f"{calls / steps:.0f} a step, {total / steps:.0f} us of {1e6 * seconds / steps:.0f}"


def _time(row: Any, cuda: bool) -> float:
    return float(row.self_device_time_total if cuda else row.self_cpu_time_total)


def matrix(check: Check) -> None:
    """One precision after the other, so that what one kept on the device goes before the next."""
    for precision in ("bf16", "tf32", "fp16", "fp32") if check.cuda else ("fp32", "bf16"):
        contenders: dict[str, Contender] = {}
        for layout, known in (("true", "channels last"), ("false", "contiguous")):
            for mode in ("on", "off") if check.cuda else ("off",):
                for tried in (False, True) if mode == "on" else (False,):
                    torch.backends.cudnn.benchmark = tried  # what is recorded keeps the kernels that it found
                    name = f"{precision}, {known}, {'graph' if mode == 'on' else 'eager'}"
                    words = [f"trainer.precision={precision}", f"trainer.channels_last={layout}"]
                    words.append(f"trainer.cuda_graph={mode}")
                    check.contend(contenders, name + ", cudnn.benchmark" * tried, words)
        torch.backends.cudnn.benchmark = False
        check.time(contenders, check.seconds / 2)
    if check.cuda and check.figures.get("ways"):
        best = min(check.figures["ways"], key=lambda name: check.figures["ways"][name]["median"])
        check.judge("a recorded step is the quickest", lambda: ("graph" in best, f"best: {best}"), "graphs")


def compile(check: Check) -> None:
    """A compilation takes about a minute the first time: the precisions that may win, and one layout."""
    compiled(check)
    for precision in ("bf16", "tf32") if check.cuda else ():
        contenders: dict[str, Contender] = {}
        words = [f"trainer.precision={precision}", f"trainer.cuda_graph={check.on}"]
        check.contend(contenders, f"{precision}, graph", words)
        check.contend(contenders, f"{precision}, graph, compiled", [*words, "trainer.compile=on"])
        check.time(contenders, check.seconds / 2)
        ways = check.figures.get("ways", {})
        pair = [ways[name]["median"] for name in contenders if name in ways]
        if len(pair) == 2:
            said = f"{1e3 * pair[0]:.3f} ms, compiled {1e3 * pair[1]:.3f}"
            check.judge(f"a compiled network pays in {precision}", lambda p=pair, s=said: (p[1] < p[0], s), "compile")  # type: ignore[misc]


def cohort(check: Check) -> None:
    """In one precision, which the stack has too."""
    precision = f"trainer.precision={'tf32' if check.cuda else 'fp32'}"
    for count in (2,) if check.quick else (16, 4, 8, 32):
        contenders: dict[str, Contender] = {}
        for mode in ("on", "off") if check.cuda else ("off",):
            name = f"{count} students, {'one graph' if mode == 'on' else 'in turn'}"
            check.contend(contenders, name, [precision, f"trainer.cuda_graph={mode}"], count)
        check.judge(f"a stack of {count}", lambda k=count, c=contenders: _stack(check, c, k))  # type: ignore[misc]
        check.time(contenders, check.seconds / 3)
    check.judge("convolutions in groups", lambda: _groups(check))


def _stack(check: Check, contenders: dict[str, Contender], count: int) -> Found:
    bench = check.bench(f"trainer.precision={'tf32' if check.cuda else 'fp32'}", whole=True)
    turn = stacked(bench, count)
    turn(2)
    contenders[f"{count} students, vmapped stack, no optimizer"] = turn
    return True, "runs"


def stacked(bench: Workbench, count: int) -> Contender:
    """Forward and backward pass of `count` students as one vmapped network: what a stack of them could gain at best.

    Recorded on a GPU, where launching its kernels would be what is timed. Batch norm takes each batch's own statistics
    and keeps none: kept ones would have to be arguments of the map.
    """
    networks = [bench.learner().distiller.student for _ in range(count)]
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
    weights, buffers = stack_module_state(networks)
    batch, device = next(iter(bench.live()[0].epoch(0, 1))), bench.placement.device

    def loss(weights: Any, buffers: Any) -> torch.Tensor:
        answer = functional_call(networks[0], (weights, buffers), (batch.input,)).logits
        return cross_entropy(answer.float(), batch.target.label)

    mapped = vmap(grad(loss), randomness="different")

    def step() -> None:
        mapped(weights, buffers)

    if device.type == "cuda":
        with own_stream(device):
            for _ in range(3):
                step()
        step = recording(step, device).replay

    def turn(steps: int) -> float:
        bench.placement.wait()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        bench.placement.wait()
        return time.perf_counter() - begin

    return turn


def _groups(check: Check) -> Found:
    """16 students' convolutions as one of 16 groups, against 16 one after the other: forward and backward."""
    found = {}
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        images, count = 8 if check.quick else 64, 2 if check.quick else 16
        device = check.bench().placement.device
        x = torch.randn(images, count * channels, side, side, device=device, requires_grad=True)
        w = torch.randn(count * channels, channels, 3, 3, device=device, requires_grad=True)
        parts = [part.detach().requires_grad_() for part in x.chunk(count, 1)]
        weights = [part.detach().requires_grad_() for part in w.chunk(count)]

        def grouped(x: Any = x, w: Any = w, count: int = count) -> None:
            nn.functional.conv2d(x, w, padding=1, groups=count).sum().backward()

        def apart(parts: Any = parts, weights: Any = weights) -> None:
            for one, weight in zip(parts, weights, strict=True):
                nn.functional.conv2d(one, weight, padding=1).sum().backward()

        found[f"{channels}x{side}x{side}"] = [1e3 * _clocked(grouped), 1e3 * _clocked(apart)]
    check.figures["groups"] = found
    return None, "; ".join(f"{name}: {a:.2f} ms grouped, {b:.2f} apart" for name, (a, b) in found.items())


def _clocked(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of a piece of work on the device."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - begin) / repeats
