"""How a step is recorded: pools, streams and branches, what ends a recording, and what goes with it."""

from __future__ import annotations

import contextlib
import gc
import warnings
from dataclasses import replace

import pytest
import torch

from kdbench.engine import device as placement
from kdbench.engine import graph
from kdbench.engine.graph import WARM_UP
from kdbench.engine.learner import Learner
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.engine.recording import CudaRecording, host_waits, uncollected
from kdbench.errors import UserError
from kdbench.teachers.constant import NoTeacher
from tests.support.engine import Stream, make_learner
from tests.support.recorded import OFF, ON, OPTIONS, assert_same, train


class Calls:
    """What stands in for torch.cuda on a machine without: what was asked of it, in order."""

    def __init__(self, monkeypatch) -> None:
        self.made: list[str] = []
        self.current = "here"
        for name in ("Stream", "CUDAGraph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, self._make(name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.made.append("clear"), raising=False)

    def _make(self, name: str):
        def make(*given):
            self.made.append(name)
            return f"{name} {self.made.count(name)}"

        return make

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.made.append(f"capture {graph}, {pool}, {stream}, {capture_error_mode}")
        before, self.current = self.current, stream
        try:
            yield
        except RuntimeError as error:  # as in torch, whose end of a broken capture raises an error of its own
            raise RuntimeError("capturing stream has unjoined work") from error
        self.current = before  # not reached where the capture breaks, as in torch


def test_every_recording_has_a_pool_and_a_stream_of_its_own_and_no_workspace_outlives_it(monkeypatch):
    cuda = Calls(monkeypatch)
    for number in (1, 2):
        CudaRecording(lambda: cuda.made.append(f"work in {cuda.current}"), torch.device("cuda:1"))
        *_, before, capture, work, after = cuda.made
        assert (before, after) == ("clear", "clear") and work == f"work in Stream {number}"
        assert capture == f"capture CUDAGraph {number}, graph_pool_handle {number}, Stream {number}, thread_local"

    def broken() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CudaRecording(broken, torch.device("cuda:1"))
    assert cuda.current == "here" and cuda.made[-1] == "clear"


def test_nothing_is_collected_while_a_step_is_recorded(monkeypatch):
    """Another training's graph that is freed in the middle of a capture breaks it (torch before 2.12)."""
    Calls(monkeypatch)
    collecting: list[bool] = []
    CudaRecording(lambda: collecting.append(gc.isenabled()), torch.device("cuda"))
    assert collecting == [False] and gc.isenabled()
    with pytest.raises(RuntimeError), uncollected():
        raise RuntimeError
    assert gc.isenabled()


class FakeStream:
    """A stream that notes what waits for what."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def wait_stream(self, other: FakeStream) -> None:
        self.seen.append(f"{self.name} after {other.name}")

    def record_event(self) -> str:
        return f"{self.name} with {sum(text.startswith('step') for text in self.seen)} steps"

    def wait_event(self, event: str) -> None:
        self.seen.append(f"{self.name} after {event}")


def test_every_branch_has_a_stream_of_its_own_after_the_data_and_all_are_joined(tapes, monkeypatch):
    """Kernels of one stream wait for each other, and share a workspace of cuBLAS."""
    seen: list[str] = []
    main = FakeStream("main", seen)
    streams = [FakeStream(f"branch {number}", seen) for number in (1, 2)] + [main]  # torch has 32 of them in turn
    made = iter(streams)
    current = [main]

    @contextlib.contextmanager
    def inside(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(graph, "side_stream", lambda device: next(made))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", inside)
    cohort = [make_learner(stream=Stream(64), trainer=ON, seed=seed) for seed in range(3)]
    update = Learner.update

    def watched(self, *data) -> None:
        if self in cohort:  # and not a copy of one
            seen.append(f"step in {current[-1].name}")
        update(self, *data)

    monkeypatch.setattr(Learner, "update", watched)
    for learner in cohort:
        learner.distiller.student.body[3].p = 0.0
    train(cohort, epochs=1)
    before = WARM_UP * len(cohort)
    at = seen.index(f"branch 1 after main with {before} steps")
    assert seen[at : at + 9] == [
        f"branch 1 after main with {before} steps", "step in branch 1",
        f"branch 2 after main with {before} steps", "step in branch 2",
        f"main after main with {before} steps", "step in main",
        "main after branch 1", "main after branch 2", "main after main",
    ]  # fmt: skip


def test_a_recording_of_nothing_ends_the_run(tapes, monkeypatch):
    """What another device's stream would record: every later step would do nothing, and say nothing."""

    def empty(function, device):
        raise UserWarning("The CUDA Graph is empty. This usually means ...")

    monkeypatch.setattr(graph, "recording", empty)
    with pytest.raises(UserError, match=r"trainer\.cuda_graph.*is empty.*trainer\.cuda_graph=off"):
        train([make_learner(stream=Stream(64), trainer=ON)])


def test_what_makes_the_host_wait_is_seen_and_the_mode_is_as_before(monkeypatch):
    """torch warns of each wait, and of the mode itself; what else it says is no wait."""
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    cuda = torch.device("cuda")
    with pytest.raises(RuntimeError, match="broken"), host_waits(cuda, True):
        assert modes == [0, "warn"]
        raise RuntimeError("broken")
    assert modes == [0, "warn", 0]
    with host_waits(cuda, True) as seen:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)\nmore", stacklevel=1)
    assert seen == ["called a synchronizing CUDA operation (Triggered internally)"]
    for device, watched in ((cuda, False), (torch.device("cpu"), True)):
        with host_waits(device, watched) as seen:
            pass
        assert seen == [] and len(modes) == 5


def test_a_student_that_waits_for_the_device_is_not_recorded(tapes, monkeypatch, caplog):
    @contextlib.contextmanager
    def waits(device, watched):
        yield ["called a synchronizing CUDA operation"] if watched else []

    monkeypatch.setattr(graph, "host_waits", waits)
    auto = replace(OPTIONS, cuda_graph="auto")
    monkeypatch.setattr(placement, "proven", lambda device: True)
    one, alone = make_learner(stream=Stream(64), trainer=auto), make_learner(stream=Stream(64), trainer=OFF)
    train([one])
    train([alone])
    assert tapes == [] and caplog.text.count("it runs step by step") == 1
    assert_same(one, alone)
    strict = make_learner(stream=Stream(64), trainer=ON)
    strict.begin_epoch(0)
    train_epoch(
        [strict], Stream(64).epoch(0, 1), NoTeacher(), lambda: None, cohort_graph([strict], torch.device("cpu"))
    )
    assert isinstance(strict.failure, UserError) and "trainer.cuda_graph = on" in str(strict.failure)


def test_a_student_that_draws_on_the_host_is_not_recorded(tapes, monkeypatch, caplog):
    """Random numbers of the CPU (a layer dropped by torch.rand(()) < p) would be the same in every replay."""
    leave = Learner.leave

    def on_a_gpu(learner: Learner) -> None:
        leave(learner)
        learner.random_state.append(torch.zeros(16, dtype=torch.uint8))  # of the device: nothing is drawn there

    monkeypatch.setattr(Learner, "leave", on_a_gpu)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(placement, "proven", lambda device: True)
    auto = replace(OPTIONS, cuda_graph="auto")
    drawing, other, strict = (make_learner(stream=Stream(64), trainer=mode) for mode in (auto, auto, ON))
    other.distiller.student.body[3].p = 0.0
    train([drawing, other])
    assert len(tapes) == 1 and caplog.text.count("draws random numbers on the host: not recorded") == 1
    strict.begin_epoch(0)
    train_epoch(
        [strict], Stream(64).epoch(0, 1), NoTeacher(), lambda: None, cohort_graph([strict], torch.device("cpu"))
    )
    assert "draws random numbers on the host" in str(strict.failure)


def test_a_step_that_fails_while_it_is_watched_keeps_its_own_failure(tapes, monkeypatch):
    """Memory that runs short makes the host wait, too: what the run then does depends on the error."""

    @contextlib.contextmanager
    def waits(device, watched):
        yield ["called a synchronizing CUDA operation"] if watched else []

    monkeypatch.setattr(graph, "host_waits", waits)
    short = torch.OutOfMemoryError("no memory left")
    one = make_learner(stream=Stream(64), trainer=ON)
    update, calls = one.update, []

    def failing(*data) -> None:
        calls.append(None)
        if len(calls) == WARM_UP:
            raise short
        update(*data)

    one.update = failing
    one.begin_epoch(0)
    train_epoch([one], Stream(64).epoch(0, 1), NoTeacher(), lambda: None, cohort_graph([one], torch.device("cpu")))
    assert one.failure is short


def test_a_recording_that_fails_ends_the_run_with_what_to_type(tapes, monkeypatch):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph, "recording", refuse)
    one = make_learner(stream=Stream(64), trainer=ON)
    with pytest.raises(UserError, match=r"trainer\.cuda_graph.*not permitted.*\. trainer\.cuda_graph=off"):
        train([one])

    def short(function, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nmore")

    monkeypatch.setattr(graph, "recording", short)
    cohort = [make_learner(stream=Stream(64), trainer=ON, seed=seed) for seed in range(2)]
    for one in cohort:
        one.distiller.student.body[3].p = 0.0
    with pytest.raises(UserError, match=r"out of memory.*max_members=<fewer> or trainer\.cuda_graph=off"):
        train(cohort)


def test_a_graph_and_its_memory_go_with_the_training(tapes):
    """Nothing is kept for the process: no pool, no recording, no learner."""
    import weakref

    learner = make_learner(stream=Stream(64), trainer=ON)
    steps = cohort_graph([learner], torch.device("cpu"))
    learner.begin_epoch(0)
    train_epoch([learner], Stream(64).epoch(0, 1), NoTeacher(), lambda: None, steps)
    gone = [weakref.ref(steps), weakref.ref(learner), weakref.ref(tapes.pop())]
    gc.collect()
    gc.disable()
    try:
        del steps, learner
        assert gone[0]() is None and gone[1]() is None and gone[2]() is None
    finally:
        gc.enable()
