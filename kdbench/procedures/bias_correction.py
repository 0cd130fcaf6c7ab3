"""Classes that the student never saw: what a bias for them gives back (Hinton et al. 2015, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kdbench.data.bundle import Bundle, Split
from kdbench.engine.device import place
from kdbench.errors import UserError, require
from kdbench.models.base import last_layer
from kdbench.results.result import RunResult
from kdbench.runs.folder import network_of_run
from kdbench.runs.obtain import measured, obtain
from kdbench.runs.recipe import NetworkSpec, Recipe
from kdbench.runs.series import Series, opened
from kdbench.runs.taught import TaughtBy

By = Literal["prior", "accuracy"]


def bias_correction(recipe: Recipe, out: Path, by: By = "prior") -> RunResult:
    """Train `student=` on a transfer set that lacks classes (dataset.transfer.omit, only, classes), then add one number
    to the logits of all the classes it lacks: the result is the corrected student's, the figures hold both.

    The test set has no part in the choice, unlike in the paper. `by`: prior, so that the mean probability of the
    missing classes over the validation images is their share of the training images (needs no labels; without a
    validation set the training images serve); accuracy, the largest validation accuracy.
    For Hinton's set without 3s this raises the bias of the 3; for that of 7s and 8s only it raises the eight others,
    which is the same as lowering those of 7 and 8.
    Raises UserError if the transfer set has all classes.
    """
    recipe.refuse_untaught()
    recipe.need_classes("bias_correction")
    with opened(recipe, out) as series:
        data = series.data
        missing = missing_classes(data)
        if not missing:
            allowed = "another where the transfer set has every class; set dataset.transfer.omit or only"
            raise UserError("procedure", "bias_correction", allowed)
        judged = by == "prior" or data.val is not None
        require(judged, "dataset.validation", 0, "above 0 with procedure.by=accuracy")
        teacher = obtain(recipe.teacher, recipe, data) if recipe.teacher else None
        stage = series.stage("student", teacher)
        series.run(stage, teacher)
        spec, network, _ = network_of_run(stage.folder, recipe.catalogue)
        network = place(recipe.trainer).put(network)
        before = measured(spec.name, network, stage.folder, recipe, data)
        split = data.val if data.val is not None else data.train
        logits = before.reference["val"] if data.val is not None else series.answers(before, split)
        offset = _offset(logits, split, data, missing, by)
        folder = _corrected(series, (stage.folder, spec, network), teacher, missing, offset)
        after = series.finished(folder)
        figures: dict[str, float | None] = {"offset": offset}
        for when, given in (("before", before), ("after", after)):
            figures |= _figures(given.reference, data, missing, when)
        names = [{"class": data.classes[c], "offset": offset} for c in missing]
        return series.conclude(folder, figures, {"missing": names})


def missing_classes(data: Bundle) -> list[int]:
    """Classes of the training set of which the transfer set has no image."""
    here = set(data.transfer.labels.tolist())
    return [c for c in sorted(set(data.train.labels.tolist())) if c >= 0 and c not in here]


def prior_offset(logits: Tensor, missing: Sequence[int], share: float) -> float:
    """The number that, added to the logits [N, C] of the missing classes, makes their mean probability `share`.

    The probability of an image's missing classes is sigmoid(odds + offset), so the mean rises with it: bisection.
    """
    others = [c for c in range(logits.shape[1]) if c not in set(missing)]
    table = logits.cpu().double()
    odds = table[:, list(missing)].logsumexp(1) - table[:, others].logsumexp(1)
    low, high = -float(odds.max()) - 40.0, -float(odds.min()) + 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float((odds + middle).sigmoid().mean()) < share else (low, middle)
    return (low + high) / 2


def accuracy_offset(logits: Tensor, labels: Tensor, missing: Sequence[int]) -> float:
    """The number that, added to the logits [N, C] of the missing classes, gives the largest accuracy on `labels` [N].

    An image's answer changes where the best missing class overtakes the best other one, so only N + 1 intervals differ;
    the middle of the best one, and of equally good ones that which is nearest to no correction.
    """
    others = [c for c in range(logits.shape[1]) if c not in set(missing)]
    table = logits.cpu().double()
    labels = labels.cpu()
    mine, theirs = table[:, list(missing)].max(1), table[:, others].max(1)
    change = (theirs.values - mine.values).sort()
    right_after = (torch.tensor(list(missing))[mine.indices] == labels)[change.indices]
    right_before = (torch.tensor(others)[theirs.indices] == labels)[change.indices]
    gain = torch.cat([torch.zeros(1), (right_after.float() - right_before.float())]).cumsum(0)
    edges = torch.cat([change.values[:1] - 2, change.values, change.values[-1:] + 2])
    middles = (edges[:-1] + edges[1:]) / 2
    best = middles[(gain == gain.max()) & (edges[1:] > edges[:-1])]
    return float(best[best.abs().argmin()])


def _offset(logits: Tensor, split: Split, data: Bundle, missing: Sequence[int], by: By) -> float:
    if by == "accuracy":
        return accuracy_offset(logits, split.labels, missing)
    labels = data.train.labels if data.train.clean is None else data.train.clean
    share = float(torch.isin(labels, torch.tensor(missing)).float().mean())
    return prior_offset(logits, missing, share)


def _corrected(
    series: Series,
    trained: tuple[Path, NetworkSpec, nn.Module],
    teacher: TaughtBy | None,
    missing: Sequence[int],
    offset: float,
) -> Path:
    """The student with its biases moved, as a run folder of its own: it can teach like any other."""
    folder, spec, network = trained
    bias = last_layer(network).bias
    if bias is None:
        raise UserError("student", spec.name, "a network whose last layer has a bias to correct")
    with torch.no_grad():
        bias[list(missing)] += offset
    return series.publish("corrected", spec, network, folder, teacher)


def _figures(
    reference: Mapping[str, Tensor], data: Bundle, missing: Sequence[int], when: str
) -> dict[str, float | None]:
    """Accuracy on all images, and on those of the missing classes."""
    figures: dict[str, float | None] = {}
    for name, split in (("val", data.val), ("test", data.test)):
        if split is not None:
            right = reference[name].argmax(1).cpu() == split.labels.cpu()
            mine = torch.isin(split.labels.cpu(), torch.tensor(missing))
            figures[f"{when}/{name}/top1"] = right.float().mean().item()
            figures[f"{when}/missing/{name}/top1"] = right[mine].float().mean().item() if bool(mine.any()) else None
    return figures
