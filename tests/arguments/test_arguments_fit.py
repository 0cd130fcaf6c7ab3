"""What fits an annotation, and what is said of what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kdbench.arguments import fit
from kdbench.errors import UserError


@dataclass
class Size:
    pixels: int


class Longer(Size):
    """An instance of it is one of Size's too."""


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
        (Longer(1), Size, Longer(1)),  # built already
        (Path("x"), Path | None, Path("x")),
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
