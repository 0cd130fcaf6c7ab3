"""Survey of a dataset as it was read: what is said before a number is made of it that means less than it seems to.

Images without content, equal images under different labels, test images that are training images too, and published
sets that are not whole. Sets in memory are looked at whole, of streamed sets a sample, once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdbench.data.bundle import ImageFiles, Inputs, Source, fingerprint, statistics
from kdbench.data.cache import keep
from kdbench.data.decode import read_images
from kdbench.data.pixels import Marked
from kdbench.data.sampling import torch_generator

log = logging.getLogger("kdbench")
SAMPLE = 4000  # images that tell a streamed set's mean and std: to 0.005, in half a minute of one core for ImageNet
_COMPARED = 1000  # test files of a streamed set that are looked for in the training set
_OPENED = 20_000  # training files of their sizes that are opened for it: a second
_CHUNK = 1024  # rows that are hashed at once: temporaries stay in the cache


class Findings(NamedTuple):
    """Numbers of images: what a survey has to say."""

    constant: int  # training images of one colour throughout
    crossed: int  # training images that another class holds too
    trained: int  # held-out images that are training images too
    looked_at: tuple[int, int]  # training and held-out images that were looked at


def survey(name: str, source: Source, cache: str) -> Source:
    """Say what is wrong with a set. Returns it with what was measured on the way: of a streamed set its mean and std.

    Costs one pass over images in memory (0.12 s for CIFAR-10 on one core); of a streamed set what it finds is kept in a
    small file below `cache`.
    """
    _complete(name, source)
    if isinstance(source.inputs, ImageFiles):
        source, found = _streamed(name, source, cache)
    elif isinstance(source.test_inputs, Tensor) and source.test_inputs.dtype == source.inputs.dtype:
        found = _resident(source.inputs, source.labels, source.test_inputs)
    else:
        return source
    pixels = isinstance(source.inputs, ImageFiles) or source.inputs.dtype == torch.uint8
    _tell(name, found, (len(source.labels), len(source.test_labels)), "images" if pixels else "samples")
    return source


def _complete(name: str, source: Source) -> None:
    if source.published is None:
        return
    for part, labels, expected in zip(("training", "test"), (source.labels, source.test_labels), source.published):
        if len(labels) != expected:
            log.warning(
                "%s has %s %s images here, published are %s: what is measured on it is not comparable",
                name, f"{len(labels):,}", part, f"{expected:,}",
            )  # fmt: skip


def _tell(name: str, found: Findings, totals: tuple[int, int], what: str) -> None:
    """what: "images" or "samples"."""
    seen = [f"{n:,}{' looked at' if n < total else ''}" for n, total in zip(found.looked_at, totals)]
    if found.constant:
        log.warning("%s: %s of %s training images are constant: one colour, no content", name, found.constant, seen[0])
    if found.crossed:
        log.warning(
            "%s: %s of %s training %s are identical to one of another class: no network can tell them apart",
            name, f"{found.crossed:,}", seen[0], what,
        )  # fmt: skip
    if found.trained:
        log.warning(
            "%s: %s of %s test %s are also in the training set, %s: accuracy on them says nothing of new %s",
            name, f"{found.trained:,}", seen[1], what, "pixel for pixel" if what == "images" else "to the last bit",
            what,
        )  # fmt: skip


def _resident(images: Tensor, labels: Tensor, held_out: Tensor) -> Findings:
    constant = _constant(images) if images.dtype == torch.uint8 else 0
    images, held_out = (each if each.dtype == torch.uint8 else _bytes(each) for each in (images, held_out))
    train = row_hashes(images)
    trained = copies(images, train, held_out)
    mixed = crossed(train, labels) if labels.ndim == 1 else 0
    return Findings(constant, mixed, trained, (len(images), len(held_out)))


def _bytes(rows: Tensor) -> Tensor:
    """Vectors or token ids [N, ...] as uint8 [N, bytes]; -0.0 is 0.0."""
    rows = (rows + 0.0 if rows.is_floating_point() else rows).flatten(1).contiguous()
    return rows.view(torch.uint8)


def row_hashes(images: Tensor) -> Tensor:
    """A 64-bit hash of each row of uint8 [N, ...]: int64 [N]. Other bytes give another with certainty near 2^-60.

    Multiply-shift on 8 bytes at once (Dietzfelbinger 1996), summed: at the speed of memory, where a cryptographic hash
    a row would take seconds.
    """
    width = images[0].numel()
    words = (width + 7) // 8
    generator = torch_generator(0, "row hashes")
    weights = torch.randint(-(2**62), 2**62, (words,), generator=generator) * 2 + 1
    hashes = []
    for part in images.split(_CHUNK):
        flat = part.reshape(len(part), width)
        if width % 8:
            flat = torch.nn.functional.pad(flat, (0, words * 8 - width))
        # Odd multiplier and shift first: a difference in the highest byte alone would else reach few bits of the sum.
        mixed = flat.contiguous().view(torch.int64) * -7046029254386353131
        hashes.append(((mixed ^ (mixed >> 29)) * weights).sum(1))
    return torch.cat(hashes)


def copies(images: Tensor, hashes: Tensor, others: Tensor) -> int:
    """How many of `others` are the same as one of `images`, whose hashes are given; compared byte by byte."""
    if images.shape[1:] != others.shape[1:]:
        return 0
    order = hashes.argsort()
    wanted = row_hashes(others)
    place = torch.searchsorted(hashes[order], wanted).clamp(max=len(order) - 1)
    same = (hashes[order[place]] == wanted).nonzero()[:, 0]
    return sum(int((others[part] == images[order[place[part]]]).flatten(1).all(1).sum()) for part in same.split(_CHUNK))


def crossed(hashes: Tensor, labels: Tensor) -> int:
    """How many rows have the hash of a row with another label."""
    _, group = torch.unique(hashes, return_inverse=True)
    known, count = labels.long(), int(group.max()) + 1
    least = torch.full((count,), 2**62).scatter_reduce(0, group, known, "amin")
    most = torch.full((count,), -1).scatter_reduce(0, group, known, "amax")
    return int((least[group] != most[group]).sum())


def _constant(images: Tensor) -> int:
    """Rows whose channels are one value each. Only the few whose first pixels are equal are looked at whole."""
    flat = images.flatten(2)
    maybe = (flat[:, :, :8] == flat[:, :, :1]).all(2).all(1).nonzero()[:, 0]
    return sum(int((flat[part] == flat[part, :, :1]).all(2).all(1).sum()) for part in maybe.split(_CHUNK))


def _streamed(name: str, source: Source, cache: str) -> tuple[Source, Findings]:
    """Mean, std and findings of a random sample of a streamed set, kept below `cache`."""
    files = source.inputs
    assert isinstance(files, ImageFiles)
    own = source.fingerprint or fingerprint(files)
    path = Path(cache) / f"{_survey_key(own, source)}.stats.json"
    try:
        mean, std, marked, found = json.loads(path.read_text())
        found, marked = Findings(*found), Marked(*marked)
    except FileNotFoundError:
        mean, std, marked, found = _measure(files, source, path)
    except (OSError, TypeError, ValueError):
        log.warning("%s is broken: measuring again", path)
        mean, std, marked, found = _measure(files, source, path)
    marked.tell(name, f"{found.looked_at[0]:,} images looked at", files.background)
    return source._replace(fingerprint=own, stats=(tuple(mean), tuple(std))), found


def _survey_key(own: str, source: Source) -> str:
    held_out = source.test_inputs
    digest = hashlib.sha256(own.encode())
    digest.update(source.labels.numpy().tobytes())
    digest.update(fingerprint(held_out).encode() if isinstance(held_out, ImageFiles) else b"")
    return digest.hexdigest()[:32]


def _measure(
    files: ImageFiles, source: Source, path: Path
) -> tuple[tuple[float, ...], tuple[float, ...], Marked, Findings]:
    rows = torch.randperm(len(files.paths), generator=torch_generator(0, "statistics"))[:SAMPLE]
    images, marked = read_images(files[rows])
    mean, std = statistics(images)
    trained, compared = _file_copies(files, source.test_inputs)
    looked_at = (len(images), compared)
    found = Findings(_constant(images), crossed(row_hashes(images), source.labels[rows]), trained, looked_at)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path, lambda partial: partial.write_text(json.dumps([mean, std, marked, found])))
    except OSError as error:
        log.warning("cannot keep %s (%s): it is measured each time", path, error)
    return mean, std, marked, found


def _file_copies(train: ImageFiles, held_out: Inputs) -> tuple[int, int]:
    """How many of a sample of held-out files are training files too, byte for byte, and how many were compared.

    Only files of equal size are opened; where many are of one size fewer are compared.
    """
    if not isinstance(held_out, ImageFiles):
        return 0, 0
    own = np.array([os.path.getsize(train.path(row)) for row in range(len(train.paths))])
    count = len(held_out.paths)
    sample = torch.randperm(count, generator=torch_generator(0, "copies"))[:_COMPARED].tolist()
    sizes = {row: os.path.getsize(held_out.path(row)) for row in sample}
    files_of = dict(zip(*(part.tolist() for part in np.unique(own, return_counts=True))))
    chosen: list[int] = []
    opened, total = set[int](), 0
    for row in sample:
        total += 0 if sizes[row] in opened else files_of.get(sizes[row], 0)
        if total > _OPENED:
            break
        opened.add(sizes[row])
        chosen.append(row)
    known = {_content(train.path(int(row))) for row in np.flatnonzero(np.isin(own, list(opened)))}
    return sum(_content(held_out.path(row)) in known for row in chosen), len(chosen)


def _content(path: str) -> bytes:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).digest()
