"""A generalist and specialists for the classes it confuses (Hinton et al. 2015, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from kdbench.arguments.ranges import Count, NotNegative, within
from kdbench.data.bundle import Bundle, Split
from kdbench.data.sampling import torch_generator
from kdbench.engine.metrics import measure_logits
from kdbench.engine.schedule import Epochs
from kdbench.errors import require
from kdbench.models.base import last_layer_name
from kdbench.models.fusion import Fused
from kdbench.results.result import NetworkResult, RunResult
from kdbench.runs.folder import network_of_run
from kdbench.runs.obtain import introduced, measured, obtain
from kdbench.runs.recipe import NetworkSpec, Recipe
from kdbench.runs.series import Series, opened, seeds_apart
from kdbench.runs.stage import Start
from kdbench.runs.taught import TaughtBy


def specialists(
    recipe: Recipe, out: Path, specialists: Annotated[int, within(2, 10_000)] = 3, size: Count | None = None,
    top: Count = 1, epochs: Epochs | None = None, lr: NotNegative | None = None, distil: bool = False,
) -> RunResult:  # fmt: skip
    """`teacher=` is the generalist. Its classes are grouped by what it confuses; each group gets a specialist, the
    generalist's network started from its weights, with one output for all other classes (the dustbin).

    A specialist trains on labels, half of its images from its classes, half from the others; `epochs` and `lr` are its
    training's (null: those of the schedule, and a tenth of the optimizer's). Afterwards the logarithm of how much its
    classes were oversampled is added to its dustbin's logit. In use, the specialists that have one of the generalist's
    `top` most probable classes are fused with it (`models.fusion`). `distil`: also teach `student=` by the fusion.

    The figures compare the generalist and the fusion, over all images and conditionally (images of the specialists'
    classes, answers among these classes only); the table `covering` does so by the number of specialists of a class.
    """
    spec = recipe.need_teacher("a network: it is the generalist")
    network = spec.origin.describe(recipe.catalogue)
    allowed = "one network, whose weights a specialist starts from; a student of several may be one: teacher.run"
    require(network.single, "teacher", network.name, allowed)
    recipe.need_classes("specialists")
    with opened(recipe, out) as series:
        _check(len(series.data.classes), specialists, size, top)
        generalist = obtain(spec, recipe, series.data)
        answers = series.answers(generalist, series.data.train).softmax(1)
        groups = confusable_classes(answers, specialists, size, recipe.seeds.init)
        own = _specialist(series.recipe, network, epochs, lr)
        trained = [_train(series, own, generalist.layers(), group, i) for i, group in enumerate(groups, start=1)]
        offsets = [offset(series.data.train, group) for group in groups]
        networks = [network_of_run(folder, recipe.catalogue)[1] for folder in trained]
        together = Fused(generalist.trained(), networks, groups, offsets, len(series.data.classes), top)
        fused = introduced(measured("fused", together, None, recipe, series.data), series.data, spec.allow_chance)
        fused = fused if together.closed else replace(fused, tables=None)  # a solver's cost is known by running it
        figures = _figures(generalist, fused, groups, series.data)
        about, by_count = _about(series, groups, offsets), covering(generalist, fused, groups, series.data)
        tables = {"specialists": about, "covering": by_count}
        if distil:
            stage = series.stage("student", fused)
            series.run(stage, fused)
            return series.conclude(stage.folder, figures, tables)
        return series.conclude(trained[-1], figures, tables, _fused_result(series, generalist, fused))


def confusable_classes(predictions: Tensor, clusters: int, size: int | None = None, seed: int = 0) -> list[list[int]]:
    """Groups of classes that are often predicted together (Hinton et al. 2015, section 5.3); needs no true labels.

    predictions [N, C] probabilities. K-means on the columns of their covariance matrix [C, C]. `size` null: the
    clusters themselves, which part all classes; a number: for each centre the `size` classes whose columns are nearest
    to it, so that groups may overlap and classes be in none (the paper has such groups but not how they are made).
    Groups in the order of their first class; equal groups count once.
    """
    classes = predictions.shape[1]
    _check(classes, clusters, size)
    from sklearn.cluster import KMeans  # takes a second to load

    columns = torch.cov(predictions.cpu().double().T).numpy()
    found = KMeans(clusters, n_init=10, random_state=seed % 2**32).fit(columns)  # numpy's own seeds have 32 bits
    if size is None:
        groups = [[c for c in range(classes) if found.labels_[c] == group] for group in range(clusters)]
    else:
        centres = torch.from_numpy(found.cluster_centers_)
        near = torch.cdist(centres, torch.from_numpy(columns)).argsort(dim=1, stable=True)[:, :size]
        groups = [sorted(row.tolist()) for row in near]
    return sorted({tuple(group): group for group in groups if group}.values())


def _check(classes: int, clusters: int, size: int | None, top: int = 1) -> None:
    """Refuse what depends on the number of classes, before the generalist is trained for it."""
    less = f"{classes - 1}, one less than the classes"
    allowed = f"from 2 to the number of classes, {classes}"
    require(2 <= clusters <= classes, "procedure.specialists", clusters, allowed)
    require(size is None or 1 <= size < classes, "procedure.size", size, f"null or from 1 to {less}")
    require(1 <= top < classes, "procedure.top", top, f"from 1 to {less}")


def offset(split: Split, group: Sequence[int]) -> float:
    """log((1 - p) / p), p the group's share of the training images: what makes up for its share of one half."""
    inside = int(torch.isin(split.labels, torch.tensor(group)).sum())
    return math.log((len(split) - inside) / inside)


def half_special(split: Split, group: Sequence[int], classes: int, seed: int) -> Split:
    """As many images as the split has, half from the group's classes, half from the others, with the specialist's
    labels: the place in the group, or len(group) for all others. A half that has too few images repeats them."""
    inside = torch.isin(split.labels, torch.tensor(group))
    halves = []
    for part, rows in enumerate((inside.nonzero()[:, 0], (~inside).nonzero()[:, 0])):
        count = len(split) // 2
        order = torch.randperm(len(rows), generator=torch_generator(seed, "specialist", part))
        halves.append(rows[order].repeat(math.ceil(count / len(rows)))[:count])
    return relabelled(split.select(torch.cat(halves)), group, classes)


def relabelled(split: Split, group: Sequence[int], classes: int) -> Split:
    """The split with a specialist's labels."""
    labels = torch.full((classes + 1,), len(group))
    labels[list(group)] = torch.arange(len(group))
    labels[-1] = -1  # the label of images that have none
    return replace(split, labels=labels[split.labels], clean=None)


def _specialist(recipe: Recipe, network: NetworkSpec, epochs: int | None, lr: float | None) -> Recipe:
    """How every specialist is trained: the generalist's network, without published weights, under its labels."""
    config = dict(network.config) | ({"pretrained": False} if "pretrained" in network.config else {})
    schedule, optimizer = recipe.schedule, recipe.optimizer
    return replace(
        recipe,
        student=recipe.catalogue.network_from(network.name, config),
        loss=recipe.catalogue.loss("ce"),
        schedule=replace(schedule, epochs=epochs or schedule.epochs, warmup=0),
        optimizer=replace(optimizer, lr=optimizer.lr / 10 if lr is None else lr),
    )


def _train(series: Series, recipe: Recipe, generalist: nn.Module, group: Sequence[int], number: int) -> Path:
    """The folder of one trained specialist."""
    data, classes = series.data, len(series.data.classes)
    seeds = seeds_apart(recipe.seeds, number)
    special = replace(
        data,
        classes=(*(data.classes[c] for c in group), "other"),
        train=half_special(data.train, group, classes, seeds.data),
        transfer=half_special(data.train, group, classes, seeds.data),
        val=None if data.val is None else relabelled(data.val, group, classes),
        test=relabelled(data.test, group, classes),
    )
    stage = series.stage(f"specialist{number}", recipe=replace(recipe, seeds=seeds))
    stage = replace(stage, data=special, split=special.transfer, start=specialised(generalist, group))
    series.run(stage, None)
    return stage.folder


def specialised(generalist: nn.Module, group: Sequence[int]) -> Start:
    """The generalist's weights for a specialist of a group of its classes.

    Of the classifier it takes the group's rows; the dustbin is the mean of all others, its bias raised by the logarithm
    of their number.
    """
    head = last_layer_name(generalist)
    state = {key: value.detach().cpu().clone() for key, value in generalist.state_dict().items()}
    for part in ("weight", "bias"):
        if f"{head}.{part}" in state:
            rows = state[f"{head}.{part}"]
            others = [c for c in range(len(rows)) if c not in group]
            rest = rows[others].mean(0, keepdim=True) + (math.log(len(others)) if part == "bias" else 0.0)
            state[f"{head}.{part}"] = torch.cat([rows[list(group)], rest])
    return Start(state)


def _figures(
    generalist: TaughtBy, fused: TaughtBy, groups: Sequence[Sequence[int]], data: Bundle
) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    covered = sorted({c for group in groups for c in group})
    for name, split in (("val", data.val), ("test", data.test)):
        if split is None:
            continue
        before, after = generalist.reference[name], fused.reference[name]
        labels = split.labels.to(before.device)
        figures |= {f"generalist/{name}/top1": generalist.metrics[f"{name}/top1"]}
        figures |= {f"fused/{name}/top1": fused.metrics[f"{name}/top1"]}
        for who, logits in (("generalist", before), ("fused", after)):
            figures[f"conditional/{who}/{name}/top1"] = conditional(logits, labels, covered)
        top = before.argmax(1)
        outside = ~torch.isin(top, torch.tensor(covered, device=top.device))
        changed = (after.argmax(1) != top) & outside
        figures[f"changed_uncovered/{name}"] = float(changed.sum())
    return figures


def conditional(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float | None:
    """Accuracy on the images of `classes` when only these classes may be answered; None if there is no such image."""
    allowed = torch.tensor(classes, device=labels.device)
    mine = torch.isin(labels, allowed)
    if not bool(mine.any()):
        return None
    return (allowed[logits[mine][:, allowed].argmax(1)] == labels[mine]).float().mean().item()


def covering(
    generalist: TaughtBy, fused: TaughtBy, groups: Sequence[Sequence[int]], data: Bundle
) -> list[dict[str, object]]:
    """Test images by the number of specialists that have their class: both accuracies and the relative gain
    (Hinton et al. 2015, table 4)."""
    labels = data.test.labels.to(fused.reference["test"].device)
    times = torch.tensor([sum(c in group for group in groups) for c in range(len(data.classes))], device=labels.device)
    rows = []
    for number in sorted(set(times[labels].tolist())):
        mine = times[labels] == number
        before, after = (
            (given.reference["test"].argmax(1) == labels)[mine].float().mean().item() for given in (generalist, fused)
        )
        gain = (after - before) / before if before else None
        about = {"specialists": number, "images": int(mine.sum()), "generalist": before, "fused": after}
        rows.append({**about, "relative_gain": gain})
    return rows


def _about(series: Series, groups: Sequence[Sequence[int]], offsets: Sequence[float]) -> list[dict[str, object]]:
    names = series.data.classes
    return [
        {"folder": entry.folder, "classes": [names[c] for c in group], "dustbin_offset": value}
        for entry, group, value in zip(series.entries, groups, offsets, strict=True)
    ]


def _fused_result(series: Series, generalist: TaughtBy, fused: TaughtBy) -> Mapping[str, object]:
    """What stands for the student's result where the fusion itself is the outcome."""
    last: dict[str, float] = {"epoch": float(series.recipe.schedule.epochs)}
    for name, split in (("val", series.data.val), ("test", series.data.test)):
        if split is not None:
            logits = fused.reference[name]
            found = measure_logits(logits, split.labels.to(logits.device), generalist.reference[name])
            last |= {f"{name}/{key}": value for key, value in found.items()}
    student = NetworkResult("fused", parameters=fused.parameters, weights=fused.weights)
    formula = "min_q KL(generalist || q) + sum over active specialists KL(specialist || q)"
    return {
        "teacher": generalist.record(),
        "student": student,
        "last": last,
        "best": None,
        "formula": formula,
    }
