"""Whether kdbench's speed costs accuracy: the same distillation by the plain loop and by kdbench, several seeds each.

    python scripts/bench_accuracy.py [--seeds 3] [--json FILE] [key=value ...]

Trains the teacher once (kdbench's store keeps it), then students: by the plain loop that `kdbench bench --baseline`
times (PIL transforms one by one, float32, a live teacher), by kdbench in float32, and by kdbench in bfloat16, with the
same teacher, loss, schedule and number of steps. Prints test accuracy of the last epoch, mean and standard deviation
over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from device_check.check import recipe

from kdbench.bench.reference import ReferenceLoop
from kdbench.data.bundle import Bundle
from kdbench.engine.schedule import lr_factors
from kdbench.models.weights import load_into, read_weights
from kdbench.results.result import RunResult, read_result
from kdbench.runs.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    teacher = ""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for precision in ("fp32", "bf16"):
                # One teacher for all, trained in float32 by the first run.
                asked = [f"teacher.checkpoint={teacher}"] if teacher else []
                words = [*arguments.overrides, *asked, f"trainer.precision={precision}", f"seed={seed}"]
                result = kdbench(Path(folder) / f"{precision}-{seed}", words)
                assert result.teacher is not None
                teacher = teacher or f"{result.teacher.folder}/student.safetensors"
                record(found, f"kdbench, {precision}", result.last["test/top1"], seed)
            record(found, "plain loop", plain(recipe(*arguments.overrides), teacher, seed), seed)
    for name, values in found.items():
        print(f"{name:<15} {100 * statistics.mean(values):.2f} +- {100 * deviation(values):.2f} %, n = {len(values)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def record(found: dict[str, list[float]], name: str, value: float, seed: int) -> None:
    found.setdefault(name, []).append(value)
    print(f"seed {seed}, {name}: {100 * value:.2f} %", flush=True)


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def kdbench(out: Path, words: list[str]) -> RunResult:
    """The result of one `kdbench train`."""
    command = [sys.executable, "-m", "kdbench", "train", f"hydra.run.dir={out}", "trainer.progress=none", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_result(out)


def plain(made: Recipe, teacher: str, seed: int) -> float:
    """Test accuracy of a student of the plain loop."""
    torch.manual_seed(seed)
    data = made.data()
    loop = ReferenceLoop(made, data, workers=0)
    assert loop.teacher is not None
    load_into(loop.teacher, read_weights(Path(teacher)), teacher)
    steps = len(loop.loader)
    factors = lr_factors(made.schedule, steps)
    begin = time.perf_counter()
    for epoch in range(made.schedule.epochs):
        for number, batch in enumerate(loop.loader):
            for group in loop.optimizer.param_groups:
                group["lr"] = made.optimizer.lr * factors[epoch * steps + number]
            loop.step(*batch)
        print(f"  plain loop, epoch {epoch + 1}, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return accuracy(loop, data)


@torch.no_grad()
def accuracy(loop: ReferenceLoop, data: Bundle) -> float:
    loop.student.eval()
    mean, std = (torch.tensor(value)[:, None, None] for value in (data.mean, data.std))
    right = 0
    for images, labels in zip(data.test.inputs.split(250), data.test.labels.split(250), strict=True):
        answer = loop.student(((images.float() / 255 - mean) / std).to(loop.device)).logits.argmax(1).cpu()
        right += int((answer == labels).sum())
    return right / len(data.test.labels)


if __name__ == "__main__":
    main()
