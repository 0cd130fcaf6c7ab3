"""What embeddings are worth, measured on a few labelled images that nothing was trained on."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
_TEMPERATURE = 0.07
_RIDGES = (1e-4, 1e-2, 1.0, 100.0)  # times the mean squared length of an embedding


def measure_embeddings(embeddings: Tensor, label: Tensor, teacher: Tensor | None = None) -> dict[str, float]:
    """Embeddings [N, D] of images with labels [N] (-1: none), and the teacher's [N, D] of the same images.

    knn: share that the nearest others name rightly; linear: that a linear probe does, each image left out of its own;
    cosine: the mean cosine similarity to the teacher's. NaN of embeddings that are no finite numbers: their neighbours
    would be anyone, and no probe can be fitted.
    """
    known = label >= 0
    values: dict[str, Tensor] = {}
    if known.sum() > 1 and not embeddings.isfinite().all():
        values = dict.fromkeys(("knn", "linear"), embeddings.new_tensor(math.nan))
    elif known.sum() > 1:
        own, names = embeddings[known].float(), label[known]
        values["knn"] = (nearest_classes(own, names) == names).float().mean()
        values["linear"] = (probed_classes(own, names) == names).float().mean()
    if teacher is not None:
        values["cosine"] = F.cosine_similarity(embeddings.float(), teacher.float(), dim=1).mean()
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}


def nearest_classes(embeddings: Tensor, label: Tensor) -> Tensor:
    """The class [N] that the nearest other images of each vote for: embeddings [N, D], labels [N].

    Weighted k-nearest neighbours as Wu et al. 2018 (section 3.4) and DINO (Caron et al. 2021): cosine similarity, the
    20 nearest (fewer of smaller sets), each with weight exp(similarity / 0.07).
    """
    unit, classes, found = F.normalize(embeddings, dim=1), int(label.max()) + 1, []
    count = min(NEIGHBOURS, len(label) - 1)
    for first in range(0, len(unit), 1024):  # a block of the similarities at a time
        near = unit[first : first + 1024] @ unit.T
        near.diagonal(first).fill_(float("-inf"))  # an image is no neighbour of itself
        similarity, which = near.topk(count, dim=1)
        votes = torch.zeros(len(near), classes, device=unit.device)
        found.append(votes.scatter_add_(1, label[which], (similarity / _TEMPERATURE).exp()).argmax(1))
    return torch.cat(found)


def probed_classes(embeddings: Tensor, label: Tensor) -> Tensor:
    """The class [N] that a linear probe gives each image without having seen it: embeddings [N, D], labels [N].

    Ridge regression on the classes' indicators, whose answers with one image left out follow from one solution (Allen
    1974): y_i - r_i / (1 - h_ii). The ridge is the one of four with the least error left out. In float64.
    """
    if embeddings.device.type == "mps":  # which has no float64
        return probed_classes(embeddings.cpu(), label.cpu()).to(embeddings.device)
    x = embeddings.double()
    x = torch.cat([x - x.mean(0), x.new_ones(len(x), 1)], 1)
    y = F.one_hot(label).double()
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    scale, projected = s.square().sum() / len(x), u.T @ y
    best, answer = None, label
    for ridge in _RIDGES:
        shrunk = (s.square() / (s.square() + ridge * scale))[:, None]
        leverage = (u.square() @ shrunk).clamp(max=1 - 1e-9)
        without = y - (y - u @ (shrunk * projected)) / (1 - leverage)
        error = (y - without).square().sum()
        if best is None or bool(error < best):
            best, answer = error, without.argmax(1)
    return answer
