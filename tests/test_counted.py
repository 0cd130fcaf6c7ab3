"""Which keys count: those that came later do not, at the value that gives what was before them."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from kdbench import counted
from kdbench.configure import config_hash
from kdbench.counted import as_before


@pytest.fixture(autouse=True)
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "ADDED", {"optimizer.later": None, "optimizer.names": [], "dataset.times": 1})


TREE = {"optimizer": {"lr": 0.1}, "dataset": {"name": "x"}, "teacher": {"_target_": "a.b", "optimizer": {"lr": 0.2}}}


def hashed(*changes: tuple[str, object]) -> str:
    cfg = OmegaConf.create(TREE)
    for key, value in changes:
        OmegaConf.update(cfg, key, value, force_add=True)
    return config_hash(cfg)


def test_a_key_that_came_later_changes_no_hash_at_its_neutral_value() -> None:
    neutral = (("optimizer.later", None), ("optimizer.names", []), ("dataset.times", 1))
    assert hashed(*neutral, ("teacher.optimizer.later", None)) == hashed()


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer.later", 0.0),
        ("optimizer.names", ["bias"]),
        ("dataset.times", 2),
        ("teacher.optimizer.later", 1),
        ("loss.later", None),
    ],
)
def test_at_any_other_value_and_in_any_other_place_it_counts(key: str, value: object) -> None:
    assert hashed((key, value)) != hashed()


def test_a_loss_s_later_key_changes_none_in_a_sum_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counted, "ADDED", {"loss.falls": None})
    values = {"loss.parts.sskd.falls": None, "loss.parts.a.parts.b.falls": None, "loss.falls": None, "loss.tau": 4}
    assert as_before(values) == {"loss.tau": 4}
    assert as_before({"loss.parts.sskd.falls": "[0.5]"}) == {"loss.parts.sskd.falls": "[0.5]"}


def test_a_group_of_its_own_is_read_with_its_place() -> None:
    assert as_before({"lr": 1, "later": None}, "optimizer.") == {"lr": 1}
    assert as_before({"lr": 1, "later": None}, "schedule.") == {"lr": 1, "later": None}
