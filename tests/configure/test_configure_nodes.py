"""Nodes against signatures: what is said of what does not fit, and how objects are built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from kdbench.arguments import checked
from kdbench.arguments.ranges import at_least
from kdbench.configure import check_node, construct
from kdbench.errors import UserError, require


@checked
@dataclass
class Options:
    lr: Annotated[float, at_least(0)]
    name: str = "sgd"
    betas: list[float] = field(default_factory=list)


class Part:
    """A target with a nested one."""

    def __init__(self, size: int, inner: Part | None = None, hidden: Hidden = 3) -> None:  # type: ignore[name-defined]  # noqa: F821
        require(size >= 1, "size", size, "at least 1")
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
        ({"lr": -1}, "teacher.optimizer", "teacher.optimizer.lr = -1: must be at least 0"),
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
        ({"size": 0}, "part.size = 0: must be at least 1"),
        ({"size": 13}, "part: an unlucky number"),
        ({"size": 1, "inner": {"_target_": PART, "size": 0}}, "part.inner.size = 0: must be at least 1"),
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
