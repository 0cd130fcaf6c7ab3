"""The CRD table: what configs/experiment/tian2020_* say was published, what would measure it, and what was measured.

    python scripts/crd_table.py commands [pair ...]      the words after `kdbench train`, a line for each figure
    python scripts/crd_table.py table outputs/reproduce/crd_table [--markdown]

A header's figure holds if the 95 % t interval of our mean over seeds lies above it less a tolerance, does not hold if
it lies below, and cannot be told if the bound is inside, as in `kdbench claims`. The tolerance, written down before
any run: 0.5 points, as much as five runs of one setting differ by, and 0.3 more for figures of the best of 240 test
evaluations (* and +), since ours are of the last epoch. Pairs and figures without runs are left out.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from kdbench.results.claims import BySeed, Claim, Runs, last, row

EXPERIMENTS = Path(__file__).parent.parent / "configs" / "experiment"
PAPER = "tian2020"
ENTRY = re.compile(r"(loss=\S+(?: [\w.@]+=\S+)*) (\d\d\.\d\d)([*+]?)(?:;|$)")
ALONE = re.compile(r"student alone \((teacher=none loss=ce)\) (\d\d\.\d\d)")
LAST, BEST = 0.5, 0.8  # points below a published figure at which it still holds: of the last epoch, of the best


class Figure(NamedTuple):
    """A published test accuracy, %, and what reproduces it."""

    pair: str
    words: tuple[str, ...]
    accuracy: float
    best: bool  # of the best epoch, or not said

    @property
    def bound(self) -> float:
        return round(self.accuracy - (BEST if self.best else LAST), 2)


def published(pair: str) -> list[Figure]:
    """The figures in the header of a pair's experiment."""
    header = (EXPERIMENTS / f"{PAPER}_{pair}.yaml").read_text(encoding="utf-8").split("\ndefaults:")[0]
    lines = [line[1:].strip() for line in header.splitlines()]
    flows = re.search(r"\(loss=fsp: (schedule[^,]*?\S+ schedule\.milestones=\S+\]),", header)
    found = [Figure(pair, tuple(words.split()), float(value), False) for words, value in ALONE.findall(header)]
    for line in lines:
        for words, value, mark in ENTRY.findall(line) if line.startswith("loss=") else ():
            more = flows[1].split() if flows and words == "loss=fsp" else []
            found.append(Figure(pair, (*words.split(), *more), float(value), mark != ""))
    return found


def pairs() -> list[str]:
    """The thirteen, as the experiments name them."""
    names = sorted(path.stem.removeprefix(f"{PAPER}_") for path in EXPERIMENTS.glob(f"{PAPER}_*.yaml"))
    return [name for name in names if published(name)]


def measured(figure: Figure, runs: Runs) -> BySeed:
    """Our accuracies of the last epoch by seed. Raises LookupError if there are none."""
    given = (word.split("=", 1) for word in figure.words if "@" not in word.split("=")[0])  # the teacher's own
    wanted = {"optimizer": "sgd"} | {key.replace(".", "__"): yaml.safe_load(value) for key, value in given}
    return runs(figure.pair, **wanted)[last]


def judged(folder: Path) -> Iterator[list[str]]:
    """A row for each published figure that has runs: pair, settings, published, ours, ..., verdict."""
    runs = Runs(folder, PAPER)
    for figure in (figure for pair in pairs() for figure in published(pair)):
        words = " ".join(figure.words)
        claim = Claim(figure.pair, "claim", words, ">=", figure.bound, functools.partial(measured, figure))
        try:
            runs.images.clear()
            found = claim.figure(runs)
        except LookupError:
            continue
        *_, mean, error, interval, _, _, verdict = row(PAPER, claim, found, min(runs.images, default=0))
        said = f"{figure.accuracy:.2f}{' best' if figure.best else ''}"
        yield [figure.pair, words, said, mean, error, interval, str(len(found)), verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("commands")
    listing.add_argument("pairs", nargs="*", metavar="pair")
    table = commands.add_parser("table")
    table.add_argument("folder", type=Path)
    table.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "commands":
        for figure in (figure for pair in arguments.pairs or pairs() for figure in published(pair)):
            print(figure.pair, *figure.words)
        return
    head = ["pair", "settings", "published", "ours", "error", "95 % interval", "n", ""]
    lines = [head, *judged(arguments.folder)]
    if arguments.markdown:
        lines.insert(1, ["---"] * len(head))
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
