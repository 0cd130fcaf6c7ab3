"""Kill, fill up and damage runs of kdbench, and count what is lost and what is wrong. One command, one table.

    python scripts/fault_suite.py [--kills N] [--seed S] [--only solo,table] [--short] [--keep FOLDER]

Every scenario is run once undisturbed. Then it is run again and again in fresh folders: killed (SIGKILL) at random
moments while readers look at it, and continued by the same command until it is finished; filled up (a small tmpfs
where it may be mounted, else a limit on the size of files) and continued with room; damaged in one file (a bit flipped,
cut, emptied, overwritten) and continued or evaluated; and typed by several processes at once. At the end its weights
must be the same bytes as the undisturbed run's, and its figures and rows the same numbers. `lost`: what cannot be
continued, and rows that are missing. `wrong`: anything else that differs, and every message that is no message
("unexpected ...", a traceback). Exits with 1 if there is any. POSIX only: processes are forked, so that a round takes a
second instead of ten. Figures: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked processes share the cores

from kdbench import cli
from kdbench.build import make_recipe  # noqa: F401 (imports all that a run needs, once, before the forks)

TINY = [
    "dataset=fake", "dataset.n=64", "dataset.n_test=48", "dataset.size=8", "dataset.num_classes=4",
    "dataset.validation=0.25", "student=resnet8", "schedule.epochs=6", "schedule.batch_size=16",
    "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip
TAUGHT = ["teacher=resnet8", "teacher.schedule.epochs=4", "teacher.schedule.batch_size=16", "teacher.allow_chance=true"]
SCENARIOS = {
    "solo": ["train", *TINY, "teacher=none", "loss=ce"],
    "teacher": ["train", *TINY, *TAUGHT, "loss=kl"],
    "table": ["train", *TINY, *TAUGHT, "loss=kl", "teacher.table=on"],
    "cohort": ["train", "-m", "hydra/launcher=cohort", *TINY, *TAUGHT, "loss=kl", "loss.tau=1,4"],
    "sweep": ["train", "-m", *TINY, "teacher=none", "loss=ce", "seed=0,1,2"],
    "born_again": ["train", *TINY, *TAUGHT, "loss=kl", "procedure=born_again", "procedure.generations=2"],
    "sequential": ["train", *TINY, *TAUGHT, "loss=kl", "procedure=sequential", "procedure.chain=[resnet8,mlp,resnet8]"],
    "epsilon": ["train", *TINY, *TAUGHT, "loss=ptloss", "loss.epsilon=search", "loss.search.count=12"],
}  # fmt: skip
TIMES = ("seconds", "images_per_second", "finished", "started")  # what differs between equal runs
NO_MESSAGE = ("unexpected ", "Traceback (most recent call last)", "This should not happen")
DAMAGED = ("checkpoint.pt", "student.safetensors", "best.safetensors", "metrics.jsonl", "result.json", "run.json",
           "network.json", "config.yaml", "*.table", "events.*")  # fmt: skip


class Ended(NamedTuple):
    code: int  # negative: killed by that signal
    text: str  # what it printed


class Tally(NamedTuple):
    """What a scenario's rounds came to."""

    counts: Counter[str]
    faults: list[str]

    def add(self, kind: str, problems: Sequence[str], where: str) -> None:
        self.counts[kind] += len(problems)
        self.faults.extend(f"{where}: {problem}" for problem in problems)


class Process:
    """`kdbench words...` in a forked process of its own, in a folder."""

    def __init__(self, words: Sequence[str], folder: Path, limit: int | None = None) -> None:
        self.output = folder / f".output.{time.monotonic_ns()}"
        self.number = os.fork()
        if self.number == 0:
            self._become(words, folder, limit)

    def _become(self, words: Sequence[str], folder: Path, limit: int | None) -> None:
        code = 70
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(folder)
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.argv = ["kdbench", *words]
            code = cli.main()
            sys.stdout.flush()
        finally:
            os._exit(code)

    def wait(self, seconds: float = 300, then_kill: bool = False) -> Ended:
        """Until it ends; `then_kill`: or for so long, and then SIGKILL."""
        until = time.monotonic() + seconds
        done, status = os.waitpid(self.number, os.WNOHANG)
        while not done and time.monotonic() < until:
            time.sleep(0.003)
            done, status = os.waitpid(self.number, os.WNOHANG)
        if not done:
            os.kill(self.number, signal.SIGKILL)
            _, status = os.waitpid(self.number, 0)
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""
        if not done and not then_kill:
            text += "\nhangs: Traceback (most recent call last)"
        return Ended(os.waitstatus_to_exitcode(status), text)


def state(folder: Path) -> dict[str, Any]:
    """All that must be the same: weights by their bytes, figures and rows by their numbers."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "student.safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "result.json":
            text = path.read_text(encoding="utf-8").replace(f"{folder}/", "")
            found[name] = _timeless(json.loads(text))
        elif path.name == "metrics.jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.name.endswith(".tmp"):
            found[name] = "a leftover"
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else repr(value)


class Scenario:
    """One command, its undisturbed result, and the ways to disturb it."""

    def __init__(self, name: str, words: Sequence[str], place: Path, seed: int) -> None:
        self.name, self.words, self.place = name, list(words), place
        self.random = random.Random(f"{seed}-{name}")
        self.tally = Tally(Counter(), [])
        self.rounds = 0
        self.whole = self.fresh()
        begin = time.monotonic()
        ended = Process(self.words, self.whole).wait()
        self.seconds = time.monotonic() - begin
        if ended.code:
            raise SystemExit(f"{name} does not run undisturbed: {ended.text[-2000:]}")
        self.expected = state(self.whole)

    def fresh(self) -> Path:
        self.rounds += 1
        folder = self.place / self.name / str(self.rounds)
        folder.mkdir(parents=True)
        return folder

    def end(self, folder: Path, kind: str) -> None:
        """Continue to the end and compare."""
        ended = Process(self.words, folder).wait()
        where = f"{self.name} {folder.name} ({kind})"
        self.tally.add("wrong", no_messages(ended.text), where)
        if ended.code:
            self.tally.add("lost", [f"cannot be continued: {ended.text[-300:]}"], where)
            return
        found = state(folder)
        missing = [name for name in self.expected if name not in found or _shorter(found[name], self.expected[name])]
        self.tally.add("lost", [f"{name} is missing or lacks rows" for name in missing], where)
        names = [name for name in {**found, **self.expected} if name not in missing]
        different = [name for name in names if found.get(name) != self.expected.get(name)]
        self.tally.add("wrong", [f"{name} differs" for name in different], where)
        if found == self.expected:
            shutil.rmtree(folder)

    def killed(self) -> None:
        """A round: killed up to four times at random moments, with a reader at work, then continued."""
        folder = self.fresh()
        for _ in range(self.random.randint(1, 4)):
            process = Process(self.words, folder)
            reader = self._reader(folder)
            ended = process.wait(self.random.uniform(0.05, 1.0) * self.seconds, then_kill=True)
            if reader is not None:
                self.tally.add("wrong", no_messages(reader.wait().text), f"{self.name} {folder.name} (a reader)")
            self.tally.add("wrong", no_messages(ended.text), f"{self.name} {folder.name} (killed)")
            if ended.code != -signal.SIGKILL:
                break
            self.tally.counts["kills"] += 1
        self.end(folder, "killed")

    def _reader(self, folder: Path) -> Process | None:
        """Somebody who looks at the results while they are made: compare, evaluate, or TensorBoard's own reader."""
        runs = sorted(path.parent for path in folder.rglob("config.yaml") if path.parent.name != ".hydra")
        kind = self.random.choice(("compare", "evaluate", "events", None))
        if kind == "compare" and (folder / "outputs").exists():
            return Process(["compare", "outputs"], folder)
        if kind == "evaluate" and runs:
            return Process(["evaluate", str(self.random.choice(runs))], folder)
        if kind == "events":
            _read_events(folder)
        return None

    def full(self) -> None:
        """The disk fills up at a random moment; with room again the same command goes on."""
        disk = self.fresh()
        used = sum(path.stat().st_blocks * 512 for path in self.whole.rglob("*") if path.is_file())
        largest = max(path.stat().st_size for path in self.whole.rglob("*.pt"))
        size = int(self.random.uniform(0.1, 1.0) * used)
        mounted = shutil.which("mount") and _quiet("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk))
        folder = disk / "run"
        folder.mkdir()
        try:
            limit = None if mounted else int(self.random.uniform(0.05, 0.95) * largest)
            ended = Process(self.words, folder, limit).wait()
            self.tally.add("wrong", no_messages(ended.text), f"{self.name} {disk.name} (full)")
            self.tally.counts["full"] += ended.code != 0
            if mounted:
                _quiet("mount", "-o", f"remount,size={4 * used + 50_000_000}", str(disk))
            self.end(folder, "full")
        finally:
            if mounted:
                _quiet("umount", str(disk))

    def damaged(self, finished: bool) -> None:
        """One file of a finished or unfinished run is damaged: its right result again, or a message that names it."""
        folder = self.fresh()
        share = 1.5 if finished else self.random.uniform(0.4, 0.9)
        Process(self.words, folder).wait(share * self.seconds + finished * 60, then_kill=True)
        pattern = self.random.choice(DAMAGED)
        files = sorted(path for path in folder.rglob(pattern) if path.is_file() and path.stat().st_size)
        if not files:
            return
        file = self.random.choice(files)
        damage(file, self.random)
        self.tally.counts["damaged"] += 1
        where = f"{self.name} {folder.name} ({file.relative_to(folder)} damaged)"
        words = ["evaluate", str(file.parent)] if finished and (file.parent / "result.json").exists() else self.words
        ended = Process(words, folder).wait()
        self.tally.add("wrong", no_messages(ended.text), where)
        if ended.code and file.name not in ended.text:
            self.tally.add("wrong", [f"the message does not name the file: {ended.text[-300:]}"], where)
        if not ended.code and words is self.words:
            weights = {name: value for name, value in state(folder).items() if name.endswith(".safetensors")}
            wanted = {name: value for name, value in self.expected.items() if name.endswith(".safetensors")}
            if file.name != "student.safetensors" and weights != wanted:
                self.tally.add("wrong", ["other weights, without a word"], where)

    def crowd(self, processes: int = 3) -> None:
        """Several processes type the same command; whoever is turned away types it again later."""
        folder = self.fresh()
        together = [Process(self.words, folder) for _ in range(processes)]
        for process in together:
            self.tally.add("wrong", no_messages(process.wait().text), f"{self.name} {folder.name} (crowd)")
        self.tally.counts["crowds"] += 1
        self.end(folder, "crowd")


def no_messages(text: str) -> list[str]:
    """Lines of an output that say nothing to a user."""
    return [line for line in text.splitlines() if any(word in line for word in NO_MESSAGE)]


def damage(file: Path, chance: random.Random) -> None:
    """Flip a bit, cut, empty or overwrite a part of a file."""
    raw = bytearray(file.read_bytes())
    at = chance.randrange(len(raw))
    kind = chance.choice(("flip", "cut", "empty", "overwrite"))
    if kind == "flip":
        raw[at] ^= 1 << chance.randrange(8)
    elif kind == "overwrite":
        raw[at : at + 64] = chance.randbytes(min(64, len(raw) - at))
    else:
        del raw[at if kind == "cut" else 0 :]
    file.write_bytes(raw)


def _shorter(found: Any, expected: Any) -> bool:
    return isinstance(found, list) and len(found) < len(expected)


def _read_events(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for events in folder.rglob("events.out.tfevents.*"):
        EventAccumulator(str(events)).Reload()


def _quiet(*words: str) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0


def suite(names: Sequence[str], kills: int, seed: int, place: Path, others: int) -> list[Scenario]:
    """`kills` kills spread over the scenarios, and `others` rounds of each other kind in each of them."""
    made = [Scenario(name, SCENARIOS[name], place, seed) for name in names]
    while made and sum(one.tally.counts["kills"] for one in made) < kills:
        for one in made:
            one.killed()
    for one in made:
        for _ in range(others):
            one.full()
            one.damaged(finished=True)
            one.damaged(finished=False)
        if others:
            one.crowd()
    return made


def table(made: Sequence[Scenario]) -> str:
    """A Markdown table, one row a scenario, and the sums."""
    kinds = ("kills", "full", "damaged", "crowds", "lost", "wrong")
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
    parser.add_argument("--short", action="store_true", help="two scenarios, 6 kills, one round of each other kind")
    parser.add_argument("--keep", metavar="FOLDER", help="work here, and leave what went wrong")
    arguments = parser.parse_args()
    names = ["solo", "table"] if arguments.short else arguments.only.split(",")
    kills, others = (6, 1) if arguments.short else (arguments.kills, arguments.others)
    place = Path(arguments.keep or tempfile.mkdtemp(prefix="kdbench-faults-")).resolve()
    try:
        made = suite(names, kills, arguments.seed, place, others)
    finally:
        if not arguments.keep:
            shutil.rmtree(place, ignore_errors=True)
    faults = [fault for one in made for fault in one.tally.faults]
    print(table(made))
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
