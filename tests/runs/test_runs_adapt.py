"""Teachers that were trained on data like the student's, but with other statistics or another order of classes."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kdbench.files import read_json, write_json
from kdbench.models.base import last_layer_name
from kdbench.models.resnet import ResNet
from tests.support.shell import kdbench, result, tiny, train

OTHER = ("dataset.mean=0", "dataset.std=1")


def tops(run: Path) -> list[float]:
    teacher = result(run)["teacher"]
    return [teacher["test/top1"], teacher["val/top1"]]


def own(run: Path) -> list[float]:
    last = result(run)["last"]
    return [last["test/top1"], last["val/top1"]]


def test_a_teacher_keeps_its_normalisation_and_its_weights_hash(capfd):
    taught = train("hydra.run.dir=t", "teacher=none", "loss=ce")
    about = read_json(taught / "network.json")
    assert about["entry"] == "model" and len(about["mean"]) == len(about["std"]) == 3 and about["size"] == 8
    for where in ("teacher.run=t", "teacher.checkpoint=t/student.safetensors"):
        student = train("hydra.run.dir=s", "force=true", where, *OTHER)
        assert tops(student) == own(taught)
        assert result(student)["teacher"]["weights"] == result(taught)["student"]["weights"]
    shown = capfd.readouterr()
    assert (shown.out + shown.err).count("sees inputs with the mean and std that it was trained with") == 2


def test_tables_of_a_teacher_on_other_statistics_are_others():
    train("hydra.run.dir=t", "teacher=none", "loss=ce")
    words = ["teacher.run=t", "loss=kl", "student=mlp", "student.hidden=[8]", "schedule.epochs=2"]
    for name, more in (("a", ()), ("b", OTHER), ("c", OTHER)):
        train(f"hydra.run.dir={name}", "teacher.table=on", *words, *more)
    live = train("hydra.run.dir=d", "teacher.table=off", *words, *OTHER)
    students = [result(run)["student"]["weights"] for run in (live, Path("b"), Path("c"))]
    assert students[0] == students[1] == students[2]
    assert len(list(Path("outputs/teachers/tables").glob("*.table"))) == 2


def test_members_of_an_ensemble_keep_their_normalisation():
    for seed in (0, 1):
        train(f"hydra.run.dir=t{seed}", "teacher=none", "loss=ce", f"seed={seed}")
    words = ["teacher=ensemble", "teacher.network=resnet8", "teacher.members=[t0,t1]"]
    words += ["student=mlp", "student.hidden=[8]", "schedule.epochs=1"]
    plain, other = (train(f"hydra.run.dir=s{i}", *words, *more) for i, more in enumerate(((), OTHER)))
    assert [member["test/top1"] for member in result(other)["teacher"]["members"]] == [
        own(Path(f"t{seed}"))[0] for seed in (0, 1)
    ]
    assert tops(plain) == tops(other)


def test_classes_in_another_order_are_matched_by_name():
    taught = train("hydra.run.dir=t", "teacher=none", "loss=ce")
    weights, about = load_file(taught / "student.safetensors"), read_json(taught / "network.json")
    head = [
        name
        for name, value in weights.items()
        if name.startswith(last_layer_name(ResNet(8, [16, 16, 32, 64], **about["info"])))
    ]
    order = [2, 0, 3, 1]
    assert len(head) == 2
    Path("u").mkdir()
    save_file({k: v[order] if k in head else v for k, v in weights.items()}, "u/student.safetensors")
    write_json(Path("u/network.json"), about)
    wrong = train("hydra.run.dir=a", "teacher.run=u", "loss=kl")
    write_json(Path("u/network.json"), about | {"classes": [about["classes"][place] for place in order]})
    right = train("hydra.run.dir=b", "teacher.run=u", "loss=kl")
    assert tops(right) == own(taught) != tops(wrong)


def test_what_a_network_was_averaged_by_is_kept():
    taught = train("hydra.run.dir=t", "teacher=none", "loss=ce", "trainer.ema=0.5")
    assert read_json(taught / "network.json")["entry"] == "ema"


def test_layers_of_an_adapted_teacher_are_not_taken_over(capsys):
    train("hydra.run.dir=t", "teacher=none", "loss=ce")
    words = ["procedure=born_again", "procedure.share=[first]", "procedure.generations=1", "teacher.run=t", "loss=kl"]
    assert kdbench("train", *tiny(), "hydra.run.dir=s", *words, *OTHER) != 0
    assert "trained on data like the student's" in capsys.readouterr().err


def test_a_files_entry_is_kept_with_the_result():
    taught = train("hydra.run.dir=t", "teacher=none", "loss=ce")
    state = load_file(taught / "student.safetensors")
    torch.save({"state_dict": state, "state_dict_ema": state}, "last.pth.tar")
    words = ["teacher.checkpoint=last.pth.tar", "loss=kl"]
    assert result(train("hydra.run.dir=a", *words))["teacher"]["entry"] == "state_dict"
    ema = train("hydra.run.dir=b", *words, "teacher.checkpoint_key=state_dict_ema")
    assert result(ema)["teacher"]["entry"] == "state_dict_ema"
