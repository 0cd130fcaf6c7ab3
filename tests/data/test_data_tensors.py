"""Files of vectors, frames and tables: every form gives the same data, and what cannot be is refused by name."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import kdbench
from kdbench.data.load import load_bundle
from kdbench.deploy.prediction import predictions
from kdbench.errors import UserError
from kdbench.types import VectorInfo
from tests.support.procedures import result, train

LABELS = np.arange(60) % 3
NAMES = np.array(["cat", "ape", "bee"])[LABELS]
INPUTS = np.random.default_rng(0).normal(size=(60, 4)) + 5 * np.eye(4)[LABELS]


def load(root: str | Path | None, **keys):
    return load_bundle("tensors", "kdbench.data.readers.tensors.tensors", root and str(root), "cache", **keys)


def npz(name: str = "x.npz", **arrays: object) -> Path:
    np.savez(name, **arrays)  # type: ignore[arg-type]
    return Path(name)


def csv(name: str, inputs: np.ndarray = INPUTS, labels: np.ndarray = NAMES, separator: str = ",") -> Path:
    head = separator.join(["a", "b", "c", "d", "label"])
    rows = [separator.join([*(repr(float(v)) for v in row), f'"{label}"']) for row, label in zip(inputs, labels)]
    Path(name).write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return Path(name)


def test_every_kind_of_file_gives_the_same_data():
    tensors = {"inputs": torch.from_numpy(INPUTS), "labels": torch.from_numpy(LABELS)}
    torch.save(tensors, "x.pt")
    save_file(tensors, "x.safetensors")
    named = [load(npz(x=INPUTS, y=NAMES)), load(csv("x.csv")), load(csv("y.csv", separator=";"))]
    numbered = [load("x.pt"), load("x.safetensors"), load(csv("x.tsv", labels=LABELS, separator="\t"))]
    for data in [*named, *numbered]:
        assert data.info == VectorInfo(3, 4) and (len(data.train), len(data.test)) == (48, 12)
        assert data.train.inputs.dtype == torch.float32
        assert torch.bincount(data.test.labels).tolist() == [4, 4, 4]
    assert {data.classes for data in named} == {("ape", "bee", "cat")}
    assert {data.classes for data in numbered} == {("0", "1", "2")}
    assert len({data.fingerprint for data in numbered}) == 1
    mean = (named[0].train.inputs.double().mean(0), named[0].train.inputs.double().std(0, correction=0))
    assert named[0].mean == pytest.approx(mean[0].tolist()) and named[0].std == pytest.approx(mean[1].tolist())


def test_parquet():
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {name: INPUTS[:, i] for i, name in enumerate("abcd")}
    pq.write_table(pyarrow.table({**columns, "label": NAMES}), "x.parquet")
    assert load("x.parquet").fingerprint == load(csv("x.csv")).fingerprint


def test_parquet_says_what_it_takes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    Path("x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"x.parquet: reading .parquet takes pyarrow: pip install 'kdbench\[parquet\]'"):
        load("x.parquet")


def test_a_set_aside_part_is_always_the_same_and_is_said(caplog):
    caplog.set_level(logging.INFO, "kdbench")
    root = npz(inputs=INPUTS, labels=LABELS)
    data = load(root, val=6)
    assert "no test set in the data: 12 of 60 samples set aside for it, stratified by class" in caplog.text
    assert "no val set in the data: 6 of 48 samples" in caplog.text
    assert (len(data.train), len(data.val), len(data.test)) == (42, 6, 12)
    assert torch.equal(load(root).test.inputs, data.test.inputs)


def test_parts_of_a_file_and_of_a_folder():
    arrays = {"x_train": INPUTS[:40], "y_train": LABELS[:40], "x_test": INPUTS[40:], "y_test": LABELS[40:]}
    data = load(npz(**arrays, x_val=INPUTS[:6], y_val=LABELS[:6]))
    assert (len(data.train), len(data.val), len(data.test)) == (40, 6, 20)
    keys = {"inputs": "x_test", "labels": "y_test", "test_inputs": "x_train", "test_labels": "y_train"}
    turned = load(npz(**arrays), keys=keys)
    assert (len(turned.train), len(turned.test)) == (20, 40)
    Path("folder").mkdir()
    csv("folder/train_set.csv", INPUTS[:40], NAMES[:40]), csv("folder/Test.csv", INPUTS[40:], NAMES[40:])
    found = load("folder")
    assert torch.equal(found.test.inputs, data.test.inputs) and len(found.train) == 40


def test_columns_and_arrays_are_joined():
    data = load(npz(a=INPUTS[:, :3], b=INPUTS[:, 3], label=LABELS), keys={"inputs": ["a"]})
    assert data.info.dimensions == 3
    table = load(csv("x.csv"), keys={"inputs": ["d", "a"]})
    assert torch.equal(table.train.inputs[:, 1], load("x.csv").train.inputs[:, 0])


def shuffled(path: str, order: list[str]) -> Path:
    """The table of `csv` with its columns in another order, or some of them alone."""
    head, *rows = [line.split(",") for line in Path(path).read_text(encoding="utf-8").splitlines()]
    lines = [",".join(row[head.index(name)] for name in order) for row in [head, *rows]]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)


def test_columns_of_a_test_table_are_found_by_name():
    Path("folder").mkdir()
    csv("folder/train.csv", INPUTS[:40], NAMES[:40]), csv("folder/test.csv", INPUTS[40:], NAMES[40:])
    straight = load("folder")
    shuffled("folder/test.csv", ["d", "label", "b", "a", "c"])
    data = load("folder")
    assert data.columns == ("a", "b", "c", "d") and torch.equal(data.test.inputs, straight.test.inputs)
    shuffled("folder/test.csv", ["d", "label", "a"])
    with pytest.raises(UserError, match=r"test.csv: there is no column b and 1 more, which the network is trained on"):
        load("folder")
    shuffled("folder/train.csv", ["a", "d", "label"])  # what the training table lacks is left out
    csv("folder/test.csv", INPUTS[40:], NAMES[40:])
    assert torch.equal(load("folder").test.inputs, straight.test.inputs[:, [0, 3]])


def test_labels_that_are_measurements_are_refused():
    with pytest.raises(UserError, match=r"dataset.keys.labels = 60 values in 60 rows: must be classes, of which each"):
        load(npz(x=INPUTS, y=np.arange(60) / 7))


def test_infinity_is_no_number_in_float16():
    INF = INPUTS.astype(np.float16)
    INF[7, 2] = np.inf
    with pytest.raises(UserError, match=r"1 of 240 inputs are no number up to 1e\+15, the first \(inf\) in row 7"):
        load(npz(x=INF, y=LABELS))


def test_frames_see_their_neighbours_within_their_group():
    frames = np.arange(12, dtype=np.int32)[:, None].repeat(2, 1) * [[1, 10]]
    groups = np.array([*"aaaabbbb", *"cccc"])
    root = npz(inputs=frames, labels=np.arange(12) % 2, utterances=groups)
    data = load(root, keys={"groups": "utterances"}, context=[2, 1], test=4)
    assert data.info == VectorInfo(2, 8) and len(data.test) == 4  # a whole utterance
    both = torch.cat([data.train.inputs, data.test.inputs])
    seen = {int(row[4]): row[0::2].int().tolist() for row in both}
    assert seen[0] == [0, 0, 0, 1] and seen[3] == [1, 2, 3, 3] and seen[4] == [4, 4, 4, 5] and seen[6] == [4, 5, 6, 7]
    assert {int(row[4]) // 4 for row in data.test.inputs}.isdisjoint({int(row[4]) // 4 for row in data.train.inputs})


def test_neighbours_without_groups_are_said(caplog):
    load(npz(inputs=INPUTS, labels=LABELS), context=[1, 1])
    assert "neighbours of test samples are in the training set: dataset.keys.groups" in caplog.text


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS - 1, ("-1", "0", "1")),
        (LABELS * 10.0, ("0", "10", "20")),
        (LABELS == 1, ("0", "1")),
        (LABELS[:, None], ("0", "1", "2")),
        (np.array(["2", "10", "1"])[LABELS], ("1", "2", "10")),
        (np.array(["01", "1", "2"])[LABELS], ("01", "1", "2")),
    ],
)  # fmt: skip
def test_labels_are_names(labels, classes, caplog):
    assert load(npz(inputs=INPUTS, labels=labels)).classes == classes
    assert ("label -1 is a class like any other" in caplog.text) == ("-1" in classes)  # elsewhere: a row without one


def changed(row: int, column: int, value: float) -> np.ndarray:
    inputs = INPUTS.copy()
    inputs[row, column] = value
    return inputs


HOSTILE = [
    ({"inputs": INPUTS, "labels": LABELS[:9]}, {}, r"x.npz: inputs has 60 rows, labels has 9"),
    ({"inputs": INPUTS[:, :, None], "labels": LABELS}, {}, r"shape \[60, 4, 1\]; vectors are .* so flatten"),
    ({"inputs": INPUTS[:, 0], "labels": np.eye(3)[LABELS]}, {}, r"labels has the shape \[60, 3\]; one number or name"),
    ({"inputs": changed(7, 2, np.nan), "labels": LABELS}, {}, r"1 of 240 inputs .* \(nan\) in row 7 of inputs, .* 2"),
    ({"inputs": changed(7, 2, 1e300), "labels": LABELS}, {}, r"\(1e\+300\) in row 7"),
    ({"inputs": INPUTS.astype(complex), "labels": LABELS}, {}, "inputs holds complex128, no numbers"),
    ({"inputs": NAMES, "labels": LABELS}, {}, "inputs holds text, no numbers"),
    ({"inputs": INPUTS.astype(object), "labels": LABELS}, {}, r"\(inputs\): it holds Python objects \(pickled\)"),
    ({"inputs": INPUTS, "labels": NAMES.astype(object)}, {}, r"\(labels\): it holds Python objects"),
    ({"inputs": INPUTS, "labels": LABELS + 0.5}, {}, "dataset.keys.labels = .*: must be one class a sample"),
    ({"inputs": INPUTS, "labels": np.zeros(60)}, {}, "dataset.keys.labels = 0: must be two classes or more"),
    ({"inputs": INPUTS, "labels": np.where(LABELS == 1, "", NAMES)}, {}, "nothing in 20 rows: must be one class"),
    ({"inputs": INPUTS}, {}, "dataset.keys.labels = null: must be a name; there is none of the usual ones"),
    ({"frames": INPUTS, "labels": LABELS}, {}, "dataset.keys.inputs = null: must be a name.* which has frames, labels"),
    ({"inputs": INPUTS, "labels": LABELS}, {"keys": {"inputs": "input"}}, "inputs = input: must be an array of"),
    ({"inputs": INPUTS, "labels": LABELS}, {"keys": {"input": "x"}}, "dataset.keys.input: there is no such key"),
    ({"inputs": INPUTS, "labels": LABELS}, {"test": 0.0}, "dataset.test = 0.0: must be above 0"),
    ({"inputs": INPUTS, "labels": LABELS}, {"context": [-1, 0]}, "context"),
    ({"inputs": INPUTS, "labels": LABELS, "x_test": INPUTS[:, :2], "y_test": LABELS}, {}, "test: the inputs have 2 "),
    ({"inputs": INPUTS, "labels": LABELS, "x_test": INPUTS, "y_test": LABELS + 1}, {}, r"the test set \(3\) are not"),
    ({"inputs": INPUTS, "labels": LABELS, "g": LABELS * 0}, {"keys": {"groups": "g"}}, "1 groups must not all be set"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "keys", "message"), HOSTILE)
def test_what_cannot_be_is_refused_by_name(arrays, keys, message):
    with pytest.raises(UserError, match=message):
        load(npz(**arrays), **keys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b,label\n1,2,x\n1,oops,y\n", "x.csv: cannot be read; dataset.keys.inputs lists .*oops.*row 1"),
        ("x.csv", "a,b,label\n1,2,x\n1,,y\n", "x.csv: cannot be read.*convert string ''"),
        ("x.csv", "a,b,label\n1,2,x\n1,y\n", "x.csv: cannot be read"),
        ("x.csv", "a,a,label\n1,2,x\n", "must name each column by a name of its own; 'a' is not"),
        ("x.csv", "1,2,3\n1,2,3\n", "must name the columns, and holds numbers"),
        ("x.csv", "a,b,label\n", "no rows below|cannot be read"),
        ("x.csv", "", "x.csv: it holds no arrays|cannot be read"),
        ("x.npz", "no archive", "x.npz: cannot be read"),
        ("x.pt", "no archive", "x.pt: cannot be read"),
        ("x.safetensors", "no archive", "x.safetensors: cannot be read"),
        ("x.txt", "1 2 3", "dataset.root = .*x.txt: must be a file that ends in .npz"),
    ],
)
def test_damaged_files_are_named(name, content, message):
    Path(name).write_text(content)
    with pytest.raises(UserError, match=message):
        load(name)


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_nothing_in_a_file_is_run():
    torch.save({"inputs": Harm(), "labels": torch.zeros(3)}, "x.pt")
    with pytest.raises(UserError, match=r"x.pt: cannot be read: it holds Python objects \(pickled\)"):
        load("x.pt")
    npz(inputs=np.array([Harm()], dtype=object), labels=LABELS[:1])
    with pytest.raises(UserError, match="pickled"):
        load("x.npz")
    assert not Path("harm").exists()


@pytest.mark.parametrize("root", [None, "nowhere.npz", "."])
def test_a_root_that_is_none_is_refused(root):
    with pytest.raises(UserError, match=f"dataset.root = {root or 'null'}: must be a file"):
        load(root)


def test_a_table_is_trained_on_end_to_end():
    words = ["dataset=tensors", f"dataset.root={csv('x.csv').resolve()}", "dataset.validation=0.2", "teacher=mlp"]
    words += ["student=mlp", "student.hidden=[5]", "teacher.hidden=[7]", "schedule.epochs=4", "schedule.batch_size=8"]
    words += [
        "teacher.schedule.epochs=8",
        "teacher.schedule.batch_size=8",
        "trainer.device=cpu",
        "trainer.progress=none",
    ]
    live = result(train(*words, "teacher.table=off", plain=True, out="live"))
    table = result(train(*words, "teacher.table=on", plain=True, out="table"))
    assert live["last"]["test/top1"] > 0.6 and table["student"] == live["student"]
    student = kdbench.load("table")
    straight, turned = (
        torch.stack([one.probabilities for one in predictions(student, path)])
        for path in (Path("x.csv"), shuffled("x.csv", ["c", "label", "a", "d", "b"]))
    )
    assert torch.equal(straight, turned)
    with pytest.raises(UserError, match=r"trained on the columns of dataset tensors, in their order.* input 0 of the"):
        train(*words, "teacher.run=table", plain=True, out="other")
    with pytest.raises(UserError, match=r"x.csv: there is no column a, which the network is trained on; it has c, d"):
        next(iter(predictions(student, shuffled("x.csv", ["c", "d", "b"]))))


TABLE = "".join(f"{n},{n % 3},{('pos', 'POS', 'neg')[n % 3]}\n" for n in range(30))


@pytest.mark.parametrize("inputs", [["a", "a"], ["a", "label"]])
def test_columns_that_say_the_label_or_themselves_twice_are_refused(inputs):
    Path("t.csv").write_text(f"a,target,label\n{TABLE}")
    with pytest.raises(UserError, match=r"keys.inputs = .*: must be names that differ, and none of what is no input"):
        load("t.csv", keys={"inputs": inputs})


def test_the_columns_that_are_taken_are_said_and_classes_that_differ_by_case_alone(caplog):
    Path("t.csv").write_text(f"a,target,label\n{TABLE}")
    with caplog.at_level("INFO", logger="kdbench"):
        load("t.csv")
    assert "t.csv: inputs a, target; not label (dataset.keys)" in caplog.text
    assert "the classes 'POS' and 'pos' differ by case or spaces alone" in caplog.text


def test_a_number_that_leaves_no_digit_to_the_others_is_refused():
    Path("t.csv").write_text(f"a,target,label\n1e37,0,neg\n{TABLE}")
    with pytest.raises(UserError, match=r"inputs are no number up to 1e\+15, the first \(1e\+37\) in row 0 of a"):
        load("t.csv")
