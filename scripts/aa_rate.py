"""How often `kdbench compare` calls a setting better than itself: an A/A test with real runs.

    python scripts/aa_rate.py outputs/aa --train 60 dataset=digits student=mlp teacher=none loss=ce schedule.epochs=5
    python scripts/aa_rate.py outputs/aa --runs 5 --settings 4

--train N trains seeds 0 to N - 1 of one setting (side by side; what is finished is not trained again). Then the runs
are dealt out at random to tables of `--settings` groups of `--runs` runs each, all of one setting, and each group
is judged against the first one exactly as `compare --against` does: with the runs' own seeds (another in every run:
Welch), and as if the groups had the same seeds (pairs). A table is wrong if any of its verdicts is BETTER, or WORSE.
Printed is the share of wrong tables over many dealings, and the 95 % interval (Clopper, Pearson 1934) of one dealing:
only its tables share no run, so only they are independent.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from kdbench.errors import UserError
from kdbench.results.read import Run, read_runs
from kdbench.results.rows import Row, compare
from kdbench.results.verdicts import Versus, against

KINDS = ("other seeds", "same seeds")


def main() -> int:
    arguments = _parse()
    if arguments.train:
        train(arguments.folder, int(arguments.train[0]), arguments.train[1:])
    rows = compare(read_runs([arguments.folder]).runs, [arguments.metric]).rows
    if len(rows) != 1:
        raise UserError(f"{arguments.folder}: holds {len(rows)} settings; an A/A test takes runs of one")
    found = rates(rows[0], arguments.runs, arguments.settings, arguments.metric, arguments.repeats)
    print(json.dumps(found, indent=1) if arguments.json else shown(found))
    return 0


def train(folder: Path, count: int, words: Sequence[str]) -> None:
    """Seeds 0 to count - 1 of one setting, side by side. Raises CalledProcessError."""
    sweep = ["-m", "hydra/launcher=cohort", f"paths.outputs={folder}", f"seed=range(0,{count})"]
    sweep += ["trainer.progress=none"]
    subprocess.run([sys.executable, "-m", "kdbench", "train", *sweep, *words], check=True, stdout=subprocess.DEVNULL)


def rates(row: Row, n: int, settings: int, metric: str, repeats: int) -> dict[str, Any]:
    """Shares of wrong tables by how groups are paired and what the verdicts are of. Raises UserError for too few."""
    tables = len(row.runs) // (n * settings)
    if tables < 1:
        raise UserError(f"{len(row.runs)} runs: {settings} groups of {n} take {n * settings} or more")
    wrong: dict[str, list[int]] = {}
    words: Counter[str] = Counter()
    for repeat in range(repeats):
        runs = list(row.runs)
        random.Random(repeat).shuffle(runs)
        for kind in KINDS:
            count: Counter[str] = Counter()
            for t in range(tables):
                part = runs[t * n * settings : (t + 1) * n * settings]
                groups = [_group(row, part[i * n : (i + 1) * n], kind, metric) for i in range(settings)]
                versus = against(groups, groups[0], metric).versus
                words.update(one.judged.verdict for one in versus)
                for name, said in _said(versus).items():
                    count[f"{kind}, {name}"] += bool(said & {"BETTER", "WORSE"})
            for name, number in count.items():
                wrong.setdefault(name, []).append(number)
    whole = {"runs": len(row.runs), "runs a setting": n, "settings": settings, "metric": metric, "tables": tables}
    shares = {name: _rate(counts, tables) for name, counts in wrong.items()}
    return {**whole, "dealings": repeats, "verdicts": dict(words), "wrong": shares}


def _said(versus: Sequence[Versus]) -> dict[str, set[str]]:
    """The verdicts of a table: on this test set, and on such images where the runs keep their predictions."""
    said = {"this test set": {one.judged.verdict for one in versus}}
    wider = {one.images.verdict for one in versus if one.images is not None}
    return {**said, **({"such images": set(map(str, wider))} if wider else {})}


def _group(row: Row, runs: Sequence[Run], kind: str, metric: str) -> Row:
    """Some of the runs as a setting of their own."""
    if kind == "same seeds":
        runs = [_with_seed(run, seed) for seed, run in enumerate(runs)]
    (made,) = compare(list(runs), [metric]).rows
    return made._replace(differs=row.differs)


def _with_seed(run: Run, seed: int) -> Run:
    seeds = {"seed": seed, "seeds.init": seed, "seeds.data": seed}
    return run._replace(result=replace(run.result, seed=seed, config={**run.result.config, **seeds}))


def _rate(counts: Sequence[int], tables: int) -> dict[str, Any]:
    interval = binomtest(counts[0], tables).proportion_ci()
    share = sum(counts) / len(counts) / tables
    return {"share": share, "first dealing": counts[0], "low": interval.low, "high": interval.high}


def shown(found: dict[str, Any]) -> str:
    head = (
        f"{found['runs']} runs of one setting, in {found['tables']} tables of {found['settings']} groups of "
        f"{found['runs a setting']}, dealt {found['dealings']} times; {found['metric']}"
    )
    lines = [
        f"  {name}: {100 * one['share']:.1f} % of tables wrong; first dealing {one['first dealing']} of "
        f"{found['tables']} ({100 * one['low']:.1f} to {100 * one['high']:.1f} %)"
        for name, one in found["wrong"].items()
    ]
    verdicts = ", ".join(f"{name} {count}" for name, count in found["verdicts"].items())
    return "\n".join([head, *lines, f"verdicts on the test set: {verdicts}"])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs are, or will be")
    parser.add_argument("--runs", type=int, default=3, help="runs a setting (default: 3)")
    parser.add_argument("--settings", type=int, default=2, help="settings a table (default: 2)")
    parser.add_argument("--metric", default="last", help="as for kdbench compare (default: last)")
    parser.add_argument("--repeats", type=int, default=100, help="dealings of the runs (default: 100)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--train", nargs="+", metavar="N WORD", help="train N seeds of a setting first; comes last")
    arguments = parser.parse_args()
    if arguments.runs < 3 or arguments.settings < 2 or arguments.repeats < 1:
        parser.error("--runs is 3 or more, --settings 2, --repeats 1")
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"aa_rate: {error}")
