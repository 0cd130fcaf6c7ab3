"""What a paper's reproducibility checklist asks, answered from run folders alone."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence

from kdbench.results.metrics import TASKS
from kdbench.results.predictions import PREDICTIONS
from kdbench.results.read import Run
from kdbench.results.rows import Comparison
from kdbench.results.statistics import LEVEL
from kdbench.results.verdicts import by_seed

_VALUE = re.compile(r"[\w.+-]+")


def checklist(comparison: Comparison) -> list[tuple[str, str]]:
    """Questions and their answers."""
    runs = [run for row in comparison.rows for run in row.runs]
    counts = sorted({len(row.runs) for row in comparison.rows})
    seeds = {str(seed[0]) for row in comparison.rows for seed, _ in by_seed(row, "last")}
    hours = sum(run.result.seconds for run in runs) / 3600
    chosen = TASKS[runs[0].result.task].on("val") if runs else ""
    split = any(run.result.best for run in runs)
    rule = f"best: the epoch with the best {chosen}" if split else "no validation split: nothing was selected"
    commands = _sweeps(list(dict.fromkeys(tuple(run.result.overrides) for run in runs)))
    kept = sum((run.folder / PREDICTIONS).exists() for run in runs)
    return [
        ("Runs", f"{len(runs)} of {len(comparison.rows)} settings; {_some(counts)} a setting"),
        ("Seeds", _some([*map(str, sorted(map(int, seeds)))] if all(map(str.isdigit, seeds)) else sorted(seeds))),
        ("Uncertainty", f"mean ± sample standard deviation over seeds; {100 * (1 - LEVEL):.0f} % t intervals of "
                        "differences, paired where seeds match, Holm over the comparisons of a table"),
        ("Selection", f"last: the last epoch; {rule}; the test set selects nothing"),
        ("Data", _each(runs, _data)),
        ("Teachers", _each(runs, _teacher)),
        ("Compute", f"{hours:.2f} hours of training on {_each(runs, lambda run: run.result.device or 'unknown')} "
                    f"({_each(runs, lambda run: run.result.precision or 'unknown')}); teachers are not in it"),
        ("Cost", _each_cost(runs)),
        ("Machines", _each(runs, _machine) or "unknown"),
        ("Test set", f"predictions of each test image are kept by {kept} of {len(runs)} runs: verdicts on such images "
                     "take those of both settings"),
        ("Versions", _each(runs, _versions)),
        ("Commands", "; ".join(commands) if len(commands) <= 12 else f"{_some(commands)}; each in its result.json"),
        ("Not known", f"{_unknown(runs)}what failed or was left out before, and how settings were chosen that no sweep "
                      "here varies"),
        ("Left out", "; ".join(comparison.warnings) or "nothing to warn of"),
    ]  # fmt: skip


def _sweeps(typed: Sequence[tuple[str, ...]]) -> list[str]:
    """The command lines of runs: those that differ in the value of one word are one sweep."""
    lines = list(typed)
    for place in range(max(map(len, typed), default=0)):
        groups: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
        for words in lines:
            key, _, value = words[place].partition("=") if place < len(words) else ("", "", "")
            plain = _VALUE.fullmatch(value) is not None  # else a comma would need quotes
            same = (*words[:place], f"{key}=", *words[place + 1 :]) if plain else words
            groups.setdefault((plain, same), []).append(value if plain else "")
        lines = [
            (*same[:place], *(word + ",".join(values) for word in same[place : place + 1]), *same[place + 1 :])
            for (_, same), values in groups.items()
        ]
    return [shlex.join(["kdbench", "train", *([] if words in typed else ["-m"]), *words]) for words in lines]


def _each_cost(runs: Sequence[Run]) -> str:
    """Sums over all runs, and the most memory, of what every one of them knows."""
    said = []
    for name, unit, per in (
        ("cpu_seconds", "CPU hours", 3600),
        ("gpu_seconds", "GPU hours", 3600),
        ("energy", "kJ", 1000),
        ("memory", "GB at most", 1e9),
        ("gpu_memory", "GB of GPU", 1e9),
    ):
        found = [run.result.figure(f"cost/{name}") for run in runs]
        values = [value for value in found if value is not None]
        if values and len(values) == len(runs):
            said.append(f"{(max(values) if 'memory' in name else sum(values)) / per:.3g} {unit}")
    return ", ".join(said) or "unknown"


def _unknown(runs: Sequence[Run]) -> str:
    """What some of the runs do not say of their cost: "energy, memory, "."""
    lacking = (name for name in ("energy", "memory") if any(run.result.figure(f"cost/{name}") is None for run in runs))
    return "".join(f"{name}, " for name in lacking)


def _machine(run: Run) -> str:
    about = run.result.machine
    words = [str(about[key]) for key in ("processor", "gpu") if about.get(key)]
    git = run.result.more.get("git")
    commit = f" at commit {str(git.get('commit'))[:12]}" if isinstance(git, dict) else ""
    return f"{' with '.join(words)}{commit}" if words else ""


def _data(run: Run) -> str:
    images = ", ".join(f"{count:,} {split}" for split, count in run.result.images.items() if count)
    return f"{run.result.choices.get('dataset', 'unknown')} ({images or 'sizes unknown'})"


def _teacher(run: Run) -> str:
    teacher = run.result.teacher
    return f"{teacher.name} {teacher.weights[:8]}" if teacher else "none"


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.result.versions.items()) or "unknown"


def _each(runs: Sequence[Run], of: Callable[[Run], str]) -> str:
    return "; ".join(dict.fromkeys(map(of, runs)))


def _some(values: Sequence[object]) -> str:
    """All of a few values; of many the first and the last."""
    words = list(map(str, values))
    return ", ".join(words) if len(words) <= 12 else f"{', '.join(words[:3])}, ..., {words[-1]} ({len(words)})"
