"""The list of metrics: everything that is computed is in it, and printers and sorters ask it."""

from __future__ import annotations

import pytest
import torch

from kdbench.engine.fidelity import fidelity
from kdbench.engine.metrics import measure_logits
from kdbench.results.metrics import CLASSIFICATION, METRICS, metric_of


def test_what_is_computed_is_in_the_list():
    logits, labels = torch.randn(20, 7), torch.arange(20) % 7
    found = measure_logits(logits, labels, logits, logits.softmax(1))
    of_two = {"f1", "mcc"}  # classes
    assert set(found) == {metric.name for metric in CLASSIFICATION.metrics} - of_two
    assert of_two <= set(measure_logits(logits[:, :2], labels % 2))
    assert fidelity(logits, logits, labels).keys() <= METRICS.keys()
    assert all(name == metric.name and metric.better in (1, -1) for name, metric in METRICS.items())


@pytest.mark.parametrize(
    ("name", "unit", "better"),
    [("last", "%", 1), ("best/val/top1", "%", 1), ("train/clean_top1", "%", 1), ("test/nll", "nats", -1),
     ("train/loss_task", "", -1), ("gain/test/top1", "%", 1), ("offset", "", 1)],
)  # fmt: skip
def test_a_figure_is_known_by_its_name(name, unit, better):
    metric = metric_of(name)
    assert (metric.unit, metric.better) == (unit, better)


def test_numbers_as_people_read_them():
    assert METRICS["top1"].text(0.91234) == "91.23 %" and METRICS["top1"].number(0.91234) == "91.23"
    assert METRICS["nll"].text(0.25) == "0.2500" and METRICS["top1"].text(None) == "-"


def test_chance_is_three_deviations_of_a_guess():
    images = [40] * 10
    assert CLASSIFICATION.chance(images, ()) == 0.1
    limit = 0.1 + 3 * (0.1 * 0.9 / 400) ** 0.5
    assert CLASSIFICATION.judge(limit - 1e-6, images) == "chance"
    assert CLASSIFICATION.judge(limit + 1e-6, images) == "better"


@pytest.mark.parametrize(
    ("value", "images", "judged"),
    [
        (0.9, [90, 10], "chance"),  # always the largest class
        (float(torch.tensor(0.6)), [600, 400], "chance"),
        (0.91, [90, 10], "better"),  # and one of the others right
        (8 / 13, [5, 4, 4], "unclear"),
        (5 / 13, [5, 4, 4], "chance"),
        (12 / 13, [5, 4, 4], "better"),
        (0.5, [0, 1000, 0], "chance"),
        (0.7, [20, 20], "unclear"),
        (0.52, [500, 500], "chance"),
        (0.02, [1] * 100, "chance"),
        (0.011, [100] * 100, "chance"),
    ],
)
def test_guesses_are_the_largest_class_or_luck_and_few_images_cannot_tell(value, images, judged):
    assert CLASSIFICATION.judge(value, images) == judged


def test_how_many_images_could_tell():
    needed = CLASSIFICATION.images_to_tell(0.7, [20, 20])
    assert (
        CLASSIFICATION.judge(0.7, [needed // 2 + 1] * 2) == "better" != CLASSIFICATION.judge(0.7, [needed // 2 - 1] * 2)
    )


def test_better_follows_the_metric():
    worse_is_more = CLASSIFICATION._replace(primary=METRICS["nll"], chance=lambda images, training: 2.0)
    assert CLASSIFICATION.is_better(0.9, 0.8) and not CLASSIFICATION.is_better(0.8, 0.8)
    assert worse_is_more.is_better(0.5, 0.6) and not worse_is_more.is_better(0.6, 0.5)
    assert worse_is_more.judge(2.1, [40] * 10) == "chance" and worse_is_more.judge(1.9, [40] * 10) == "better"
    assert worse_is_more.on("val") == "val/nll"
