"""Gradients added up over the parts of a batch are the whole batch's, where its rows do not meet."""

from __future__ import annotations

import pytest
import torch

from kdbench.engine.accumulate import parts
from kdbench.engine.options import TrainerOptions
from kdbench.types import Batch, Outputs, Target
from tests.support.engine import SmallNet, Stream, make_learner


def learner(accumulate: int):
    made = make_learner(trainer=TrainerOptions(device="cpu", accumulate=accumulate))
    made.distiller.double()
    student = made.distiller.student
    student.body[1].eval(), student.body[3].eval()  # batch norm sees its batch, dropout draws in another order
    return made


@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_gradients_terms_and_logits_are_those_of_the_whole_batch(count):
    batch = next(Stream().epoch(0, 1))
    batch = batch._replace(input=batch.input.double())
    teacher = Outputs(torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), {})
    found = []
    for number in (1, count):
        one = learner(number)
        output = one.accumulated(batch, teacher)
        found.append((output, [p.grad for p in one.parameters]))
    (plain, expected), (summed, gradients) = found
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(expected, gradients, strict=True))
    assert torch.allclose(plain.logits, summed.logits, atol=1e-12) and len(summed.logits) == 8
    assert plain.terms.parts.keys() == summed.terms.parts.keys()
    assert all(torch.allclose(plain.terms.parts[k], summed.terms.parts[k], atol=1e-12) for k in plain.terms.parts)
    assert torch.allclose(plain.terms.total, summed.terms.total, atol=1e-12)


def test_batch_norm_sees_its_part():
    torch.manual_seed(0)
    batch, seen = next(Stream().epoch(0, 1)), []
    one = make_learner(trainer=TrainerOptions(device="cpu", accumulate=2))
    assert isinstance(one.distiller.student, SmallNet)
    one.distiller.student.body[1].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    one.accumulated(batch, None)
    assert seen == [4, 4]


def test_no_image_stands_alone_in_a_part():
    """Batch norm over maps of one pixel cannot take it: the training ended in an error of torch's."""
    batch = next(Stream().epoch(0, 1))
    assert [len(part.input) for part, *_ in parts(batch, None, 8)] == [2, 2, 2, 2]


def test_positions_of_a_text_stay_with_their_row():
    rows, positions = 5, 4
    label = torch.arange(rows * positions)
    batch = Batch(torch.arange(rows)[:, None], torch.zeros(rows), Target(label, torch.arange(rows), torch.tensor(0.5)))
    teacher = Outputs(label[:, None].float(), {"pooled": torch.arange(rows)[:, None]})
    found = list(parts(batch, teacher, 2))
    assert [len(part.input) for part, _, _ in found] == [2, 3] and [share for *_, share in found] == [0.4, 0.6]
    for part, answer, _ in found:
        assert torch.equal(part.target.label // positions, part.target.row.repeat_interleave(positions))
        assert torch.equal(answer.logits[:, 0], part.target.label.float())
        assert torch.equal(answer.features["pooled"], part.input) and part.target.progress == 0.5


def test_positions_that_do_not_count_stay_out():
    """Of 4 rows of 3 tokens some positions count: every one is in the part of its row, under its new number."""
    counted = torch.tensor([1, 2, 4, 5, 8, 10, 11])
    tokens = torch.arange(12).view(4, 3)
    target = Target(10 * counted, counted, torch.tensor(0.5), counted)
    batch = Batch(tokens, torch.zeros(4), target)
    teacher = Outputs(counted[:, None].float(), {"pooled": torch.arange(4)[:, None]})
    found = list(parts(batch, teacher, 3))
    assert sum(share for *_, share in found) == 1 and [share for *_, share in found] == [2 / 7, 2 / 7, 3 / 7]
    for part, answer, _ in found:
        assert torch.equal(part.input.flatten()[part.target.counted], part.target.row)
        assert torch.equal(answer.logits[:, 0].long(), part.target.row)
        assert torch.equal(answer.features["pooled"][:, 0], part.input[:, 0] // 3)
