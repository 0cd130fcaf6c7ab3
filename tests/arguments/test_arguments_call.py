"""What a dotted path names, and calling it with what the user typed and what kdbench gives."""

from __future__ import annotations

import pytest

from kdbench.arguments import accepted, call, locate
from kdbench.errors import UserError


class Reader:
    def read(self, root: str) -> str:
        return root


def read(root: str, size: float = 8, mode: Missing = None) -> tuple:  # type: ignore[name-defined]  # noqa: F821
    """An annotation that cannot be evaluated lets everything pass."""
    if size > 1000:
        raise ValueError("too large for this machine")
    if size > 100:
        raise UserError("size", size, "at most 100")
    if size < 0:
        raise UserError("dataset must have a size of at least 0")
    return root, size, mode


def read_any(root: str, **options: object) -> dict:
    return {"root": root, **options}


def test_options_are_converted_and_given_arguments_passed():
    made = call(read, {"size": 3, "mode": [1]}, "dataset", {"root": "here"})
    assert made == ("here", 3.0, [1]) and isinstance(made[1], float)
    assert call(read_any, {"x": "3"}, "dataset", {"root": "here"}) == {"root": "here", "x": "3"}


def test_what_a_function_has_no_parameter_for_can_be_left_out():
    given = {"root": "here", "cache": "there"}
    assert accepted(read, given) == {"root": "here"}
    assert accepted(read_any, given) == given


@pytest.mark.parametrize(
    ("function", "options", "given", "message"),
    [
        (read, {"sizes": 3}, {"root": ""}, "dataset.sizes: there is no such key. Did you mean dataset.size? Keys of "),
        (read, {"x": 3}, {"root": ""}, "dataset.x: there is no such key. Keys of dataset: mode, size, subset"),
        (read, {"subst": 3}, {"root": ""}, "dataset.subst: there is no such key. Did you mean dataset.subset? Keys"),
        (read, {"root": 3}, {"root": ""}, "dataset.root: kdbench sets this one itself; leave it out"),
        (read_any, {"root": 3}, {"root": ""}, "dataset.root: kdbench sets this one itself; leave it out"),
        (read, {"size": "x"}, {"root": ""}, "dataset.size = x: must be a number (float)"),
        (read, {"size": 3}, {}, "dataset.root: needs a value"),
        (read, {"size": 200}, {"root": ""}, "dataset.size = 200.0: must be at most 100"),
        (read, {"size": 2000}, {"root": ""}, "dataset: too large for this machine"),
        (read, {"size": -1}, {"root": ""}, "dataset must have a size of at least 0"),
    ],
)
def test_what_cannot_be_called(function, options, given, message):
    with pytest.raises(UserError) as caught:
        call(function, options, "dataset", given, beside=["subset"])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{__name__}.raed", f"part = {__name__}.raed: {__name__} has no raed. Did you mean .*read"),
        ("nowhere.at.all", "part = nowhere.at.all: cannot import nowhere"),
        ("read", "part = read: must be the dotted path of a class or function, e.g. package.module.name"),
        (None, "part = null: must be the dotted path"),
        ("", "part = '': must be the dotted path"),
        ("kdbench.nothing.read", "kdbench has no nothing"),
    ],
)
def test_targets_that_are_not_there(path, message):
    with pytest.raises(UserError, match=message):
        locate(path, "part")


def test_what_a_path_names():
    assert locate(f"{__name__}.read") is read
    assert locate(f"{__name__}.Reader.read") is Reader.read


def test_paths_of_the_first_edition_lead_to_what_they_named():
    from kdbench.data.augment.views import CropFlip

    assert locate("kdbench.data.views.CropFlip") is CropFlip
