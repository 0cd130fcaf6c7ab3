"""What embeddings are worth: nearest neighbours and a linear probe, against plain loops and sklearn."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from kdbench.engine.embeddings import measure_embeddings, nearest_classes, probed_classes


def clusters(count=90, classes=3, spread=1.0, size=6):
    draw = torch.Generator().manual_seed(3)
    label = torch.arange(count) % classes
    centres = torch.randn(classes, size, generator=draw)
    return centres[label] + spread * torch.randn(count, size, generator=draw), label


def test_neighbours_vote_with_their_similarity():
    x, label = clusters()
    unit = torch.nn.functional.normalize(x, dim=1)
    got = nearest_classes(x, label)
    for i in range(0, 90, 7):
        near = sorted((-float(unit[i] @ unit[j]), j) for j in range(90) if j != i)[:20]
        votes = [sum(torch.tensor(-s / 0.07).exp().item() for s, j in near if label[j] == c) for c in range(3)]
        assert got[i] == max(range(3), key=votes.__getitem__)


def test_the_probe_leaves_each_image_out():
    x, label = clusters(30)
    got = probed_classes(x, label)
    centred = (x - x.mean(0)).double().numpy()
    scale = float((torch.linalg.svdvals(torch.cat([x - x.mean(0), torch.ones(30, 1)], 1).double()) ** 2).sum()) / 30
    y = torch.nn.functional.one_hot(label).double().numpy()
    errors = {}
    for ridge in (1e-4, 1e-2, 1.0, 100.0):
        with_one = torch.cat([torch.from_numpy(centred), torch.ones(30, 1)], 1).numpy()
        answers = []
        for i in range(30):
            rest = [j for j in range(30) if j != i]
            model = Ridge(ridge * scale, fit_intercept=False).fit(with_one[rest], y[rest])
            answers.append(torch.from_numpy(model.predict(with_one[i : i + 1]))[0])
        answers = torch.stack(answers)
        errors[float((torch.from_numpy(y) - answers).square().sum())] = answers.argmax(1)
    assert torch.equal(got, errors[min(errors)])


def test_good_embeddings_are_better_than_noise_and_unlabelled_images_do_not_count():
    x, label = clusters(spread=0.1)
    good = measure_embeddings(x, label, 2 * x)
    assert good["knn"] == good["linear"] == 1.0 and good["cosine"] == pytest.approx(1.0)
    noise = measure_embeddings(torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3)
    assert 0.2 < noise["knn"] < 0.5 and 0.2 < noise["linear"] < 0.5 and "cosine" not in noise
    part = label.clone()
    part[::2] = -1
    assert measure_embeddings(x, part)["knn"] == measure_embeddings(x[1::2], label[1::2])["knn"]
    assert measure_embeddings(x, torch.full((90,), -1)) == {}


@pytest.mark.parametrize("count", [2, 3])
def test_a_handful_of_images_is_enough(count):
    found = measure_embeddings(torch.eye(count, 5), torch.arange(count) % 2)
    assert all(0 <= value <= 1 for value in found.values()) and set(found) == {"knn", "linear"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_finite_number_has_no_neighbours(bad):
    x, label = clusters(30)
    x[4, 2] = bad
    assert all(value != value for value in measure_embeddings(x, label, x).values())
