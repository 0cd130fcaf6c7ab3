"""The CRD table: what was published of its 13 pairs (crd_table.yaml), what would measure it, and what was measured.

    python scripts/crd_table.py commands [pair ...] [--methods KD,DKD]   pair, method, words after `kdbench train`
    python scripts/crd_table.py table outputs/reproduce/crd_table [--markdown]
    python scripts/crd_table.py headers          writes the published figures into configs/experiment/tian2020_*.yaml

A figure holds if the 95 % t interval of our mean over seeds lies above it less a tolerance, does not hold if it lies
below, and cannot be told if the bound is inside, as in `kdbench claims`. The tolerance, written down before any run:
0.5 points, as much as five runs of one setting differ by, and 0.3 more for figures of the best of 240 test evaluations
(* and +), since ours are of the last epoch. Pairs and methods without runs are left out.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kdbench.results.claims import BySeed, Claim, Runs, last, row

EXPERIMENTS = Path(__file__).parent.parent / "configs" / "experiment"
FIGURES = Path(__file__).with_suffix(".yaml")
PAPER = "tian2020"
EPOCHS = {"last": "", "best": "*", "unsaid": "+"}  # the mark of what epoch a figure is of
VALUE = re.compile(r"(\d\d\.\d\d)([?^~]*)")
LAST, BEST = 0.5, 0.8  # points below a published figure at which it still holds: of the last epoch, of the best
LEGEND = (
    "Plain figures are of the last epoch; * of the best of 240 test evaluations, about 0.3 above the last; + of an "
    "epoch that is not said, read as the best. ? the authors' setting for this pair is not published: weights of the "
    "loss's file; ^ with another teacher than RepDistiller's; ~ at second hand, the paper was not at hand: such a "
    "figure may be missed for that reason. Five runs of one setting differ by 0.2 to 0.5."
)


class Figure(NamedTuple):
    """A published test accuracy, %, and what reproduces it."""

    pair: str
    method: str
    words: tuple[str, ...]
    accuracy: float
    epoch: str = "last"  # one of EPOCHS
    marks: str = ""  # of ?, ^ and ~
    source: str = ""

    @property
    def said(self) -> str:
        return f"{self.accuracy:.2f}{EPOCHS[self.epoch]}{self.marks}"

    @property
    def bound(self) -> float:
        return round(self.accuracy - (LAST if self.epoch == "last" else BEST), 2)


@functools.cache
def table() -> tuple[dict[str, float], tuple[Figure, ...]]:
    """The teachers' accuracies by pair, and every figure of every pair."""
    tree = yaml.load(FIGURES.read_text(encoding="utf-8"), yaml.BaseLoader)  # all leaves as text
    teachers = {pair: float(value) for pair, value in tree["teachers"].items()}
    return teachers, tuple(figure for block in tree["figures"] for figure in _of(block, teachers))


def _of(block: dict[str, str], teachers: Iterable[str]) -> Iterator[Figure]:
    """Raises ValueError for a line that is no figure of a pair."""
    known = ("method", "source", "epoch", "note", "words")
    for pair, text in block.items():
        if pair in known:
            continue
        value, *more = text.split()
        found = VALUE.fullmatch(value)
        if found is None or pair not in teachers or block["epoch"] not in EPOCHS:
            raise ValueError(f"{FIGURES.name}, {block['method']}: {pair}: {text}")
        words = (*block["words"].split(), *more)
        yield Figure(pair, block["method"], words, float(found[1]), block["epoch"], found[2], block["source"])


def pairs() -> list[str]:
    """The thirteen, as the experiments name them."""
    return list(table()[0])


def published(pair: str) -> list[Figure]:
    return [figure for figure in table()[1] if figure.pair == pair]


def header(pair: str) -> list[str]:
    """What the pair's experiment says of them: figures by source, and what their marks mean."""
    sources: dict[str, list[str]] = {}
    for figure in published(pair):
        sources.setdefault(figure.source, []).append(f"{figure.method} {figure.said}")
    next(iter(sources.values())).insert(0, f"teacher {table()[0][pair]:.2f}")
    lines = [f"{source}: {'; '.join(found)}" for source, found in sources.items()]
    folded = [part for line in lines for part in _folded(line, "#   ", "#     ")]
    where = (
        f"What reproduces each: python scripts/crd_table.py commands {pair}; sources and notes: scripts/crd_table.yaml"
    )
    return [*folded, *_folded(LEGEND, "# ", "# "), f"# {where}"]


def _folded(text: str, first: str, later: str) -> list[str]:
    whole = text.replace("; ", ";\n")  # a figure and its method stay on one line
    kept = [part.replace(" ", "\0") if first != later else part for part in whole.split("\n")]
    lines = textwrap.wrap(" ".join(kept), 130, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def write_headers() -> None:
    """Between the first sentence of each pair's experiment and its command."""
    for pair in pairs():
        path = EXPERIMENTS / f"{PAPER}_{pair}.yaml"
        before, rest = path.read_text(encoding="utf-8").split("\n#   ", 1)
        after = rest.split("\n# Command:", 1)[1]
        path.write_text("\n".join([before, *header(pair), f"# Command:{after}"]), encoding="utf-8")


def measured(figure: Figure, runs: Runs) -> BySeed:
    """Our accuracies of the last epoch by seed. Raises LookupError if there are none."""
    return runs(f"{figure.pair}/{figure.method}", **{"optimizer": "sgd"} | recorded(figure))[last]


def recorded(figure: Figure) -> dict[str, Any]:
    """What a result says of its words: not of options within a group (@, /), which the method's folder stands for."""
    given = (word.split("=", 1) for word in figure.words)
    return {key.replace(".", "__"): yaml.safe_load(value) for key, value in given if not set("@/") & set(key)}


def judged(folder: Path) -> Iterator[list[str]]:
    """A row for each published figure that has runs: pair, method, published, ours, ..., verdict."""
    runs = Runs(folder, PAPER)
    for figure in table()[1]:
        words = " ".join(figure.words)
        claim = Claim(figure.pair, "claim", words, ">=", figure.bound, functools.partial(measured, figure))
        try:
            runs.images.clear()
            found = claim.figure(runs)
        except LookupError as error:
            if (folder / f"{PAPER}_{figure.pair}" / figure.method).is_dir():
                print(f"{figure.pair} {figure.method}: {error}", file=sys.stderr)
            continue
        *_, mean, error, interval, _, _, verdict = row(PAPER, claim, found, min(runs.images, default=0))
        yield [figure.pair, figure.method, figure.said, mean, error, interval, str(len(found)), verdict]


def show(folder: Path, markdown: bool) -> None:
    head = ["pair", "method", "published", "ours", "error", "95 % interval", "n", ""]
    lines = [head, *judged(folder)]
    if markdown:
        lines.insert(1, ["---"] * len(head))
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    else:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print("", *textwrap.wrap(LEGEND, 118), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("commands")
    listing.add_argument("pairs", nargs="*", metavar="pair")
    listing.add_argument("--methods", default="", help="few of them, separated by commas")
    results = commands.add_parser("table")
    results.add_argument("folder", type=Path)
    results.add_argument("--markdown", action="store_true")
    commands.add_parser("headers")
    given = parser.parse_args()
    if given.command == "headers":
        write_headers()
    elif given.command == "table":
        show(given.folder, given.markdown)
    else:
        known, methods = {figure.method for figure in table()[1]}, set(filter(None, given.methods.split(",")))
        for unknown in [*sorted(set(given.pairs) - set(pairs())), *sorted(methods - known)]:
            parser.error(f"{unknown}: must be one of {', '.join(pairs())}; methods: {', '.join(sorted(known))}")
        for figure in (figure for pair in given.pairs or pairs() for figure in published(pair)):
            if not methods or figure.method in methods:
                print(figure.pair, figure.method, *figure.words)


if __name__ == "__main__":
    main()
