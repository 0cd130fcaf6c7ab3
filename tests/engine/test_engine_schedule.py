import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from timm.scheduler import CosineLRScheduler

from kdbench.engine.schedule import ScheduleOptions, lr_factors, to_steps
from kdbench.errors import UserError


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (5, 500),
        (2.5, 250),
        ("5", 500),
        ("5 epochs", 500),
        ("10%", 100),
        ("10 %", 100),
        ("500 steps", 500),
        ("1 step", 1),
        (0, 0),
    ],
)
def test_durations_in_every_unit(duration, steps):
    assert to_steps(duration, steps_per_epoch=100, total=1000) == steps


@pytest.mark.parametrize("duration", ["ten", "-1", -3, "5 parsecs", "nan", "inf", ""])
def test_a_wrong_duration_names_its_key(duration):
    with pytest.raises(UserError, match=r"^warmup"):
        ScheduleOptions(epochs=10, batch_size=8, warmup=duration)


def test_crd_protocol_drops_after_its_milestones():
    options = ScheduleOptions(epochs=240, batch_size=64, shape="step", milestones=[150, 180, 210], gamma=0.1)
    factors = lr_factors(options, 2)
    assert len(factors) == 480
    assert [factors[2 * e] for e in (0, 149, 150, 179, 180, 209, 210, 239)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    assert factors[299] == 1 and factors[300] == pytest.approx(0.1)


def test_warmup_rises_to_the_peak_and_cosine_falls_to_the_floor():
    options = ScheduleOptions(epochs=10, batch_size=8, shape="cosine", warmup=2, floor=0.1)
    factors = lr_factors(options, 5)
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    middle = factors[10 + 20]
    assert middle == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factors[-1] > 0.1 and factors[-1] < 0.11


def test_cycles_restart_the_shape():
    factors = lr_factors(ScheduleOptions(epochs=4, batch_size=8, shape="cosine", cycles=2), 5)
    assert factors[0] == factors[10] == 1.0 and factors[9] < 0.05


def test_linear_and_constant():
    assert lr_factors(ScheduleOptions(epochs=2, batch_size=8, shape="linear"), 2) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert lr_factors(ScheduleOptions(epochs=2, batch_size=8), 2) == [1.0] * 4


def test_a_warmup_longer_than_the_training_is_refused():
    with pytest.raises(UserError, match="no longer than the training"):
        lr_factors(ScheduleOptions(epochs=2, batch_size=8, warmup=3), 5)


def test_by_epoch_with_the_warmup_laid_over_it_is_timms_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    theirs = CosineLRScheduler(optimizer, t_initial=20, lr_min=0.05, warmup_t=5, warmup_lr_init=0.01)
    options = ScheduleOptions(20, 2, shape="cosine", warmup=5, warmup_from=0.02, floor=0.1, per="epoch")
    factors = lr_factors(replace(options, warmup_overlaps=True), 3)
    for epoch in range(20):
        theirs.step(epoch)
        expected = optimizer.param_groups[0]["lr"] / 0.5
        assert factors[3 * epoch : 3 * epoch + 3] == [pytest.approx(expected)] * 3


def test_a_rise_starts_where_it_is_told_to():
    factors = lr_factors(ScheduleOptions(4, 2, warmup=2, warmup_from=0.5), 2)
    assert factors == [0.625, 0.75, 0.875, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_zaremba_s_rate_falls_by_1_15_an_epoch_after_the_14th():
    path = Path(__file__).parents[2] / "configs" / "schedule" / "zaremba55.yaml"
    factors = lr_factors(ScheduleOptions(**yaml.safe_load(path.read_text(encoding="utf-8"))), 10)
    assert len(factors) == 550 and factors[:140] == [1.0] * 140
    for epoch in range(14, 55):
        assert factors[10 * epoch : 10 * epoch + 10] == pytest.approx([1.15 ** (13 - epoch)] * 10, rel=1e-5)
