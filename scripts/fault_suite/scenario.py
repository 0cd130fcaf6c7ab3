"""The commands that are disturbed, the ways to disturb them, and what came of it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fault_suite.process import TO_ITS_END, Ended, Moment, Process, warm_up  # noqa: F401 (Ended: for tests)
from fault_suite.state import WHOLE, no_messages, state

TINY = [
    "dataset=fake", "dataset.n=96", "dataset.n_test=48", "dataset.size=8", "dataset.num_classes=4",
    "dataset.validation=0.25", "student=resnet8", "schedule.epochs=5", "schedule.batch_size=24",
    "trainer.checkpoint_every=1",
    "trainer.device=cpu", "trainer.progress=none",
]  # fmt: skip
TAUGHT = ["teacher=resnet8", "teacher.schedule.epochs=3", "teacher.schedule.batch_size=24", "teacher.allow_chance=true"]
SCENARIOS = {
    "solo": ["train", *TINY, "teacher=none", "loss=ce"],
    "teacher": ["train", *TINY, *TAUGHT, "loss=kl", "teacher.table=off"],
    "table": ["train", *TINY, *TAUGHT, "loss=kl", "teacher.table=on"],
    "cohort": ["train", "-m", "hydra/launcher=cohort", *TINY, *TAUGHT, "loss=kl", "loss.tau=1,4"],
    "sweep": ["train", "-m", *TINY, "teacher=none", "loss=ce", "seed=0,1,2"],
    "born_again": ["train", *TINY, *TAUGHT, "loss=kl", "procedure=born_again", "procedure.generations=2"],
    "sequential": ["train", *TINY, *TAUGHT, "loss=kl", "procedure=sequential", "procedure.chain=[resnet8,mlp,resnet8]"],
    "epsilon": ["train", *TINY, *TAUGHT, "loss=ptloss", "loss.epsilon=search", "loss.search.count=12"],
}  # fmt: skip
TEXT = (".json", ".jsonl", ".yaml", ".log")  # a changed digit in one is no damage that can be seen
TMPFS = sys.platform == "linux" and hasattr(os, "geteuid") and os.geteuid() == 0


class Tally(NamedTuple):
    """What a scenario's rounds came to."""

    counts: Counter[str]
    faults: list[str]

    def add(self, kind: str, problems: Sequence[str], where: str) -> None:
        self.counts[kind] += len(problems)
        self.faults.extend(f"{kind}: {where}: {problem}" for problem in problems)
        for fault in self.faults[len(self.faults) - len(problems) :]:
            print(fault, file=sys.stderr, flush=True)


class Scenario:
    """One command, its undisturbed result, and the ways to disturb it. Each round has a plan of its own."""

    def __init__(self, name: str, words: Sequence[str], place: Path, seed: int) -> None:
        self.name, self.words, self.place, self.seed = name, list(words), place, seed
        self.tally = Tally(Counter(), [])
        warm_up(self.words)
        self.whole = self.fresh(WHOLE)
        process = Process(self.words, self.whole)
        process.lives(float("inf"))
        self.seconds = process.spent()
        ended = process.wait()
        self.changes = ended.changes
        if ended.code:
            raise SystemExit(f"{name} does not run undisturbed: {ended.text[-2000:]}")
        self.expected = state(self.whole)
        self.figures: dict[str, str] = {}  # what `evaluate` says of an undisturbed run, by its folder

    def fresh(self, name: str) -> Path:
        folder = self.place / self.name / name
        folder.mkdir(parents=True)
        return folder

    def round(self, kind: str, number: int) -> None:
        """One round; its plan follows from the seed, the scenario, the kind and the number alone."""
        chance = random.Random(f"{self.seed} {self.name} {kind} {number}")
        folder = self.fresh(f"{kind}-{number}")
        getattr(self, kind)(folder, chance)

    def where(self, folder: Path) -> str:
        return f"{self.name} {folder.name}"

    def moment(self, chance: random.Random) -> Moment:
        """Any moment of the undisturbed process's life: by its processor's time, or by what it did to files."""
        at, by_time = chance.random(), chance.random() < 0.5
        return Moment(seconds=at * self.seconds) if by_time else Moment(change=int(at * self.changes))

    def end(self, folder: Path) -> None:
        """Continue to the end and compare."""
        ended = Process(self.words, folder).wait()
        self.tally.add("wrong", no_messages(ended.text), self.where(folder))
        if ended.code:
            self.tally.add("lost", [f"cannot be continued: {ended.text[-500:]}"], self.where(folder))
        elif self.compare(folder, self.expected, self.where(folder)):
            shutil.rmtree(folder)

    def compare(self, folder: Path, expected: Mapping[str, Any], where: str) -> bool:
        """Whether a folder has what is expected; what it has not is tallied."""
        found = state(folder)
        missing = [name for name in expected if name not in found or _shorter(found[name], expected[name])]
        self.tally.add("lost", [f"{name} is missing or lacks rows" for name in missing], where)
        left = [name for name in found if found[name] == "a leftover"]
        self.tally.add("leftovers", [f"{name} is left over" for name in left], where)
        names = [name for name in {**found, **expected} if name not in missing + left]
        different = [name for name in names if found.get(name) != expected.get(name)]
        self.tally.add("wrong", [f"{name} differs" for name in different], where)
        return not (missing or left or different)

    def killed(self, folder: Path, chance: random.Random) -> None:
        """Killed up to four times, with a reader at work, then continued."""
        for _ in range(chance.randint(1, 4)):
            kind, look = chance.choice(("compare", "evaluate", "events", "none")), chance.random()
            process = Process(self.words, folder, self.moment(chance))
            limit = process.dies.seconds if process.dies.seconds is not None else self.seconds
            reader = self.reader(kind, folder, chance) if process.lives(look * limit) else None
            ended = process.wait()
            if reader is not None:
                self.tally.counts["readers"] += 1
                self.tally.add("wrong", no_messages(reader.wait().text), f"{self.where(folder)} (reads: {kind})")
            self.tally.add("wrong", no_messages(ended.text), self.where(folder))
            if ended.code != -signal.SIGKILL:
                break
            self.tally.counts["kills"] += 1
        self.end(folder)

    def reader(self, kind: str, folder: Path, chance: random.Random) -> Process | None:
        """Somebody who looks at the results while they are made: compare, evaluate, or TensorBoard's own reader."""
        runs = runs_in(folder)
        if kind == "evaluate" and runs:
            return Process(["evaluate", chance.choice(runs)], folder)
        if kind == "events" or (kind == "compare" and (folder / "outputs").exists()):
            return Process([kind, "outputs"], folder)
        return None

    def full(self, disk: Path, chance: random.Random) -> None:
        """The disk fills up at a random moment; with room again the same command goes on."""
        used = sum(path.stat().st_blocks * 512 for path in self.whole.rglob("*") if path.is_file())
        largest = max(path.stat().st_size for path in self.whole.rglob("*.safetensors"))
        share = chance.random()
        size = (8 + int(share * used) // 4096) * 4096
        mounted = TMPFS and _quiet("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk))
        folder = disk / f"of-{size}-bytes"
        folder.mkdir()
        try:
            ended = Process(self.words, folder, limit=None if mounted else int(share * largest)).wait()
            self.tally.add("wrong", no_messages(ended.text), f"{self.where(disk)} {folder.name}")
            self.tally.counts["full"] += 1
            if ended.code and "space" not in ended.text and "large" not in ended.text:
                self.tally.add("wrong", [f"says nothing of a full disk: {ended.text[-500:]}"], self.where(disk))
            if mounted:
                _quiet("mount", "-o", f"remount,size={4 * used + 50_000_000}", str(disk))
            self.end(folder)
        finally:
            if mounted:
                _quiet("umount", str(disk))
            with contextlib.suppress(OSError):  # it holds what went wrong
                disk.rmdir()

    def damaged(self, folder: Path, chance: random.Random) -> None:
        """One file is damaged: the right result all the same, or a message that names it."""
        if chance.random() < 0.6:  # finished
            shutil.copytree(self.whole, folder, dirs_exist_ok=True)
        else:
            Process(self.words, folder, Moment(change=int(chance.uniform(0.2, 0.98) * self.changes))).wait()
        file = _any_file(folder, chance)
        if file is None:
            return
        how = damage(file, chance)
        words = self.use(folder, file, chance)
        self.tally.counts["damaged"] += 1
        ended = Process(words, folder).wait()
        before, faults = len(self.tally.faults), no_messages(ended.text)
        # What is not finished is left out of a comparison unread.
        if ended.code and file.name not in ended.text and ": not finished" not in ended.text:
            faults.append(f"the message does not name the file: {ended.text[-500:]}")
        where = f"{self.where(folder)} ({how} in {file.relative_to(folder)}, then {words[0]})"
        self.tally.add("wrong", faults, where)
        if not ended.code and words[0] == "evaluate" and file.suffix not in TEXT:
            right = ended.text == self.evaluated(words[1], words[2])
            self.tally.add("wrong", [] if right else ["other figures, without a word"], where)
        if not ended.code and words is self.words:
            self.compare(folder, self.not_of(file, folder), where)
        if len(self.tally.faults) == before:
            shutil.rmtree(folder)

    def use(self, folder: Path, file: Path, chance: random.Random) -> Sequence[str]:
        """A command that meets the damaged file: the same one, one that reads, or, for a teacher's, a new run."""
        run = next((run for run in runs_in(folder) if folder / run in file.parents), None)
        if run is not None and (folder / run / "result.json").exists() and chance.random() < 0.5:
            weights = "/best.safetensors" if file.name == "best.safetensors" else ""
            reads = ["evaluate", run + weights, "--json"], ["compare", "outputs"]
            return reads[chance.random() < 0.3]
        if "teachers" in file.parts:
            shutil.rmtree(folder / "outputs" / "runs", ignore_errors=True)
        return self.words

    def evaluated(self, run: str, form: str) -> str:
        """What `evaluate` prints of the undisturbed run."""
        if run not in self.figures:
            self.figures[run] = Process(["evaluate", run, form], self.whole).wait().text
        return self.figures[run]

    def not_of(self, file: Path, folder: Path) -> Mapping[str, Any]:
        """What the whole must still have where a file was damaged: all but that file, or, where a figure or a name in
        a text may have become another one, the weights alone."""
        own = str(file.relative_to(folder))
        own = str(Path(own).parent / "events") if file.name.startswith("events.") else own
        found = state(folder)
        kept = {name: value for name, value in found.items() if name != own}
        expected = {name: value for name, value in self.expected.items() if name != own}
        if file.suffix in TEXT:
            expected = {name: expected[name] for name in expected if name.endswith(".safetensors")}
            kept = {name: value for name, value in found.items() if name not in expected}
        extra = {name: value for name, value in kept.items() if name not in expected}
        return {**expected, **extra, **({own: found[own]} if own in found else {})}

    def crowd(self, folder: Path, chance: random.Random) -> None:
        """Three processes type the same command, and one of them may be killed; then it is typed once more."""
        dies = self.moment(chance) if chance.random() < 0.5 else TO_ITS_END
        together = [Process(self.words, folder, moment) for moment in (dies, TO_ITS_END, TO_ITS_END)]
        chance.shuffle(together)
        self.tally.counts["crowds"] += 1
        for ended in [process.wait() for process in together]:
            self.tally.add("wrong", no_messages(ended.text), self.where(folder))
            self.tally.counts["kills"] += ended.code == -signal.SIGKILL
            single = "-m" not in self.words and "another process" in ended.text
            if ended.code not in (0, -signal.SIGKILL) and not single:
                self.tally.add("wrong", [f"turned away: {ended.text[-500:]}"], self.where(folder))
        self.end(folder)


def runs_in(folder: Path) -> list[str]:
    found = (path.parent for path in folder.rglob("config.yaml") if path.parent.name != ".hydra")
    return sorted(str(path.relative_to(folder)) for path in found)


def _any_file(folder: Path, chance: random.Random) -> Path | None:
    """A file that the run left, every kind of file as likely as another."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            kind = path.name if path.suffix != ".table" else "table"
            kinds.setdefault("events" if path.name.startswith("events.") else kind, []).append(path)
    return chance.choice(kinds[chance.choice(sorted(kinds))]) if kinds else None


def damage(file: Path, chance: random.Random) -> str:
    """Flip a bit, cut, empty or overwrite a part of a file; says which."""
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
    return f"{kind} at {at}"


def _shorter(found: Any, expected: Any) -> bool:
    return isinstance(found, list) and len(found) < len(expected)


def _quiet(*words: str) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0
