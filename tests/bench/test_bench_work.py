"""What is timed is the real training, and the plain loop that it is compared with does the same work."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from hydra import initialize_config_dir

from kdbench.bench import standin
from kdbench.bench.reference import PlainImages, PlainTexts, ReferenceLoop, _padded
from kdbench.bench.report import (
    LIVE,
    LOADER,
    OWN,
    TABLE,
    batches_alone,
    contender,
    data_text,
    endless,
    measure,
    measure_data,
    text,
    ways,
)  # fmt: skip
from kdbench.bench.workbench import prepare
from kdbench.commands import bench as bench_command
from kdbench.configure import construct
from kdbench.data.readers import fake
from kdbench.errors import UserError
from kdbench.paths import CONFIG_DIR
from kdbench.runs.folder import save_network


def students(bench, served, turns):
    learner = bench.learner()
    contender = bench.steps(served, [learner])
    for turn in turns:
        assert contender(turn) > 0
    return learner.distiller.state_dict()


@pytest.mark.parametrize("words", [(), ("trainer.limit_steps=3",)], ids=["whole epochs", "debug=short"])
def test_a_turn_trains_and_table_and_live_teacher_train_the_same(recipe, tmp_path, words):
    made = recipe(*words)
    bench = prepare(made, made.data(), tmp_path)
    fresh = bench.learner().distiller.state_dict()
    live, table = students(bench, bench.live(), [3, 9]), students(bench, bench.table(), [3, 9])  # an epoch has 4 steps
    for key, value in live.items():
        assert torch.equal(value, table[key]), key
    # Every step counted: 3 + 1, then 3 + 1 three times, where the step in front of each part is not timed.
    assert int(live["student.bn1.num_batches_tracked"]) == 16
    assert any(not torch.equal(value, live[key]) for key, value in fresh.items())


def test_a_loss_on_features_and_a_training_without_a_teacher_have_no_table(recipe, tmp_path):
    made = recipe("loss=at")
    bench = prepare(made, made.data(), tmp_path)
    assert bench.table() is None and list(ways(bench, 1)) == [LIVE]
    made = recipe("teacher=none", "loss=ce")
    bench = prepare(made, made.data(), tmp_path)
    found = ways(bench, 2)
    assert list(found) == ["no teacher", "2 students at once, no teacher"]
    assert all(contender(bench, way)(1) > 0 for way in found.values())


def test_an_ensemble_and_a_runs_own_network_are_timed_too(recipe, tmp_path):
    words = ["teacher=ensemble", "teacher.network=mlp", "teacher.members=[0,1]", "teacher.tau=1"]
    made = recipe(*words, without=("teacher",))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):  # for members, which are named
        bench = prepare(made, made.data(), tmp_path)
        plain = ReferenceLoop(made, made.data(), workers=0)
    batch = next(iter(bench.batches.epoch(0, 1)))
    members = torch.stack([member(batch.input).logits.softmax(1) for member in bench.teacher.network.members])
    torch.testing.assert_close(bench.teacher.teacher(batch).logits.softmax(1), members.mean(0))
    assert students(bench, bench.live(), [3]) and plain.turn(1) > 0
    run = tmp_path / "run"
    run.mkdir()
    save_network(run, recipe("student=mlp", "student.hidden=[7]").student, made.data())
    made = recipe(f"teacher.run={run}")
    assert prepare(made, made.data(), tmp_path).teacher.parameters == 3 * 64 * 7 + 7 + 7 * 4 + 4


def test_a_step_of_the_plain_loop_is_a_step_of_kdbench(recipe, tmp_path):
    """Same weights, same batch: the same loss and the same new weights, up to rounding (the teacher here is folded)."""
    made = recipe("schedule.warmup=0")
    bench = prepare(made, made.data(), tmp_path)
    learner, loop = bench.learner(), ReferenceLoop(made, made.data(), workers=0)
    loop.student.load_state_dict(learner.distiller.student.state_dict())
    loop.teacher.load_state_dict(bench.teacher.network.state_dict())
    batch = next(iter(bench.batches.epoch(0, 1)))
    learner.begin_epoch(0)
    learner.step(batch, bench.teacher.teacher(batch))
    loop.step(batch.input, batch.target.label, batch.target.row)
    assert loop.sums[0] == pytest.approx(learner.meters.read()[0]["loss"], rel=1e-4)
    assert loop.sums[1] == pytest.approx(learner.meters.read()[0]["top1"])
    ours, plain = learner.distiller.student.state_dict(), loop.student.state_dict()
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_the_plain_loop_prepares_the_same_images_one_by_one(recipe):
    made = recipe()
    data = made.data()
    plain = PlainImages(data)
    plain.transform.transforms = plain.transform.transforms[-2:]  # without the random crop and mirroring
    image, label, row = plain[5]
    mean, std = (torch.tensor(value)[:, None, None] for value in (data.mean, data.std))
    expected = (data.transfer.inputs[5].float() / 255 - mean) / std
    torch.testing.assert_close(image, expected)
    assert (label, row) == (int(data.transfer.labels[5]), 5)
    assert ReferenceLoop(made, data, workers=0).turn(5) > 0
    with pytest.raises(UserError, match="loss=at"):
        ReferenceLoop(recipe("loss=at"), data, workers=0)


def test_the_plain_loop_pads_texts_to_the_longest_of_their_batch(recipe):
    texts = ["dataset=udhr", "dataset.subset=64", "student=text_cnn_small", "teacher=text_cnn_small"]
    made = recipe(*texts, without=("dataset", "student", "teacher"))
    data = made.data()
    plain = PlainTexts(data)
    ids, labels, rows = _padded([plain[3], plain[5]])
    whole = data.transfer.inputs[[3, 5]]
    assert ids.shape == (2, int((whole != 0).sum(1).max())) and torch.equal(ids, whole[:, : ids.shape[1]])
    assert labels.tolist() == data.transfer.labels[[3, 5]].tolist() and rows.tolist() == [3, 5]
    assert ReferenceLoop(made, data, workers=0).turn(2) > 0
    with pytest.raises(UserError, match=r"dataset.teacher_tokenizer = words"):
        other = recipe(*texts, "dataset.teacher_tokenizer=words", without=("dataset", "student", "teacher"))
        ReferenceLoop(other, other.data(), workers=0)


def test_a_report_has_every_figure_as_plain_values_and_as_text(recipe, tmp_path):
    made = recipe("schedule.batch_size=32")  # as many as a teacher computes at once on a CPU
    bench = prepare(made, made.data(), tmp_path)
    ours = {name: contender(bench, way) for name, way in ways(bench, 2).items()}
    result = measure(bench, ours, {"plain loop": lambda steps: 0.1 * steps}, budget=0.0, members=2, quick=True)
    assert json.loads(json.dumps(result)) == result
    assert set(result["steps"]) == {
        TABLE,
        LIVE,
        f"2 students at once, {TABLE}",
        f"2 students at once, {LIVE}",
        "plain loop",
    }
    assert result["steps"]["plain loop"]["median"] == pytest.approx(0.1)
    alone = result["ratios"][f"plain loop / {LIVE}"]
    assert alone["median"] == pytest.approx(0.1 / result["steps"][LIVE]["median"], rel=0.9)
    assert result["ratios"][f"plain loop / 2 students at once, {LIVE}"]["times"] == 2
    # Three times the forward's operations, but for the gradient of the images, which nobody needs.
    forward = result["cost"]["teacher"]["flops"]
    assert 2.5 * forward < result["cost"]["student"]["flops"] < 3 * forward
    shown = text(result)
    for word in ("student backward", "optimizer", "evaluation of 32 images", "GFLOP", "GB/s", "peak memory", "n = 3"):
        assert word in shown, word


DATASETS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(Path(CONFIG_DIR, "dataset").glob("*.yaml"))}


def test_every_dataset_that_may_be_absent_has_a_stand_in():
    embedded, own = ("digits", "fake", "gaussian", "udhr", "shakespeare"), ("imagefolder", "tensors", "photos", "text")
    here = {*embedded, *own, "corpus", "torch_dataset"}
    readers = {
        node["reader"].rpartition(".")[2] for name, node in DATASETS.items() if name not in here and "reader" in node
    }
    assert readers == set(standin.SHAPES)
    assert standin.stand_in({"reader": f"{fake.__name__}.fake"}) is None


@pytest.mark.parametrize("name", ["cifar100", "mnist", "tiny_imagenet"])
def test_a_stand_in_has_the_shapes_of_the_real_images(recipe, monkeypatch, name):
    monkeypatch.setattr(standin, "MOST", 4 << 20)
    node = recipe(f"dataset={name}", "dataset.validation=0.1", without=("dataset",)).record.tree["dataset"]
    train, test, classes, channels, side = standin.SHAPES[name]
    data = construct(standin.stand_in(node), "dataset")
    assert data.info == (classes, channels, side)
    count = data.train.inputs.shape[0] + data.val.inputs.shape[0]
    assert count / data.test.inputs.shape[0] == pytest.approx(train / test, rel=0.02)
    assert (count + len(data.test.labels)) * channels * side**2 <= 4 << 20
    assert data.augment.views is not None


def test_batches_alone_are_timed_beside_a_dataloader_after_those_made_between_turns(recipe):
    taken: list[int] = []
    turn = batches_alone((taken.append(number) or number for number in itertools.count()), lambda: None, 5)
    assert turn(3) > 0 and taken == list(range(8))
    made = recipe()
    data = made.data()
    for serve in ("batches", "loader"):
        options, _ = bench_command._parse([f"--serve={serve}", "--workers=0"])
        assert bench_command._alone(made, data, options)(9) > 0  # two epochs and one batch
    stream = endless(lambda number: [number] * 2)
    assert list(itertools.islice(stream, 5)) == [0, 0, 1, 1, 2]
    result = measure_data({OWN: lambda steps: 0.01 * steps, LOADER: lambda steps: 0.03 * steps}, 64, 0.0)
    assert result["ratios"][f"{LOADER} / {OWN}"]["median"] == pytest.approx(3.0)
    assert result["batches"][OWN]["images_per_second"] == pytest.approx(6400)
    shown = data_text(result, "images")
    assert "10.00 (10.00 to 10.00)    3      6,400" in shown and "3.00 (3.00 to 3.00), n = 3" in shown
