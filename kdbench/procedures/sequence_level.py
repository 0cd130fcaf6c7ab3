"""Sequence-level distillation: the student learns from texts that its teacher writes (Kim and Rush 2016)."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, Text, within
from kdbench.data.blocks import Offset, next_tokens
from kdbench.data.bundle import Bundle, Split
from kdbench.engine.device import place
from kdbench.errors import UserError, nearest, require
from kdbench.models.generate import generate
from kdbench.results.metrics import LANGUAGE_MODELLING
from kdbench.results.result import RunResult
from kdbench.runs.obtain import obtain
from kdbench.runs.recipe import Recipe
from kdbench.runs.series import opened

log = logging.getLogger(__name__)

AT_ONCE = 64  # prompts that are continued together


def sequence_level(
    recipe: Recipe, out: Path, texts: Literal["teacher", "data"] = "teacher",
    beam: Annotated[int, within(1, 64)] = 5, end: Text | None = None, judged: Count = 256,
) -> RunResult:  # fmt: skip
    """`teacher=` continues the first context + 1 tokens of every training block by beam search, and `student=` learns
    from these texts, one target a prompt: with loss=ce the sequence-level distillation of Kim and Rush 2016, section
    3.2, with loss=kl or ban_l also the word-level one on them.

    There are `predicted` tokens a text, or fewer where the teacher says `end` (a token as it is written), behind which
    nothing counts. texts: data, the blocks as they stand in the text, as the run to compare with. The figure
    `own_text/nll` is what the teacher thinks of the student's own greedy texts, from `judged` prompts of the test set.
    Raises UserError for data that is no running text, and for an `end` that is no token.
    """
    spec, data = recipe.need_teacher("a language model: it writes the texts"), recipe.data()
    allowed = f"another with dataset={data.name}: it is for running text, and that is for {data.task.name}"
    require(data.task is LANGUAGE_MODELLING, "procedure", "sequence_level", allowed)
    last = None if end is None else _number(end, data.classes)
    with opened(recipe, out) as opening:
        given = obtain(spec, recipe, data)
        network = given.trained()
        written = _continued(network, data, beam, last, recipe) if texts == "teacher" else _as_it_stands(data)
        assert data.blocks is not None
        augment = Offset(data.blocks, fixed=True)
        series = replace(opening, data=replace(data, augment=augment, transfer=written))
        stage = series.stage("student", given)
        series.run(stage, given)
        student = place(recipe.trainer).put(series.finished(stage.folder).trained())
        return series.conclude(stage.folder, {"own_text/nll": _liked(network, student, data, judged, last)})


def _number(end: str, words: tuple[str, ...]) -> int:
    if end not in words:
        raise UserError("procedure.end", end, "a token as the vocabulary has it", nearest(end, words))
    return words.index(end)


def _as_it_stands(data: Bundle) -> Split:
    """The training text in blocks that begin at one place in all epochs."""
    assert data.blocks is not None and isinstance(data.transfer.inputs, Tensor)
    return replace(data.transfer, inputs=data.transfer.inputs[:, : data.blocks.length].contiguous())


def _continued(network: nn.Module, data: Bundle, beam: int, end: int | None, recipe: Recipe) -> Split:
    """The training prompts with what the teacher says next."""
    assert data.blocks is not None and isinstance(data.transfer.inputs, Tensor)
    prompts = data.transfer.inputs[:, : data.blocks.context + 1]
    log.info("the teacher continues %d texts of %d tokens by %d", *prompts.shape, data.blocks.predicted)
    said = _said(network, prompts, data.blocks.predicted, beam, end)
    windows = torch.cat([prompts, said], 1)
    return replace(data.transfer, inputs=windows, labels=data.blocks.labels(windows))


def _said(network: nn.Module, prompts: Tensor, count: int, beam: int, end: int | None) -> Tensor:
    device = next(network.parameters()).device
    parts = [generate(network, part.to(device), count, beam, end).cpu() for part in prompts.split(AT_ONCE)]
    return torch.cat(parts)


@torch.no_grad()
def _liked(teacher: nn.Module, student: nn.Module, data: Bundle, judged: int, end: int | None) -> float:
    """The teacher's mean nll, in nats a token, of what the student says greedily."""
    assert data.blocks is not None and isinstance(data.test.inputs, Tensor)
    prompts = data.test.inputs[:judged, : data.blocks.context + 1]
    texts = torch.cat([prompts, _said(student.eval(), prompts, data.blocks.predicted, 1, end)], 1)
    device, total, count = next(teacher.parameters()).device, 0.0, 0
    for part in texts.split(AT_ONCE):
        inputs, label = next_tokens(part.to(device), data.blocks.predicted)
        total += float(F.cross_entropy(teacher(inputs).logits.float(), label, ignore_index=-1, reduction="sum"))
        count += int((label >= 0).sum())
    return total / max(count, 1)
