"""One launch a step on a GPU: the steps of all students of a cohort as one CUDA graph, forked into a branch for each.

The small networks of the field keep a GPU busy for a microsecond or two a kernel, less than launching it costs, and
leave most of it idle. A graph is recorded once and replayed; its branches run beside each other. It runs the kernels of
the eager step, so the numbers are the same. What it reads lies where it is for the whole training: the inputs, targets
and teacher's outputs of the next steps, which a counter on the device goes through. So a step needs no copy, no sync
and no Python for each student.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from kdbench.engine.ahead import Ahead, tensors_of
from kdbench.engine.learner import Learner
from kdbench.engine.recording import (
    Counting,
    Recording,
    changes,
    drawn_on_host,
    host_waits,
    recording,
    side_stream,
    unrecorded,
)
from kdbench.engine.twin import Twin
from kdbench.errors import UserError
from kdbench.tables.feed import pinned
from kdbench.teachers.live import LiveTeacher
from kdbench.types import ANSWER, Batch, Outputs, Teacher

log = logging.getLogger(__name__)

WARM_UP = 3  # eager steps before a recording: lazily made buffers (momentum, cuDNN handles) must exist by then
TRIED = 3  # replays that are compared with plain steps: the data of the third lie ahead, at the second place
AHEAD = 256 * 2**20  # bytes of inputs, targets and teacher's outputs that are made ready at once ...
MOST = 8192  # ... and samples


class CohortGraph:
    """The recorded step of all learners that can be recorded, and the data that it reads.

    The first `WARM_UP` steps run eagerly; the last of them tells whether a learner waits for the device, draws random
    numbers on the host, which every replay would repeat, or counts in Python, which none would. It goes on eagerly
    then, with a warning. Learners that draw on the device have a graph each, replayed after the others', because a
    graph has one random state. The first `TRIED` replays are compared with plain steps from the same state, and a
    learner that ends elsewhere goes on eagerly from where the plain step ends. A batch of another size than the first
    runs eagerly, and so does a text of which not every position counts. It belongs to one training: the graphs and
    their memory go when it goes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._learners: list[Learner] = []
        self._moved_by: list[Callable[..., object]] = []  # what sets each learner's rate: made anew by `restore`
        self._drawing: set[int] = set()  # learners that draw random numbers, by id
        self._groups: list[list[Learner]] = []  # those of one graph
        self._recordings: list[Recording] = []
        self._tried = 0  # replays of these groups so far, up to TRIED
        self._data: Ahead | None = None
        self._lr = torch.empty(0)  # [steps, learners]
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._size = 0  # samples a step
        self._warm = 0  # eager steps so far
        self._next: tuple[Batch, Outputs | None] | None = None  # what the next step is about
        self._ready = False  # whether it is the next one in the data

    def ahead(
        self, batches: Iterable[Batch], teacher: Teacher, learners: Sequence[Learner]
    ) -> Iterator[tuple[Batch, Outputs | None]]:
        """Batches with what the teacher says of them: those of many steps at once, where the teacher allows that."""
        moved_by = [learner.set_lr for learner in learners]
        if moved_by != self._moved_by:  # one has failed, has caught up with the others, or has other momentum buffers
            self._learners, self._warm, self._moved_by = list(learners), 0, moved_by
            self._forget()
            self._data = None  # what they need of the teacher may be something else
        stream = iter(batches)
        while data := _asked(islice(stream, self._steps()), teacher, self._needs()):
            self._size = self._size or len(data[0][0].input)
            whole = [one for one in data if self._fits(one[0])]
            if whole:
                self._load(whole, teacher)
            for self._next in data:
                self._ready = self._fits(self._next[0])
                yield self._next

    def _steps(self) -> int:
        """How many steps' data are asked for at once."""
        return self._data.steps if self._data and self._warm >= WARM_UP else 1

    def _fits(self, batch: Batch) -> bool:
        """Whether a recorded step can be of this batch."""
        return self._warm >= WARM_UP and len(batch.input) == self._size and batch.target.counted is None

    def step(self) -> bool:
        """Do the step of what `ahead` gave last, for all learners; False if they must do it by themselves."""
        assert self._next is not None
        if self._warm < WARM_UP and len(self._next[0].input) == self._size:
            self._warm += 1
            for learner in self._learners:
                self._eager(learner, watched=self._warm == WARM_UP)
            self._drawing = {id(learner) for learner in self._learners if learner.draws}
            return True
        if not self._ready:
            return False
        if any(learner.failure for group in self._groups for learner in group):
            self._forget()
        self._groups = self._groups or self._grouped()
        twins = self._twins() if self._tried < TRIED else []
        for number, group in enumerate(self._groups):
            self._replay(number, group)
        recorded = {id(learner) for group in self._groups for learner in group}
        for learner in self._learners:
            if id(learner) not in recorded:
                learner.step(*self._next)
        self._compare(twins)
        return True

    def _forget(self) -> None:
        """Record anew at the next step."""
        self._groups, self._recordings, self._tried = [], [], 0

    def _twins(self) -> list[Twin]:
        """The plain steps beside the next ones. A learner that can take none is not recorded, unless that is asked."""
        assert self._next is not None
        self._tried += 1
        twins = []
        for learner in [learner for group in self._groups for learner in group]:
            try:
                twins.append(Twin(learner, self._next))
            except Exception as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                if learner.trainer.cuda_graph != "on":
                    self._refuse(learner, f"cannot be compared with its recording ({reason})")
        if any(not learner.recorded for group in self._groups for learner in group):
            self._groups, self._recordings = self._grouped(), []
        return twins

    def _compare(self, twins: Sequence[Twin]) -> None:
        for twin in twins:
            far = twin.strays()
            if far is not None:
                self._refuse(twin.learner, f"ends elsewhere where it is recorded ({far:.2g} of the step away)")
                twin.learner.take(twin.plain)
                self._forget()

    def _refuse(self, learner: Learner, why: str) -> None:
        """Let a learner step eagerly from now on; one that was to be recorded fails. `why`: what its step does."""
        said = f"{type(learner.distiller.loss).__name__}'s step {why}"
        if learner.trainer.cuda_graph == "on":
            learner.fail(UserError("trainer.cuda_graph", "on", f"auto or off: {said}"))
        log.warning("%s: not recorded, it runs step by step", said)
        learner.recorded = False

    def _eager(self, learner: Learner, watched: bool) -> None:
        assert self._next is not None
        watched, before = watched and learner.recorded, learner.random_state
        with host_waits(self._device, watched) as seen, changes(learner.distiller, watched) as changed:
            learner.step(*self._next)
        why = [f"waits for the device ({one})" for one in seen]
        if watched and drawn_on_host(before, learner.random_state):
            why.append("draws random numbers on the host")
        why += [f"changes {name}, and a recording would not" for name in changed]
        if why and learner.failure is None:
            self._refuse(learner, why[0])

    def _needs(self) -> set[str]:
        return {key for learner in self._learners for key in learner.distiller.loss.needs}

    def _load(self, data: Sequence[tuple[Batch, Outputs | None]], teacher: Teacher) -> None:
        if self._data is None:
            size = sum(t.numel() * t.element_size() for t in tensors_of(data[0]))
            most = max(1, min(AHEAD // max(size, 1), MOST // self._size))
            self._data = Ahead(data[0], 1 if learns(teacher) else most)
        rates = [[one.lr * one.factors[one.steps_done + s] for one in self._learners] for s in range(len(data))]
        if self._lr.shape != (self._data.steps, len(self._learners)):
            self._lr = torch.zeros(self._data.steps, len(self._learners), device=self._device)
        self._lr[: len(data)].copy_(pinned(torch.tensor(rates), self._device), non_blocking=True)
        self._data.put(data)
        self._step.zero_()

    def _grouped(self) -> list[list[Learner]]:
        """Learners by graph: together those that draw no random numbers, and each of the others."""
        fit = [one for one in self._learners if one.recorded and not one.failure]
        together = [one for one in fit if id(one) not in self._drawing]
        return [group for group in [together, *([one] for one in fit if id(one) in self._drawing)] if group]

    def _replay(self, number: int, group: Sequence[Learner]) -> None:
        drawing = id(group[0]) in self._drawing
        if drawing:
            group[0].enter()
        if number == len(self._recordings):
            streams = [side_stream(self._device) for _ in group]
            try:
                self._recordings.append(recording(lambda: self._work(number, group, streams), self._device))
            except (RuntimeError, UserWarning) as error:  # the warning: nothing was recorded
                raise unrecorded(error, len(group)) from error
        self._recordings[number].replay()
        if drawing:
            group[0].leave()
        for learner in group:
            learner.steps_done += 1

    def _work(self, number: int, group: Sequence[Learner], streams: Sequence[torch.cuda.Stream | None]) -> None:
        """What is recorded: each learner's update in a stream of its own, all after the data is read."""
        assert self._data is not None
        batch, answer = self._data.at(self._step)
        rates = self._lr.index_select(0, self._step)[0]
        # Of more branches than torch has streams some are in this one: what follows is after the data, not after them.
        ready = torch.cuda.current_stream(self._device).record_event() if streams[0] else None
        for learner, stream in zip(group, streams, strict=True):
            if stream is not None and ready is not None:
                stream.wait_event(ready)
            counting = Counting(learner.counters) if learner.counters else contextlib.nullcontext()
            with torch.cuda.stream(stream), counting:  # type: ignore[arg-type]
                learner.set_lr(rates[self._learners.index(learner)])
                learner.update(batch, answer)
        for stream in filter(None, streams):
            torch.cuda.current_stream(self._device).wait_stream(stream)
        if number == len(self._groups) - 1:
            self._step += 1


def learns(teacher: Teacher) -> bool:
    """Whether its answers follow from the steps so far, so that it cannot be asked ahead of them."""
    return type(teacher).attach is not Teacher.attach


def _asked(batches: Iterable[Batch], teacher: Teacher, needs: set[str]) -> list[tuple[Batch, Outputs | None]]:
    """Each batch with what the teacher says of it: its logits, its answers and, of the features, those needed.

    A network is asked once for all of them; any other teacher as they come, for a table may hold what is near alone.
    """
    if isinstance(teacher, LiveTeacher):
        group = list(batches)
        return list(zip(group, _at_once(group, teacher, needs), strict=True))
    found = [(batch, teacher(batch)) for batch in batches]
    said = _answered([_needed(outputs, needs) for _, outputs in found if outputs is not None])
    return list(zip([batch for batch, _ in found], said, strict=True)) if said else found


def _at_once(group: Sequence[Batch], teacher: LiveTeacher, needs: set[str]) -> list[Outputs]:
    if not group:
        return []
    inputs = [teacher.inputs(batch) for batch in group]
    outputs, sizes = _needed(teacher.outputs(torch.cat(inputs), needs), needs), [*map(len, inputs)]
    features = {key: _split(value, sizes) for key, value in outputs.features.items()}
    parts = enumerate(_split(outputs.logits, sizes))
    return _answered([Outputs(own, {key: values[i] for key, values in features.items()}) for i, own in parts])


def _needed(outputs: Outputs, needs: set[str]) -> Outputs:
    return Outputs(outputs.logits, {key: value for key, value in outputs.features.items() if key in needs})


def _answered(said: Sequence[Outputs]) -> list[Outputs]:
    """With the largest of the logits, which every student's meters want."""
    if not said:
        return []
    sizes = [len(outputs.logits) for outputs in said]
    answers = torch.cat([outputs.logits for outputs in said]).argmax(1).split(sizes)
    return [Outputs(own.logits, {**own.features, ANSWER: part}) for own, part in zip(said, answers, strict=True)]


def _split(answers: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Answers to many inputs by batch; of texts each input has one for every position."""
    each = len(answers) // sum(sizes)
    return answers.split([each * size for size in sizes])
