"""A folder of unlabelled photos to learn embeddings from, and a small labelled folder to measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from kdbench.arguments.ranges import Finite, Text, at_least, listed
from kdbench.data.bundle import Source
from kdbench.data.files import LeftOut, find_images
from kdbench.data.readers.folders import parts_of
from kdbench.data.readers.imagefolder import Gigabytes, Listing, Parts, Reading, Side, listing, source
from kdbench.errors import UserError, require, some
from kdbench.results.metrics import EMBEDDING


def photos(
    root: str | None,
    cache: str,
    channels: int | None,
    probe: Text | None,
    dimensions: Annotated[int, at_least(2)] | None,
    size: Side = 224,
    resize: Side | None = None,
    in_memory_limit: Gigabytes = 4.0,
    background: Text = "white",
    value_range: Annotated[list[Finite], listed(2, "[black, white]", most=2)] | None = None,
    packed: bool = False,
) -> Source:
    """All images below `root`, whatever their folders, without labels; networks answer with embeddings.

    dimensions: of the embedding, which are the teacher's. probe: a folder of class folders whose images are never
    trained on; k nearest neighbours and a linear probe name them by the student's embeddings (each image left out of
    its own answer). With val/ and test/ in it, val/ is the validation set. Other keys as in `imagefolder`. Raises
    UserError that names the path for whatever is missing.
    """
    if not root:
        raise UserError("dataset.root", root, "the folder that holds the photos")
    if not probe:
        raise UserError("dataset.probe", probe, "a folder of class folders, some labelled images to measure with")
    if not Path(probe).is_dir():
        raise UserError(
            "dataset.probe", probe, "a folder of class folders", f"There is no folder {Path(probe).resolve()}"
        )
    if dimensions is None:
        raise UserError("dataset.dimensions", dimensions, "the dimensions of the teacher's embedding, e.g. 384")
    reading = Reading(Path(root), cache, channels, size, resize, in_memory_limit, background, value_range, packed)
    paths = find_images(root, "dataset.root")
    test, val = _probe(Path(probe))
    axes = tuple(f"dimension {number}" for number in range(dimensions))
    made = source(axes, Parts((paths, torch.full((len(paths),), -1)), test, val), reading)
    return made._replace(task=EMBEDDING)


def _probe(folder: Path) -> tuple[Listing, Listing | None]:
    """The labelled images to measure with: test, and val where there are both."""
    left_out = LeftOut()
    try:
        where = parts_of(folder, left_out)
        names, test = listing(where.get("test", where["train"]), left_out)
        val = listing(where["val"], left_out, names)[1] if "val" in where and "test" in where else None
    except UserError as error:
        raise UserError(str(error).replace("dataset.root", "dataset.probe")) from error
    for _, labels in (test, *([val] if val else [])):
        single = [names[number] for number in (torch.bincount(labels) == 1).nonzero()[:, 0].tolist()]
        alone = f"an image is named by the others, and {some(single, 5)} has one"
        allowed = f"a folder with two images or more of each class: {alone}"
        require(not single, "dataset.probe", str(folder), allowed)
    left_out.tell(folder)
    return test, val
