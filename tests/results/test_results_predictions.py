"""Kept predictions: written and read, believed only where they fit, and what verdicts make of them."""

from __future__ import annotations

import io
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kdbench.errors import UserError
from kdbench.results.predictions import Predictions, predictions, read_predictions, right
from kdbench.results.read import read_runs
from kdbench.results.rows import compare
from kdbench.results.verdicts import against
from tests.support.results import result, write

IMAGES = 400


def keep(folder: Path, hit: np.ndarray, tau: int, seed: int = 0, label: np.ndarray | None = None) -> None:
    """A run that has the images of `hit` right."""
    write(folder, result(float(hit.mean()), loss__tau=tau, seed=seed, images={"test": len(hit)}))
    label = np.arange(len(hit)) % 10 if label is None else label
    predictions(label, np.where(hit, label, (label + 1) % 10), np.full(len(hit), 0.8)).write(folder)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two temperatures with four seeds: the second has two images more in every seed, of which others differ a lot."""
    random = np.random.default_rng(0)
    for seed in range(4):
        easy = random.random(IMAGES) < 0.5
        other = ~easy
        other[np.flatnonzero(easy)[: int(easy.sum()) - (IMAGES - int(easy.sum())) + 2]] = True
        keep(tmp_path / f"1-{seed}", easy, 1, seed)
        keep(tmp_path / f"4-{seed}", other, 4, seed)
    return tmp_path


def test_what_is_written_is_read(tmp_path):
    probability = np.array([0.0, 1 / 255, 0.5, 2 / 3, 1.0])
    kept = predictions(np.arange(5), np.arange(5)[::-1], probability, np.full(5, 299))
    kept.write(tmp_path)
    read = read_predictions(tmp_path)
    assert read is not None and all(np.array_equal(a, b) for a, b in zip(kept, read, strict=True))
    assert read.label.dtype == np.int16 and read.confidence.tolist() == [1, 1, 128, 170, 255]
    assert [(level - 1) // 17 for level in read.confidence.tolist()][2:] == [7, 9, 14]  # as ceil(15 p) - 1 has it
    first = (tmp_path / "predictions.npz").read_bytes()
    time.sleep(0.01)
    kept.write(tmp_path)
    assert (tmp_path / "predictions.npz").read_bytes() == first
    small = predictions(np.array([-1, 127]), np.array([0, 1]), np.array([0.5, 0.5]))
    assert small.label.tolist() == [-1, 127] and small.label.dtype == np.int8 and small.teacher is None


def test_ten_thousand_images_are_small_and_quick(tmp_path):
    random = np.random.default_rng(0)
    label = random.integers(100, size=10_000)
    kept = predictions(label, label, random.random(10_000), label)
    kept.write(tmp_path)
    assert (tmp_path / "predictions.npz").stat().st_size < 45_000
    start = time.process_time()
    for _ in range(20):
        read_predictions(tmp_path)
    assert (time.process_time() - start) / 20 < 0.01


def _huge() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("label.npy", bytes(9_000_000))
    return stream.getvalue()


def _saved(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not a zip", _huge(), _saved(label=np.zeros(3)), _saved(label=np.zeros(3, int), answer=np.zeros(2, int)),
        _saved(label=np.zeros(2, int), answer=np.zeros(2, int), confidence=np.array([None, 1], dtype=object)),
        _saved(label=np.zeros(2, int), answer=np.zeros(2, int), confidence=np.zeros(2, np.uint8))[:-40],
    ],
)  # fmt: skip
def test_what_is_damaged_or_foreign_is_named(tmp_path, content):
    (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"predictions.npz: no predictions of kdbench"):
        read_predictions(tmp_path)


def test_predictions_count_only_where_they_are_the_results_own(sweep):
    runs = [run for run in read_runs([sweep]).runs if run.folder.name.startswith("1-")]
    found = right(runs)
    assert found is not None
    assert found.share.mean() == pytest.approx(np.mean([run.result.last["test/top1"] for run in runs]))
    (sweep / "1-0" / "predictions.npz").unlink()
    assert right(runs) is None
    keep(sweep / "other", np.zeros(IMAGES, bool), 9)
    (sweep / "other" / "predictions.npz").rename(sweep / "1-0" / "predictions.npz")  # another run's
    assert right(runs) is None


def test_the_test_sets_own_chance_is_a_verdict_of_its_own(run_compare, sweep):
    found = compare(read_runs([sweep]).runs, ["last"])
    (one,) = against(found.rows, next(row for row in found.rows if row.differs["loss.tau"] == 1), "last").versus
    assert one.images is not None and one.images.high > one.judged.high and one.images.low < one.judged.low
    _, out, _ = run_compare(sweep, "--against", "loss.tau=1")
    head, titles, row = out.splitlines()[-3:]
    assert head.count("on this test set") == 1 and "on such images: over seeds and test images" in head
    assert titles.rstrip().endswith("on such images") and row.count("CANNOT BE TOLD") >= 1
    assert row.rstrip().endswith("(takes more test images)") or "would do" in row
    told = json.loads(run_compare(sweep, "--against", "loss.tau=1", "--json")[1])["verdicts"]["of"][0]
    assert told["on_such_images"]["alone"]["fixed"] > 0 and told["alone"]["fixed"] == 0
    other = json.loads(run_compare(sweep, "--metric", "test/nll", "--json")[1])["verdicts"]["of"][0]
    assert "on_such_images" not in other


def test_of_two_single_runs_mcnemar(run_compare, tmp_path):
    hit = np.zeros(IMAGES, bool)
    hit[:300] = True
    better = hit.copy()
    better[300:310] = True
    keep(tmp_path / "a", hit, 1)
    keep(tmp_path / "b", better, 4)
    _, out, _ = run_compare(tmp_path, "--against", "loss.tau=1")
    assert "TOO FEW RUNS (a verdict takes 3); these networks on such images: p = 0.00098 (McNemar)" in out


def test_another_test_set_is_compared_by_seeds_alone(sweep):
    for seed in range(4):
        path = sweep / f"4-{seed}" / "predictions.npz"
        kept = read_predictions(path.parent)
        Predictions(kept.label[::-1], kept.answer[::-1], kept.confidence).write(path.parent)
    found = compare(read_runs([sweep]).runs, ["last"])
    assert against(found.rows, found.rows[0], "last").versus[0].images is None


def test_damaged_predictions_are_said(run_compare, sweep):
    (sweep / "1-0" / "predictions.npz").write_bytes(b"x")
    code, out, err = run_compare(sweep)
    assert code == 0 and "on this test set" in out and "1-0/predictions.npz: no predictions of kdbench" in err
