"""Kill, fill up and damage runs of kdbench, and count what is lost and what is wrong. One command, one table.

    python scripts/fault_suite [--kills N] [--seed S] [--only solo,table] [--short] [--keep FOLDER]

Every scenario is run once undisturbed. Then it is run again in fresh folders, in rounds of four kinds:

killed   up to four times by SIGKILL, with somebody reading meanwhile, and continued by the same command to its end
full     on a disk that fills up (a small tmpfs if it may be mounted, else a limit on the size of files), then with room
damaged  one file of a finished or an unfinished run has a bit flipped, is cut, emptied or overwritten; then continued,
         evaluated, compared or, where it is a teacher's, used again
crowd    typed by three processes at once, one of which may be killed

A kill comes at a random share of the processor time that the undisturbed process took, or right before a random one of
the changes that it made to files (an open for writing, a rename, a removal): the plan follows from the seed, and a
busy machine does not move it. At the end every file but checkpoints, Hydra's own and logs must be the undisturbed
run's: weights and tables byte for byte, figures, rows and TensorBoard's points by their numbers. `lost`: what cannot be
continued, files, rows and points that are missing. `wrong`: whatever else differs, and every message that is no message
("unexpected ...", a traceback). `leftovers`: hidden temporary files. Exits with 1 if there is any. POSIX only:
processes are forked from one that has imported everything and composed the configuration, so that a round takes a
second instead of ten. What they came to: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault_suite.scenario import SCENARIOS, Scenario

KINDS = ("killed", "full", "damaged", "crowd")


def suite(made: Sequence[Scenario], kills: int, others: int) -> None:
    """`others` rounds of each other kind in each scenario, then kills, spread over them until there are so many."""
    for kind, number in itertools.product(KINDS[1:], range(others)):
        for one in made:
            one.round(kind, number)
    for number in itertools.count():
        for one in made:
            if sum(one.tally.counts["kills"] for one in made) >= kills:
                return
            one.round("killed", number)


def table_of(made: Sequence[Scenario]) -> str:
    """A Markdown table, one row a scenario, and the sums."""
    kinds = ("kills", "readers", "full", "damaged", "crowds", "lost", "wrong", "leftovers")
    rows = [[one.name, *(str(one.tally.counts[kind]) for kind in kinds)] for one in made]
    rows.append(["all", *(str(sum(one.tally.counts[kind] for one in made)) for kind in kinds)])
    lines = [["scenario", *kinds], ["---", *["---:"] * len(kinds)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least so many, over all scenarios (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="scenarios with commas (default: all)")
    parser.add_argument("--others", type=int, default=3, help="rounds of each other kind a scenario (default: 3)")
    parser.add_argument("--short", action="store_true", help="one scenario, 4 kills, one round of each other kind")
    parser.add_argument("--again", metavar="KIND-NUMBER", help="this round alone of each scenario, e.g. killed-17")
    parser.add_argument("--keep", metavar="FOLDER", help="work here, and leave what went wrong")
    arguments = parser.parse_args()
    names = ["table"] if arguments.short else arguments.only.split(",")
    kills, others = (4, 1) if arguments.short else (arguments.kills, arguments.others)
    place = Path(arguments.keep or tempfile.mkdtemp(prefix="kdbench-faults-")).resolve()
    for number in (signal.SIGINT, signal.SIGTERM):  # in the background, too, where a shell has Ctrl-C ignored
        signal.signal(number, signal.default_int_handler)
    made: list[Scenario] = []
    try:
        made += (Scenario(name, SCENARIOS[name], place, arguments.seed) for name in names)
        if arguments.again:
            kind, _, which = arguments.again.partition("-")
            for one in made:
                one.round(kind, int(which))
        else:
            suite(made, kills, others)
    except KeyboardInterrupt:
        print("stopped; so far:")
    finally:
        if not arguments.keep:
            shutil.rmtree(place, ignore_errors=True)
    print(table_of(made))
    return 1 if any(one.tally.faults for one in made) else 0


if __name__ == "__main__":
    raise SystemExit(main())
