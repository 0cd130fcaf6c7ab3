"""Nodes against signatures: what fits an annotation, what is said of what does not, and how objects are built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from kdbench.configure import check_node, construct, locate
from kdbench.configure.fit import fit
from kdbench.errors import UserError


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        ("inf", float, float("inf")),
        ("-inf", float | None, float("-inf")),
        (None, float | None, None),
        (3, int | float | str, 3),
        ("10%", int | float | str, "10%"),
        (5, str, "5"),
        (5, str | None, "5"),
        (True, bool | Literal["auto"], True),
        ("auto", bool | Literal["auto"], "auto"),
        ([1, 2], list[float], [1.0, 2.0]),
        ([1, 2], tuple[int, int], (1, 2)),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([1], Sequence[int], [1]),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ({"a": "x"}, dict[str, Any], {"a": "x"}),
        ("x", Path, Path("x")),
        ({"_target_": "m.C"}, Exception, {"_target_": "m.C"}),  # a class of its own: built later
        (object, Any, object),
    ],
)
def test_values_that_fit(value, annotation, expected):
    found = fit(value, annotation, "key")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("abc", float, "key = abc: must be a number (float)"),
        (True, float, "key = true: must be a number (float)"),
        (True, int, "key = true: must be a whole number (int)"),
        (1.0, int, "key = 1.0: must be a whole number (int)"),
        (1, bool, "key = 1: must be true or false (bool)"),
        (None, str, "key = null: must be text (str)"),
        (True, str, "key = true: must be text (str)"),
        ("x", int | None, "key = x: must be a whole number (int) or null"),
        ("fp6", Literal["fp16", "bf16"], "key = fp6: must be one of fp16, bf16. Did you mean fp16 or bf16?"),
        (1, Literal[True, "auto"], "key = 1: must be one of true, auto"),
        (3, list[int], "key = 3: must be a list, each a whole number (int)"),
        ([1, "x"], list[int], "key[1] = x: must be a whole number (int)"),
        ([1, "x"], list[int] | None, "key[1] = x: must be a whole number (int)"),
        ([1], tuple[int, int], "key = [1]: must be a list of 2"),
        ({"task": "x"}, Mapping[str, float], "key.task = x: must be a number (float)"),
        ({"a": [1, None]}, dict[str, list[float]], "key.a[1] = null: must be a number (float)"),
        (2, dict[str, float], "key = 2: must be a mapping {key: value}"),
    ],
)
def test_values_that_do_not_fit(value, annotation, message):
    with pytest.raises(UserError) as caught:
        fit(value, annotation, "key")
    assert str(caught.value) == message


@dataclass
class Options:
    lr: float
    name: str = "sgd"
    betas: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise UserError(f"optimizer.lr = {self.lr}: must be at least 0")


class Part:
    """A target with a nested one."""

    def __init__(self, size: int, inner: Part | None = None, hidden: Hidden = 3) -> None:  # type: ignore[name-defined]  # noqa: F821
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if size == 13:
            raise ValueError("an unlucky number")
        self.size, self.inner, self.hidden = size, inner, hidden


PART = f"{__name__}.Part"


def test_a_dataclass_of_options():
    made = check_node({"lr": 1, "betas": [0, 1]}, Options, "optimizer")
    assert made == Options(1.0, betas=[0.0, 1.0]) and isinstance(made.lr, float)


@pytest.mark.parametrize(
    ("node", "prefix", "message"),
    [
        ({"lr": 1, "beta": 2}, "optimizer", "optimizer.beta: there is no such key. Did you mean optimizer.betas?"),
        ({}, "optimizer", "optimizer.lr: needs a value"),
        ({"lr": "x"}, "optimizer", "optimizer.lr = x: must be a number"),
        ({"lr": -1}, "teacher.optimizer", "teacher.optimizer.lr = -1.0: must be at least 0"),
    ],
)
def test_options_that_cannot_be(node, prefix, message):
    with pytest.raises(UserError) as caught:
        check_node(node, Options, prefix)
    assert str(caught.value).startswith(message)


def test_construct_builds_nested_nodes_and_takes_what_kdbench_gives():
    made = construct({"_target_": PART, "inner": {"_target_": PART, "size": 2, "hidden": "any"}}, "part", size=4)
    assert (made.size, made.inner.size, made.inner.hidden) == (4, 2, "any")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"size": 0}, "part.size: must be at least 1, got 0"),
        ({"size": 13}, "part: an unlucky number"),
        ({"size": 1, "inner": {"_target_": PART, "size": 0}}, "part.inner.size: must be at least 1, got 0"),
        ({"size": 1, "inner": {"_target_": PART, "sizes": 0}}, "part.inner.sizes: there is no such key"),
        ({}, "part.size: needs a value"),
    ],
)
def test_construct_says_which_key_is_wrong(node, message):
    with pytest.raises(UserError) as caught:
        construct({"_target_": PART, **node}, "part")
    assert str(caught.value).startswith(message)


def test_what_kdbench_sets_cannot_be_typed():
    with pytest.raises(UserError, match=r"part\.size: kdbench sets this one itself"):
        construct({"_target_": PART, "size": 1}, "part", size=2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{__name__}.Prat", "Did you mean .*Part"),
        ("nowhere.at.all", "cannot import nowhere"),
        ("Part", "dotted path"),
        (None, "dotted path"),
        ("kdbench.nothing.Part", "kdbench has no nothing"),
    ],
)
def test_targets_that_are_not_there(path, message):
    with pytest.raises(UserError, match=message):
        locate(path, "part")
    assert locate(f"{__name__}.Options.__post_init__") is Options.__post_init__
