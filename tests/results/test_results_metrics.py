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
    assert set(found) == {metric.name for metric in CLASSIFICATION.metrics}
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
    assert CLASSIFICATION.chance(10) == 0.1
    limit = 0.1 + 3 * (0.1 * 0.9 / 400) ** 0.5
    assert CLASSIFICATION.is_chance(limit - 1e-6, 10, 400) and not CLASSIFICATION.is_chance(limit + 1e-6, 10, 400)


def test_better_follows_the_metric():
    worse_is_more = CLASSIFICATION._replace(primary=METRICS["nll"], chance=lambda classes: 2.0)
    assert CLASSIFICATION.is_better(0.9, 0.8) and not CLASSIFICATION.is_better(0.8, 0.8)
    assert worse_is_more.is_better(0.5, 0.6) and not worse_is_more.is_better(0.6, 0.5)
    assert worse_is_more.is_chance(2.1, 10, 400) and not worse_is_more.is_chance(1.9, 10, 400)
    assert worse_is_more.on("val") == "val/nll"
