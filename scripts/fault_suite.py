"""Kill, fill up and damage runs of kdbench, and count what is lost and what is wrong. One command, one table.

    python scripts/fault_suite.py [--kills N] [--seed S] [--only solo,table] [--short] [--keep FOLDER]

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
import contextlib
import hashlib
import io
import itertools
import json
import logging
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forked processes share the cores

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdbench import build, cli  # noqa: F401 (build imports all that a run needs, once, before the forks)
from kdbench.commands import compare, evaluate, table, train  # noqa: F401

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # its reader tells of every continued run

TINY = [
    "dataset=fake", "dataset.n=96", "dataset.n_test=48", "dataset.size=8", "dataset.num_classes=4",
    "dataset.validation=0.25", "student=resnet8", "schedule.epochs=5", "schedule.batch_size=24",
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
KINDS = ("killed", "full", "damaged", "crowd")
# What differs between equal runs.
TIMES = (
    "seconds", "images_per_second", "time/images_per_second", "finished", "started", "machine", "git", "cost",
    "process", "host", "epochs_done",
)  # fmt: skip
NO_MESSAGE = ("unexpected ", "Traceback (most recent call last)", "This should not happen", "Exception in thread")
UNCOMPARED = (
    ".lock", ".log", "checkpoint.pt", "multirun.yaml", "optimization_results.yaml", "points.json",
)  # fmt: skip # times, folders, threads
TEXT = (".json", ".jsonl", ".yaml", ".log")  # a changed digit in one is no damage that can be seen
TMPFS = sys.platform == "linux" and hasattr(os, "geteuid") and os.geteuid() == 0
WHOLE = "undisturbed"  # the folder of the run that all others are compared with
PATIENCE = 300.0  # seconds after which a process hangs


class Ended(NamedTuple):
    code: int  # negative: killed by that signal
    text: str  # what it printed
    changes: int = 0  # that it made to files


class Tally(NamedTuple):
    """What a scenario's rounds came to."""

    counts: Counter[str]
    faults: list[str]

    def add(self, kind: str, problems: Sequence[str], where: str) -> None:
        self.counts[kind] += len(problems)
        self.faults.extend(f"{kind}: {where}: {problem}" for problem in problems)
        for fault in self.faults[len(self.faults) - len(problems) :]:
            print(fault, file=sys.stderr, flush=True)


class Moment(NamedTuple):
    """When a process is killed: after so many seconds of processor time, or before its so-manieth change of a file."""

    seconds: float | None = None
    change: int | None = None


TO_ITS_END = Moment()


class Process:
    """`kdbench words...` in a forked process of its own, in a folder, killed at a moment. `limit`: bytes a file."""

    def __init__(self, words: Sequence[str], folder: Path, dies: Moment = TO_ITS_END, limit: int | None = None) -> None:
        self.dies, self.begin = dies, time.monotonic()
        self.output, self.count = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        self.number = os.fork()
        if self.number == 0:
            self._become(words, folder, limit)

    def _become(self, words: Sequence[str], folder: Path, limit: int | None) -> None:
        code = 70
        try:
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
            os.chdir(folder)
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            made = _count_changes(self.dies.change)
            sys.argv = ["kdbench", *words]
            code = _read_events() if words[0] == "events" else cli.main()
            sys.stdout.flush()
            os.write(self.count.fileno(), str(next(made)).encode())
        finally:
            os._exit(code)

    def spent(self) -> float:
        """Seconds of processor time it has used; where the system does not tell, seconds since it began."""
        try:
            return time.clock_gettime((~self.number << 3) | 2)  # Linux: another process's clock
        except (OSError, AttributeError):
            return time.monotonic() - self.begin

    def lives(self, seconds: float) -> bool:
        """Wait until it has used so much processor time; whether it is still there then. Never reaps it."""
        until = time.monotonic() + PATIENCE
        while self.spent() < seconds and time.monotonic() < until:
            if os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.004)
        return True

    def wait(self) -> Ended:
        """Until it ends, by itself or at its moment."""
        hangs = self.lives(self.dies.seconds if self.dies.seconds is not None else float("inf"))
        if hangs:
            os.kill(self.number, signal.SIGKILL)
        _, status = os.waitpid(self.number, 0)
        with self.output, self.count:
            self.output.seek(0)
            self.count.seek(0)
            text, changes = self.output.read().decode(errors="replace"), int(self.count.read() or 0)
        if hangs and self.dies.seconds is None:
            text += f"\nhangs after {PATIENCE:.0f} s: This should not happen"
        return Ended(os.waitstatus_to_exitcode(status), text, changes)


def _count_changes(fatal: int | None) -> Iterator[int]:
    """Count this process's changes of files from now on; right before the `fatal`th it is killed."""
    made = itertools.count()
    names = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        changes = name in names or (name == "open" and isinstance(arguments[2], int) and arguments[2] & writes)
        if changes and next(made) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return made


def state(folder: Path) -> dict[str, Any]:
    """All that must be the same: every file that the run left, and what TensorBoard shows of it."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if ".hydra" in path.parts or path.is_dir() or path.name.endswith(UNCOMPARED):
            continue
        if path.name.startswith("events.out.tfevents."):
            name = str(path.parent.relative_to(folder) / "events")
        found[name] = "a leftover" if path.name.endswith(".tmp") else _content(path, folder)
    return found


def _content(path: Path, folder: Path) -> Any:
    try:
        if path.name.startswith("events.out.tfevents."):
            return _points(path.parent)
        if path.suffix not in (".json", ".jsonl"):
            return hashlib.sha256(_placeless(path.read_bytes(), folder)).hexdigest()
        text = _placeless(path.read_bytes(), folder).decode("utf-8")
        return [_timeless(json.loads(line)) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except Exception as error:  # a reader of damaged events raises whatever it meets
        return f"damaged: {error}"


def _placeless(raw: bytes, folder: Path) -> bytes:
    """Without the names of the folder, and of the one that it may be a copy of."""
    for place in (folder, folder.parent / WHOLE):
        raw = raw.replace(f"{place}/".encode(), b"")
    return raw


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else repr(value)


def _points(folder: Path) -> list[tuple[str, int, float]]:
    """The points of a run's curves, as TensorBoard's own reader has them."""
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in shown.Tags()["scalars"] if tag not in TIMES]
    return [(tag, point.step, point.value) for tag in sorted(tags) for point in shown.Scalars(tag)]


def _read_events() -> int:
    for folder in {path.parent for path in Path().rglob("events.out.tfevents.*")}:
        _points(folder)
    return 0


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


def warm_up(words: Sequence[str]) -> None:
    """Compose once before the forks: Hydra's parsers are slow until they have met these words."""
    single = [word for word in words if word == "train" or ("=" in word and "," not in word)]
    sys.argv = ["kdbench", *single, "--cfg", "all", "--resolve"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main()


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


def no_messages(text: str) -> list[str]:
    """Lines of an output that say nothing to a user."""
    return [line for line in text.splitlines() if any(word in line for word in NO_MESSAGE)]


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
