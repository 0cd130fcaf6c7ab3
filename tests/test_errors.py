"""Messages: what of a long value, and of many names, they show."""

from __future__ import annotations

from kdbench.errors import UserError, some


def test_a_long_value_and_many_names_are_shown_in_part():
    text = "word " * 50_000
    said = str(UserError("text", text, "two texts"))
    assert (
        len(said) < 500
        and said.startswith("text = word word")
        and said.endswith("(250,000 characters): must be two texts")
    )
    assert len(str(UserError("dataset.transfer.omit", [f"class {n}" for n in range(1000)], "names"))) < 500
    assert str(UserError("text", "a" * 400, "two")) == f"text = {'a' * 400}: must be two"
    assert some(range(3), 3) == "0, 1, 2" and some(range(1000), 3) == "0, 1, 2, ..."
