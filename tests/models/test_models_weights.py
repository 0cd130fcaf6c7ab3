"""Files of weights: every usual layout loads strictly, everything else is a message that says what is wrong."""

from __future__ import annotations

import argparse
import random
import tracemalloc
import zipfile
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kdbench.errors import UserError
from kdbench.models.names import plain_names
from kdbench.models.weights import load_into, read_weights, weight_hash
from tests.support.models import build, fill

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    network = build("resnet8", classes=10)
    fill(network.state_dict())
    return dict(network.state_dict())


def _layouts(state: State) -> dict[str, Any]:
    wrapped = {f"module.{name}": value for name, value in state.items()}
    compiled = {f"_orig_mod.module.{name}": value for name, value in state.items()}
    student = {f"module.student.{name}": value for name, value in state.items()}
    teacher = {f"module.teacher.{name}": value + 1 for name, value in state.items()}
    options = argparse.Namespace(lr=0.05, lr_decay_epochs=[150, 180, 210], model="resnet8", kd_T=4.0)
    return {
        "plain": state,
        "DataParallel": wrapped,
        "torch.compile": compiled,
        "RepDistiller best": {"epoch": 3, "model": state, "best_acc": torch.tensor(72.1), "optimizer": {"state": {}}},
        "RepDistiller last": {"opt": options, "model": state},
        "mdistiller student": {"model": state},
        "mdistiller latest": {"model": {**student, **teacher, "module.conv_reg.weight": torch.zeros(1)}, "epoch": 1},
        "timm": {"arch": "resnet8", "state_dict": state, "metric": np.float64(71.5), "args": options},
        "Lightning": {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 2},
        "net": {"net": wrapped, "acc": np.float32(93.5)},
        "nested": {"model": {"state_dict": state}},
        "only an average": {"epoch": 3, "state_dict_ema": {f"module.{name}": value for name, value in state.items()}},
        "AveragedModel": {"n_averaged": torch.tensor(9), **wrapped},
        "FSDP": {f"_fsdp_wrapped_module.{name}": value for name, value in state.items()},
        "without counters": {name: value for name, value in state.items() if not name.endswith("tracked")},
    }


@pytest.mark.parametrize("order", list(permutations(("module", "_orig_mod", "model", "net"), 3)), ids=".".join)
def test_wrappers_are_peeled_in_any_order_and_depth(order: tuple[str, ...], state: State) -> None:
    network = build("resnet8", classes=10)
    load_into(network, plain_names({f"{'.'.join(order)}.{name}": value for name, value in state.items()}), "file")
    assert weight_hash(network.state_dict()) == weight_hash(state)


def test_a_compiled_stage_and_the_loss_beside_a_network_are_peeled(state: State) -> None:
    stage = next(name.split(".")[0] for name in state if name.count(".") > 2)
    for word in ("_orig_mod", "module", "_checkpoint_wrapped_module"):
        parts = {f"model.{name.replace(f'{stage}.', f'{stage}.{word}.', 1)}": value for name, value in state.items()}
        beside = {"criterion.weight": torch.ones(10), "loss.fn.weight": torch.ones(10), "n_averaged": torch.tensor(3)}
        network = build("resnet8", classes=10)
        load_into(network, plain_names({**parts, **beside}), "file")
        assert weight_hash(network.state_dict()) == weight_hash(state)


def test_wrappers_are_never_guessed(state: State) -> None:
    """Two networks side by side, a tensor too many, one shape: each is refused, whatever could be peeled."""
    model = {f"model.{name}": value for name, value in state.items()}
    last = next(reversed(state))
    for extra in (
        {f"ema_model.{name}": value for name, value in state.items()},
        {"head.weight": torch.ones(2)},
        {f"model.{last}": torch.ones(3, 3, 3)},
    ):
        with pytest.raises(UserError, match="not the weights of this network"):
            load_into(build("resnet8", classes=10), plain_names({**model, **extra}), "file")


def _several(state: State) -> dict[str, Any]:
    other = {name: value + 1 for name, value in state.items()}
    both = {f"model.{name}": value for name, value in state.items()}
    both |= {f"ema_model.{name}": value for name, value in other.items()}
    average = {"n_averaged": torch.tensor(4), **{f"module.{name}": value for name, value in other.items()}}
    return {
        "state_dict_ema": {"arch": "x", "state_dict": state, "state_dict_ema": average},
        "model_ema": {"model": state, "model_ema": average, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        "model.ema": {"model": {"state_dict": state, "ema": average}},
        "ema_model": {"state_dict": both},
    }


@pytest.mark.parametrize("key", sorted(_several({"a": torch.zeros(1)})))
def test_a_key_chooses_among_the_weights_of_a_file(key: str, state: State, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    torch.save(_several(state)[key], tmp_path / "last.pth")
    chosen = read_weights(tmp_path / "last.pth", key)
    assert weight_hash(chosen) == weight_hash({name: value + 1 for name, value in state.items()})
    if key != "ema_model":  # two networks in one state_dict: nothing is taken without the key
        assert weight_hash(read_weights(tmp_path / "last.pth")) == weight_hash(state)
        assert f"also has {key} (teacher.checkpoint_key)" in caplog.text
    with pytest.raises(UserError, match=r"last\.pth: has no weights under checkpoint_key = best; it has: .+"):
        read_weights(tmp_path / "last.pth", "best")


def test_the_only_file_of_a_folder_is_taken_and_several_are_named(state: State, tmp_path: Path) -> None:
    torch.save({"model": state}, tmp_path / "student_best")
    (tmp_path / "worklog.txt").write_text("...")
    assert weight_hash(read_weights(tmp_path)) == weight_hash(state)
    torch.save({"model": state}, tmp_path / "student_latest")
    with pytest.raises(UserError, match="it has 2: student_best, student_latest"):
        read_weights(tmp_path)


def test_a_folder_of_such_folders_names_what_they_have(state: State, tmp_path: Path) -> None:
    place = tmp_path / "resnet56_vanilla"
    place.mkdir()
    torch.save({"model": state, "epoch": 240}, place / "ckpt_epoch_240.pth")
    assert weight_hash(read_weights(place)) == weight_hash(state)
    with pytest.raises(UserError, match=r"it has none, its folders have 1: resnet56_vanilla/ckpt_epoch_240\.pth"):
        read_weights(tmp_path)


def test_a_flipped_bit_in_one_tensor_is_seen(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(state, path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"w\.pth: .*damaged"):
        read_weights(path)


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb/data/0", "w") as record:
        for _ in range(150):
            record.write(bytes(1_000_000))
    tracemalloc.start()
    with pytest.raises(UserError, match="unpack to 150,000,000"):
        read_weights(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("layout", sorted(_layouts({"a": torch.zeros(1)})))
def test_usual_layouts_load(layout: str, state: State, tmp_path: Path) -> None:
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pth"
        torch.save(_layouts(state)[layout], path, _use_new_zipfile_serialization=not legacy)
        network = build("resnet8", classes=10)
        load_into(network, read_weights(path), str(path))
        assert weight_hash(network.state_dict()) == weight_hash(state)


def test_safetensors_load(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "student.safetensors", metadata={"name": "resnet8"})
    assert weight_hash(read_weights(tmp_path / "student.safetensors")) == weight_hash(state)


@pytest.mark.parametrize(
    ("name", "changes", "renames"),
    [
        ("resnet8", {"shortcut": "A"}, [("fc.", "linear.")]),
        ("resnet8", {"shortcut": "A"}, [("fc.", "compressible_linear."), ("conv", "compressible_conv")]),
        ("resnet8", {}, [("fc.", "linear."), ("downsample.", "shortcut.")]),
        ("resnet18", {"blocks": [1, 1, 1, 1]}, [("linear.", "fc."), ("shortcut.", "downsample.")]),
        (
            "densenet_bc",
            {"depth": 10, "growth": 4},
            [("norm1.", "norm.1."), ("conv2.", "conv.2."), ("norm2.", "norm.2."), ("conv1.", "conv.1.")],
        ),
        ("mobilenetv2_half", {}, [("classifier.0.", "classifier.")]),
    ],
)
def test_other_published_names_load(name: str, changes: dict[str, Any], renames: list[tuple[str, str]]) -> None:
    source = build(name, classes=10, **changes)
    fill(source.state_dict())
    renamed = {}
    for key, value in source.state_dict().items():
        for ours, theirs in renames:
            key = key.replace(ours, theirs)
        renamed[f"net.{key}"] = value
    network = build(name, classes=10, **changes)
    load_into(network, renamed, "file")
    assert weight_hash(network.state_dict()) == weight_hash(source.state_dict())


def _files(state: State, folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be used, with what the message must say."""
    whole = folder / "whole.pth"
    torch.save({"model": state}, whole)
    contents: dict[str, tuple[bytes, str]] = {
        "empty.pth": (b"", "empty"),
        "text.pth": (b"This is a README, not a checkpoint.\n", "not a PyTorch checkpoint .*README"),
        "page.pth": (b"<!DOCTYPE html><html>quota exceeded</html>", "not a PyTorch checkpoint .*DOCTYPE"),
        "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "cut.pth": (whole.read_bytes()[:9000], "damaged or incomplete"),
        "zip.pth": (b"PK\x03\x04" + bytes(50), "damaged or incomplete"),
        "cut.safetensors": (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "not a readable safetensors file"),
    }
    files = {}
    for name, (content, reason) in contents.items():
        (folder / name).write_bytes(content)
        files[name] = (folder / name, reason)
    objects = {
        "module.pth": (
            build("resnet8", classes=10),
            r"Python objects .*kdbench\.models\.resnet\.ResNet.*state_dict\(\)",
        ),
        "numbers.pth": ({"epoch": 3, "lr": 0.1}, "no weights in it.*epoch, lr"),
        "list.pth": ([1, 2], "no weights in it.*list"),
        "nothing.pth": ({}, "no weights in it"),
    }
    for name, (content, reason) in objects.items():
        torch.save(content, folder / name)
        files[name] = (folder / name, reason)
    (folder / "run").mkdir()
    save_file(state, folder / "run" / "student.safetensors")
    files["folder"] = (folder / "run", "a folder.*weights are in .*student.safetensors")
    files["missing"] = (folder / "none.pth", "no such file")
    return files


def test_unusable_files_are_named_with_the_reason(state: State, tmp_path: Path) -> None:
    for path, reason in _files(state, tmp_path).values():
        with pytest.raises(UserError, match=reason) as caught:
            read_weights(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pth", "legacy.pth", "safetensors"])
def test_damaged_files_never_raise_anything_else(kind: str, tmp_path: Path) -> None:
    small = {"conv1.weight": torch.ones(2, 2), "fc.bias": torch.zeros(3)}
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(small, path)
    else:
        content = {"opt": argparse.Namespace(lr=1.0), "model": small, "best": np.float64(2)}
        torch.save(content, path, _use_new_zipfile_serialization=kind == "pth")
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for attempt in range(150):
        data = bytearray(whole[: generator.randrange(len(whole))] if attempt % 3 == 0 else whole)
        for _ in range(generator.randrange(8) if data else 0):
            data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        try:
            read_weights(path)
        except UserError:
            refused += 1
    assert refused > 50


def test_weights_of_another_network_are_refused_with_its_name(state: State) -> None:
    def message(weights: State, name: str, **changes: Any) -> str:
        network = build(name, **{"classes": 10, **changes})
        before = weight_hash(network.state_dict())
        with pytest.raises(UserError) as caught:
            load_into(network, weights, "weights.pth")
        assert weight_hash(network.state_dict()) == before
        return str(caught.value)

    text = message(state, "resnet8", classes=100)
    assert "weights.pth" in text and "fc.weight [10, 64] instead of [100, 64]" in text
    assert "classifier has 10 classes, this network's 100" in text
    text = message(state, "resnet14")
    assert "24 missing" not in text and "missing (layer1.1.conv1.weight" in text and "resnet8 with 10 classes" in text
    text = message(state, "resnet8x4")
    assert "of another shape (conv1.weight [16, 3, 3, 3] instead of [32, 3, 3, 3]" in text
    text = message(dict(build("resnet14", classes=7, shortcut="A").state_dict()), "resnet14", classes=7)
    assert "resnet14 with shortcut=A and 7 classes" in text
    text = message({"strange": torch.zeros(2)}, "mlp")
    assert "1 unexpected (strange)" in text and "They fit" not in text


def test_hash_sees_names_types_shapes_and_bytes_but_not_the_order(state: State) -> None:
    digest = weight_hash(state)
    assert len(digest) == 64 and digest == weight_hash(dict(reversed(state.items())))
    assert digest == weight_hash({name: value.clone().to("cpu") for name, value in state.items()})
    nonzero = state["conv1.weight"].clone()
    nonzero[0, 0, 0, 0] = torch.nextafter(nonzero[0, 0, 0, 0], torch.tensor(9.0))
    others = [
        {**state, "conv1.weight": nonzero},
        {**state, "conv1.weight": state["conv1.weight"].double()},
        {**state, "conv1.weight": state["conv1.weight"].reshape(16, 27)},
        {("other" if name == "conv1.weight" else name): value for name, value in state.items()},
        {name: value for name, value in state.items() if name != "fc.bias"},
    ]
    assert len({digest, *map(weight_hash, others)}) == 6
    assert weight_hash({"a": torch.zeros(0), "b": torch.tensor(1.0, dtype=torch.bfloat16)}) != weight_hash({})
    channels_last = state["layer1.0.conv1.weight"].contiguous(memory_format=torch.channels_last)
    assert weight_hash({**state, "layer1.0.conv1.weight": channels_last}) == digest
