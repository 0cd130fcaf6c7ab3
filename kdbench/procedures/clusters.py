"""Which classes a network confuses: groups of classes for specialists, from its predictions alone."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from kdbench.engine.options import require


def confusable_classes(predictions: Tensor, clusters: int, size: int | None = None, seed: int = 0) -> list[list[int]]:
    """Groups of classes that are often predicted together (Hinton et al. 2015, section 5.3); needs no true labels.

    predictions [N, C] probabilities. K-means on the columns of their covariance matrix [C, C]. `size` null: the
    clusters themselves, which part all classes; a number: for each centre the `size` classes whose columns are nearest
    to it, so that groups may overlap and classes be in none (the paper has such groups but not how they are made).
    Groups in the order of their first class; equal groups count once.
    """
    classes = predictions.shape[1]
    require(
        2 <= clusters <= classes,
        "procedure.specialists",
        clusters,
        f"from 2 to the number of classes, {classes}",
    )
    fits = size is None or 1 <= size < classes
    require(fits, "procedure.size", size, f"null or from 1 to {classes - 1}, one less than the classes")
    columns = torch.cov(predictions.cpu().double().T).numpy()
    found = KMeans(clusters, n_init=10, random_state=seed).fit(columns)
    if size is None:
        groups = [[c for c in range(classes) if found.labels_[c] == group] for group in range(clusters)]
    else:
        centres = torch.from_numpy(found.cluster_centers_)
        near = torch.cdist(centres, torch.from_numpy(columns)).argsort(dim=1, stable=True)[:, :size]
        groups = [sorted(row.tolist()) for row in near]
    return sorted({tuple(group): group for group in groups if group}.values())
