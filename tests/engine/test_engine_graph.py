"""A recorded step is the eager step, whatever changes between steps; what cannot be recorded is said."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from kdbench.engine import device as placement
from kdbench.engine.ahead import Ahead
from kdbench.engine.device import wants_graph
from kdbench.engine.distiller import Distiller
from kdbench.engine.graph import WARM_UP
from kdbench.engine.learner import Learner
from kdbench.engine.loop import cohort_graph, train_epoch
from kdbench.engine.metrics import Meters
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.engine.recording import changes
from kdbench.errors import UserError
from kdbench.models.resnet import ResNet
from kdbench.teachers.live import LiveTeacher
from kdbench.types import Batch, LossTerms, Outputs, Target, Teacher
from tests.support import losses as losses_parts
from tests.support.engine import LogitDistance, Stream, make_learner
from tests.support.recorded import OFF, ON, OPTIONS, assert_same, make_teacher, train, uneven
from tests.support.tape import Tape, Waits


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("extra", [{}, {"ema": 0.9, "clip": 0.5}], ids=["plain", "ema+clip"])
def test_replayed_steps_are_the_eager_steps_to_the_last_bit(tapes, name, extra):
    """With dropout, a learning rate that falls at every step, a smaller last batch, and meters read at the end."""
    options = {"name": name, "stream": Stream(64), "lr": 0.01}
    eager, taped = (make_learner(**options, trainer=replace(ON, **extra)) for _ in range(2))
    train([eager], record=False)
    train([taped])
    assert len(tapes) == 1
    assert_same(eager, taped)


def test_a_cohort_is_one_recording_and_has_the_numbers_of_solo_runs(tapes):
    """Students that draw random numbers are recorded apart; one that cannot be recorded steps beside the others."""
    settings = [{"seed": 0}, {"seed": 1, "distill": 0.3}, {"seed": 2, "lr": 0.01}, {"seed": 3, "name": "lamb"}]
    teacher = make_teacher()

    def made(**kwargs) -> Learner:
        own = make_learner(stream=Stream(64), trainer=OFF if kwargs.get("name") else ON, **kwargs)
        if kwargs["seed"] < 2:
            own.distiller.student.body[3].p = 0.0
        return own

    together = [made(**kwargs) for kwargs in settings]
    train(together, teacher=teacher)
    assert len(tapes) == 2  # of students 0 and 1, and of student 2 with its dropout
    for one, kwargs in zip(together, settings, strict=True):
        alone = made(**kwargs)
        train([alone], teacher=teacher)
        assert_same(one, alone)


def test_a_member_that_fails_is_left_out_of_the_next_recording(tapes):
    good, bad = make_learner(stream=Stream(64), trainer=ON), make_learner(stream=Stream(64), trainer=ON, seed=1)
    for one in (good, bad):
        one.distiller.student.body[3].p = 0.0
    steps = cohort_graph([good, bad], torch.device("cpu"))
    for epoch in range(3):
        active = [one for one in (good, bad) if one.failure is None]
        for one in active:
            one.begin_epoch(epoch)
        train_epoch(active, Stream(64).epoch(epoch, 3), make_teacher(), lambda: None, steps)
        if epoch == 0:
            bad.fail(RuntimeError("diverged"))
    alone = make_learner(stream=Stream(64), trainer=ON)
    alone.distiller.student.body[3].p = 0.0
    for epoch in range(3):
        alone.begin_epoch(epoch)
        train_epoch([alone], Stream(64).epoch(epoch, 3), make_teacher(), lambda: None)
    assert len(tapes) == 2 and bad.steps_done == 8
    assert_same(good, alone)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_checkpoint_of_eager_steps_goes_on_recorded_with_the_learning_rate_of_each_step(tapes, name):
    """The checkpoint's plain number must not take the place of the tensor that a recording reads anew each time."""
    options = {"name": name, "stream": Stream(64), "lr": 0.01}
    whole, cut, resumed = (make_learner(**options, trainer=mode) for mode in (OFF, OFF, ON))
    train([whole])
    train([cut], epochs=1)
    resumed.restore(copy.deepcopy(cut.state()))
    train([resumed], first=1)
    groups = resumed.optimizer.param_groups
    assert len(tapes) == 1 and all(isinstance(group["lr"], torch.Tensor) for group in groups)
    assert float(groups[0]["lr"]) == pytest.approx(whole.optimizer.param_groups[0]["lr"])
    others = dict(resumed.distiller.named_parameters())
    for key, value in whole.distiller.named_parameters():
        if key != "student.body.0.bias":  # batch norm takes it out again: its gradient is rounding, and Adam scales it
            torch.testing.assert_close(value, others[key], rtol=1e-3, atol=1e-4, msg=key)
    # And the other way round.
    back = make_learner(**options, trainer=OFF)
    back.restore(copy.deepcopy(resumed.state()))
    assert all(isinstance(group["lr"], float) and not group.get("capturable") for group in back.optimizer.param_groups)


def test_a_restored_learner_is_recorded_anew(tapes):
    """A checkpoint brings momentum buffers of its own, and a recording goes on writing into the old ones."""
    kept, eager = make_learner(stream=Stream(64), trainer=ON), make_learner(stream=Stream(64), trainer=OFF)
    steps = cohort_graph([kept], torch.device("cpu"))
    for learner, graph_of in ((kept, steps), (eager, None)):
        for epoch in (0, 1):
            if epoch:
                learner.restore(copy.deepcopy(learner.state()))
            learner.begin_epoch(epoch)
            train_epoch([learner], Stream(64).epoch(epoch, 2), make_teacher(), lambda: None, graph_of)
    assert len(tapes) == 2
    assert_same(eager, kept)


def test_the_teacher_is_asked_once_for_many_steps_unless_it_learns(tapes):
    class Learning(Teacher):
        calls: list[int]

        def __init__(self) -> None:
            self.network, self.calls = make_teacher(), []

        def __call__(self, batch: Batch) -> Outputs:
            self.calls.append(len(batch.input))
            return self.network(batch)

        def attach(self, student) -> None:
            return

    ahead = make_teacher()
    sizes, outputs = [], ahead.outputs
    ahead.outputs = lambda image, needs: (sizes.append(len(image)), outputs(image, needs))[1]
    one, other = (make_learner(stream=Stream(64), trainer=ON) for _ in range(2))
    train([one], teacher=ahead)
    assert sizes[:WARM_UP] == [8] * WARM_UP and max(sizes) > 8
    learning = Learning()
    train([other], teacher=learning)
    assert max(learning.calls) == 8 and len(learning.calls) == 24
    assert_same(one, other)


def test_data_that_lie_ahead_keep_their_numbers_and_their_memory_layout():
    def step(number: int) -> tuple[Batch, Outputs]:
        torch.manual_seed(number)
        images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        target = Target(torch.randint(9, (2,)), torch.arange(2), torch.tensor(number / 7))
        return Batch(images, torch.zeros(2, dtype=torch.int64), target), Outputs(torch.randn(4, 2).T, {})

    data = [step(number) for number in range(5)]
    ahead = Ahead(data[0], 6)
    ahead.put(data)
    for number, (batch, answer) in enumerate(data):
        got, said = ahead.at(torch.tensor([number]))
        assert got.input.stride() == batch.input.stride() and torch.equal(got.input, batch.input)
        assert torch.equal(got.target.progress, batch.target.progress) and got.target.progress.ndim == 0
        assert torch.equal(said.logits, answer.logits) and torch.equal(got.target.label, batch.target.label)
        leaves = [t for t in tree_leaves((got, said)) if t is not None]
        assert all(t.data_ptr() % 256 == leaves[0].data_ptr() % 256 for t in leaves)  # whole lines of memory apart
    silent = Ahead((data[0][0], None), 1)
    silent.put([(data[1][0], None)])
    assert silent.at(torch.tensor([0]))[1] is None


def test_a_table_that_holds_what_is_near_is_asked_while_it_is_near(tapes):
    """Batches are drawn many steps ahead, and with each of them what the table held of those before may go."""
    network, near = make_teacher(), []

    class Near(Teacher):
        def __call__(self, batch: Batch) -> Outputs:
            assert batch is near[-1]
            return network(batch)

    def epochs(epoch: int) -> Iterator[Batch]:
        for batch in uneven(64, epoch, 2):
            near.append(batch)
            yield batch

    one, alone = (make_learner(stream=Stream(64), trainer=ON) for _ in range(2))
    steps = cohort_graph([one], torch.device("cpu"))
    for epoch in range(2):
        for learner in (one, alone):
            learner.begin_epoch(epoch)
        train_epoch([one], epochs(epoch), Near(), lambda: None, steps)
        train_epoch([alone], uneven(64, epoch, 2), network, lambda: None)
    assert len(tapes) == 1 and len(near) == 16
    assert_same(one, alone)


def test_a_teacher_that_reads_other_inputs_than_its_students_does_so_ahead(tapes):
    network = make_teacher()
    own = LiveTeacher(network.network, 8, contextlib.nullcontext, torch.randn(8, 1, 6, 6))
    one, alone = (make_learner(stream=Stream(64), trainer=ON) for _ in range(2))
    train([one], teacher=own)
    train([alone], teacher=own, record=False)
    assert len(tapes) == 1
    assert_same(one, alone)


class OnFeatures(LogitDistance):
    needs = ("pooled",)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        distance = (student.features["pooled"] - teacher.features["pooled"]).square().mean()
        return self.combine(task=self.task(student.logits, target.label), distill=distance)


def test_what_is_needed_of_the_teacher_may_change_when_a_member_leaves(tapes):
    """What lies ahead has the features that the students' losses name: another set of them is other memory."""
    good, bad, alone = (make_learner(stream=Stream(64), trainer=ON) for _ in range(3))
    bad.distiller.loss = OnFeatures()
    for one in (good, bad, alone):
        one.distiller.student.body[3].p = 0.0
    steps = cohort_graph([good, bad], torch.device("cpu"))
    for epoch in range(3):
        active = [one for one in (good, bad) if one.failure is None]
        for one in (*active, alone):
            one.begin_epoch(epoch)
        train_epoch(active, Stream(64).epoch(epoch, 3), make_teacher(), lambda: None, steps)
        train_epoch([alone], Stream(64).epoch(epoch, 3), make_teacher(), lambda: None)
        if epoch == 0:
            assert bad.failure is None
            bad.fail(RuntimeError("diverged"))
    assert len(tapes) == 2
    assert_same(good, alone)


def test_a_text_of_which_not_every_position_counts_runs_eagerly(tapes):
    """How many do changes from batch to batch, and a recording has one shape."""

    def padded(epoch: int) -> Iterator[Batch]:
        for number, batch in enumerate(Stream(64).epoch(epoch, 2)):
            counted = torch.arange(8 - number % 3)
            label, row = batch.target.label[counted], batch.target.row[counted]
            yield batch._replace(target=Target(label, row, batch.target.progress, counted))

    one, alone = (make_learner(stream=Stream(64), trainer=ON) for _ in range(2))
    steps = cohort_graph([one], torch.device("cpu"))
    for epoch in range(2):
        for learner, recorded in ((one, steps), (alone, None)):
            learner.begin_epoch(epoch)
            train_epoch([learner], padded(epoch), make_teacher(), lambda: None, recorded)
    assert tapes == [] and one.failure is None
    assert_same(one, alone)


def test_a_recorded_step_counts_at_once_and_its_meters_are_three_kernels(tapes, monkeypatch):
    """Every batch norm's counter and the meters' own are one kernel; the other three: the student's answers, the row of
    all that is kept, its copy. Nothing of a step runs in Python once it is recorded."""
    one, calls = make_learner(stream=Stream(64), trainer=replace(ON, ema=0.9)), []
    update = Learner.update
    monkeypatch.setattr(
        Learner, "update", lambda self, *data: (self is one and calls.append(None), update(self, *data))[1]
    )
    train([one])
    assert len(calls) == WARM_UP + 1 + 3  # warm-up, recording, and an epoch's smaller last batch
    counters = [*one.counters]
    assert len(counters) == 2 and int(counters[1]) == 3 * 8 == int(one.average.network.body[1].num_batches_tracked)
    names = [call[0] for call in tapes[0].calls]
    ops = torch.ops.aten
    assert [args[0] for name, args, *_ in tapes[0].calls if name is ops._foreach_add_.ScalarList] == [
        [counters[1]], [counters[0]],  # the moving average reads the batch norm's counter in between
    ]  # fmt: skip
    first = max(number for number, name in enumerate(names) if name is ops.argmax.default)
    kept = [name for name in names[first:] if name is not ops._foreach_add_.ScalarList][:-1]  # last: the graph's step
    assert kept == [ops.argmax.default, ops.cat.default, ops.index_copy_.default]


def test_a_recorded_step_of_resnet20_is_188_operations(tapes):
    """What docs/benchmarks.md expects of a GPU follows from their number: each is a kernel, or two to four. 228 before
    batch norms and meters counted together."""
    placed, logits = placement.place(ON), torch.randn(8, 3)

    class Fixed(Teacher):
        def __call__(self, batch: Batch) -> Outputs:
            return Outputs(logits, {})

    network = placed.put(ResNet(num_classes=3, in_channels=1, depth=20, widths=[16, 16, 32, 64], shortcut="B"))
    distiller = Distiller(network, losses_parts.build("kl"), placed)
    options = OptimizerOptions("sgd", 0.1, momentum=0.9, weight_decay=5e-4)
    one = Learner(distiller, options, ON, [1.0] * 8, Meters(placed.device, 8), 0)
    one.begin_epoch(0)
    steps = cohort_graph([one], placed.device)
    train_epoch([one], itertools.islice(Stream(64).epoch(0, 1), WARM_UP + 1), Fixed(), lambda: None, steps)
    assert one.failure is None
    made = Counter(str(call[0]) for call in tapes[0].calls)
    cloned = made["aten.new_empty_strided.default"]  # gradients: the tape holds them, so that no parameter can
    count = sum(made.values()) - 2 * cloned - made["aten.empty.memory_format"]
    count -= sum(n for name, n in made.items() if "record_function" in name)
    assert abs(count - 188) <= 4  # versions of torch differ by one or two


def test_all_that_lies_ahead_is_read_by_one_kernel():
    data = next(iter(Stream(64).epoch(0, 1))), Outputs(torch.randn(8, 3), {"pooled": torch.randn(8, 4)})
    ahead, step = Ahead(data, 4), torch.tensor([0])
    ahead.put([data])
    assert len(Tape(lambda: ahead.at(step)).calls) == 1


def test_where_a_step_is_recorded(monkeypatch):
    cuda, cpu, sgd = torch.device("cuda"), torch.device("cpu"), OptimizerOptions("sgd", 0.1)
    monkeypatch.setattr(placement, "proven", lambda device: False)  # recorded steps have strayed on this GPU
    assert not wants_graph(OPTIONS, cuda, sgd) and wants_graph(ON, cuda, sgd)
    monkeypatch.setattr(placement, "proven", lambda device: True)
    assert wants_graph(OPTIONS, cuda, sgd) and not wants_graph(OPTIONS, cpu, sgd)
    assert not wants_graph(OPTIONS, cuda, OptimizerOptions("lamb", 0.1))
    assert not wants_graph(OFF, cuda, sgd)
    with pytest.raises(UserError, match=r"trainer\.cuda_graph.*cpu"):
        wants_graph(ON, cpu, sgd)
    with pytest.raises(UserError, match=r"trainer\.cuda_graph.*adamw"):
        wants_graph(ON, cuda, OptimizerOptions("lamb", 0.1))
    recomputed = replace(OPTIONS, grad_checkpointing=True)  # reads the random state, which a capture refuses
    assert not wants_graph(recomputed, cuda, sgd)
    with pytest.raises(UserError, match=r"trainer\.cuda_graph = on.*grad_checkpointing"):
        wants_graph(replace(recomputed, cuda_graph="on"), cuda, sgd)
    with pytest.raises(UserError, match=r"cuda_graph = yes: must be one of auto, on, off"):
        TrainerOptions(cuda_graph="yes")
    assert cohort_graph([make_learner()], cpu) is None


@pytest.mark.parametrize("name", [name for name in losses_parts.NAMES if name not in losses_parts.WAITING])
def test_every_loss_can_be_recorded(name):
    """No loss reads a number from the device or counts its calls in Python: both would be wrong in a replay."""
    check_recorded(name)


@pytest.mark.parametrize("name", sorted(losses_parts.WAITING))
def test_what_waits_for_the_device_cannot_be_recorded(name):
    with pytest.raises(Waits):
        check_recorded(name)


def check_recorded(name: str) -> None:
    eager = losses_parts.ready(name)
    loss = copy.deepcopy(eager)

    def gradient(student, teacher, target, of):
        student = losses_parts.cast(student, torch.float32, grad=True)
        total = of(student, teacher, target).total
        total.backward()
        return total.detach(), student.logits.grad

    def given(step: int):
        student, teacher, target = losses_parts.batch(step, name)
        return student, teacher, target._replace(progress=torch.tensor(step / 5))

    static = tree_map_only(torch.Tensor, torch.Tensor.clone, given(WARM_UP))
    for step in range(WARM_UP + 3):
        torch.manual_seed(step)
        expected = gradient(*given(step), of=eager)
        torch.manual_seed(step)
        if step < WARM_UP:
            with changes(loss, watched=step == WARM_UP - 1) as changed:
                got = gradient(*given(step), of=loss)
            assert not changed
        else:
            for old, new in zip(tree_leaves(static), tree_leaves(given(step)), strict=True):
                if old is not None:  # what a target leaves out
                    old.copy_(new)
            recorded = recorded if step > WARM_UP else Tape(lambda: gradient(*static, of=loss))  # noqa: F821
            recorded.replay()
            got = recorded.output
        for one, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(one, wanted)
