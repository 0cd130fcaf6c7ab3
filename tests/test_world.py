"""World: several processes of one training agree on files, refuse together, fail together, and go on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from kdbench import cli, world
from kdbench.errors import Busy, UserError
from tests.support import together
from tests.support.killing import PATHS
from tests.support.procedures import MLPS, TINY, composed, result, train
from tests.support.shell import kdbench, tiny


def in_two(*lines: tuple[str, ...]) -> list[str]:
    """What two processes print that run some command lines one after the other; they may fail."""
    return ended(together.start(lambda: max([kdbench(*words) for words in lines])))


def ended(begun: list[BaseProcess]) -> list[str]:
    """What processes print that may have failed, but must have ended."""
    found = together.finish(begun)
    assert None not in [code for code, _ in found], found  # a deadlock
    return [text for _, text in found]


def attempt(*lines: tuple[str, ...], out: str = "run") -> int:
    """`kdbench train` without the command line: the exit code of the last of some runs, after its message."""
    world.join()
    code = 0
    for words in lines:
        try:
            train(*words, out=out)
        except Exception as error:
            code = cli._report(error)
    return code


def test_one_process_is_the_whole_world():
    assert (world.size(), world.first(), world.own(5)) == (1, True, (0, 5))
    assert world.agreed(lambda: 3) == 3
    with world.after_first():
        pass


def test_one_of_several_ends_at_once_when_what_waits_for_its_end_is_done(monkeypatch):
    with pytest.raises(SystemExit, match="3"):
        world.end(3)
    done: list[object] = []
    monkeypatch.setattr(world._world, "size", 2)
    monkeypatch.setattr(world.atexit, "_run_exitfuncs", lambda: done.append("registered"))
    monkeypatch.setattr(world.os, "_exit", done.append)
    world.end(4)
    assert done == ["registered", 4]


def test_shares_are_even_and_leave_nothing_out(monkeypatch):
    monkeypatch.setattr(world._world, "size", 3)
    assert world.shares(8) == [(0, 2), (2, 5), (5, 8)]
    for rows in range(3, 30):
        shares = world.shares(rows)
        assert [place for first, last in shares for place in range(first, last)] == list(range(rows))
        assert max(last - first for first, last in shares) - min(last - first for first, last in shares) <= 1


def test_the_first_decides_and_what_it_raises_all_raise():
    def work() -> None:
        world.join()
        print(world.agreed(os.getpid), world.agreed(lambda: world.agreed(lambda: "inner")))
        errors = (UserError("a.b", 3, "more"), Busy("there"), FileNotFoundError(2, "gone", "x"), Odd("one", "two"))
        for error in errors:
            try:
                world.agreed(lambda: _raise(error))  # noqa: B023
            except Exception as found:
                print(type(found).__name__, found)
        try:
            with world.after_first():
                print("made" if world.first() else "found")
                if world.first():
                    raise UserError("nothing", said="here")
        except UserError as found:
            print(found)

    first, second = (text.splitlines() for text in together.run(work))
    assert first[0] == second[0]
    assert first[0].endswith("inner")
    assert first[1:5] == [
        "UserError a.b = 3: must be more",
        "Busy there: another process is training here. Wait for it, or choose another folder.",
        "FileNotFoundError [Errno 2] gone: 'x'",
        "RuntimeError Odd: one two",  # one that cannot be sent
    ]
    assert second[1:5] == first[1:5]
    assert (first[5:], second[5:]) == (["made", "nothing: here"], ["nothing: here"])


class Odd(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def _raise(error: Exception) -> None:
    raise error


def test_what_cannot_run_is_refused_once_by_name_and_before_any_work():
    composed(*TINY, *MLPS)  # once for all processes
    refused = {
        ("trainer.cuda_graph=on",): "trainer.cuda_graph = on: must be another with the 2 processes of torchrun",
        ("trainer.compile=on",): "trainer.compile = on: must be another with the 2 processes of torchrun",
        ("procedure=meta_pseudo_labels", "loss=ban"): "procedure = meta_pseudo_labels: must be another with the 2",
        ("schedule.batch_size=46",): "trainer.drop_last = false: must be true with 3 processes: an epoch's last batch",
        ("teacher.schedule.batch_size=2",): "schedule.batch_size = 2: must be at least 3, a row for each process",
    }
    lines = [(*MLPS, *words) for words in refused]
    said = "".join(ended(together.start(lambda: attempt(*lines[:3]))))
    said += "".join(ended(together.start(lambda: attempt(*lines[3:]), processes=3)))
    for expected in refused.values():
        assert said.count(expected) == 1
    said = "".join(in_two(("compare", "outputs"), ("train", "loss.tua=3")))
    assert said.count("command = compare: must be another with the 2 processes of torchrun") == 1
    assert said.count("loss.tua=3: loss=kl has no key 'tua'") == 1
    assert not Path("outputs/teachers").exists()
    assert not list(Path().rglob("checkpoint.pt"))


def test_a_loss_that_diverges_ends_all_with_one_message():
    words = ("teacher=none", "loss=ce", "student=mlp", "student.hidden=[24]", "schedule.lr=1e15")
    said = "".join(ended(together.start(lambda: attempt(words))))
    assert said.count("kdbench: the loss is not a finite number") == 1


def test_a_sweep_goes_through_its_points_together_and_ends_in_one_table():
    words = ("teacher=none", "loss=ce", "student=mlp", "seed=0,1", "schedule.epochs=1")
    first, second = in_two(("train", "-m", *tiny("teacher=none"), *words))
    assert len(list(Path("outputs/runs").rglob("result.json"))) == 2
    assert first.count("loss  CE(y, s)") == 2
    assert first.count("test top-1 (last) %") == 1
    assert second == ""


def test_a_process_that_is_killed_ends_all_with_a_message_and_the_run_goes_on():
    many = (*MLPS, "schedule.epochs=12", "trainer.checkpoint_every=1")
    composed(*TINY, *many)
    for rank in (1, 0):
        begun = together.start(lambda: attempt(many))
        wait_for_a_checkpoint(Path("run/checkpoint.pt"))
        os.kill(begun[rank].pid or 0, signal.SIGKILL)
        found = together.finish(begun)
        assert found[rank][0] == -signal.SIGKILL
        code, said = found[1 - rank]
        assert code == 1
        assert "another process of this training has ended" in said
        assert "The same command goes on from the last complete epoch" in said
        assert not Path("run/result.json").exists()
    together.run(lambda: attempt(many))
    together.run(lambda: attempt(many, out="undisturbed"))
    assert result(Path("run"))["student"]["weights"] == result(Path("undisturbed"))["student"]["weights"]


def wait_for_a_checkpoint(path: Path) -> None:
    """Until another one is written."""
    before, deadline = path.exists() and path.stat().st_mtime_ns, time.monotonic() + 60
    while (path.exists() and path.stat().st_mtime_ns) == before and time.monotonic() < deadline:
        time.sleep(0.002)


def test_torchrun_itself():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdbench"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, PATHS), *filter(None, sys.path)])}
    line = [*command, "train", *tiny(), "teacher=mlp", "student=mlp", "hydra.run.dir=run"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next  kdbench") == 1
    assert result(Path("run"))["last"]["epoch"] == 3
