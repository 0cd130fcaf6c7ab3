"""Where a teacher may come from, and what is refused."""

import errno
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from kdbench.errors import UserError
from kdbench.files import read_json
from kdbench.models.resnet import ResNet
from kdbench.models.weights import read_weights
from kdbench.results.metrics import CLASSIFICATION, LANGUAGE_MODELLING, Task
from kdbench.runs.folder import read_info
from kdbench.runs.obtain import introduced
from kdbench.runs.taught import TaughtBy
from kdbench.teachers.constant import NoTeacher
from kdbench.teachers.live import freeze
from kdbench.types import ImageInfo
from tests.support.killing import in_its_own_process
from tests.support.shell import TINY, kdbench, result, tiny, train


def test_a_teacher_is_trained_once_and_kept():
    first = result(train("hydra.run.dir=a"))["teacher"]
    log = Path(first["folder"]) / "metrics.jsonl"
    written = log.stat().st_mtime_ns
    second = result(train("hydra.run.dir=b", "loss.tau=2"))["teacher"]
    assert second == first and log.stat().st_mtime_ns == written
    assert {"test/top1", "val/top1", "weights", "parameters"} <= first.keys()
    other = result(train("hydra.run.dir=c", "teacher.seed=1"))["teacher"]
    assert other["folder"] != first["folder"] and other["weights"] != first["weights"]


def test_a_students_own_schedule_does_not_touch_the_teacher():
    first = result(train("hydra.run.dir=a"))["teacher"]["folder"]
    assert (
        result(train("hydra.run.dir=b", "schedule.epochs=1", "seed=3", "trainer.ema=0.9"))["teacher"]["folder"] == first
    )


def test_activations_of_a_student_that_are_computed_anew_are_no_matter_of_its_teacher():
    """A teacher with batch norm could not; the student of timm can, and ends with the same weights."""
    words = ["student=timm", "student.name=vit_tiny_patch16_224", "+student.options.patch_size=4",
             "+student.options.depth=1", "+student.options.embed_dim=12", "+student.options.num_heads=1"]  # fmt: skip
    plain, anew = (result(train(f"hydra.run.dir={x}", *words, *more)) for x, more in (
        ("a", []), ("b", ["trainer.grad_checkpointing=true"])))  # fmt: skip
    assert anew["teacher"]["folder"] == plain["teacher"]["folder"]
    assert anew["student"]["weights"] == plain["student"]["weights"]


def test_any_student_becomes_a_teacher_by_its_run_folder():
    first = train("hydra.run.dir=a", "student=mlp", "student.hidden=[16]")
    second = result(train("hydra.run.dir=b", "teacher.run=a"))
    assert second["teacher"]["weights"] == result(first)["student"]["weights"]
    assert second["teacher"]["name"] == "mlp" and second["teacher"]["folder"] == "a"


def test_a_run_folder_with_commas_in_its_name_needs_no_quotes():
    first = train("hydra.run.dir=a", "student=mlp", "student.hidden=[16]").rename("a,loss.tau=2")
    second = result(train("hydra.run.dir=b", f"teacher.run={first}"))
    assert second["teacher"]["weights"] == result(first)["student"]["weights"]
    assert second["teacher"]["folder"] == "a,loss.tau=2"


def test_a_checkpoint_of_another_tool_becomes_a_teacher():
    network = freeze(ResNet(depth=8, widths=[16, 16, 32, 64], num_classes=4, in_channels=3, image_size=8))
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 240}, "teacher.pth")
    got = result(train("teacher.checkpoint=teacher.pth"))["teacher"]
    assert got["folder"] == "teacher.pth"


def test_a_checkpoint_of_other_classes_is_trained_on_first_and_once(caplog):
    network = ResNet(depth=8, widths=[16, 16, 32, 64], num_classes=7, in_channels=3, image_size=8)
    torch.save(network.state_dict(), "other.pth")
    words = ("teacher.checkpoint=other.pth", "teacher.finetune=true", "teacher.allow_chance=true")
    first = result(train("hydra.run.dir=a", *words, "teacher.optimizer.lr=0"))["teacher"]
    kept = read_weights(Path(first["folder"]) / "student.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items() if "conv" in name)
    assert kept["fc.weight"].shape == (4, 64)
    second = result(train("hydra.run.dir=b", *words, "loss.tau=2", "teacher.optimizer.lr=0"))["teacher"]
    assert second == first
    torch.save(
        ResNet(depth=8, widths=[16, 16, 32, 64], num_classes=4, in_channels=3, image_size=8).state_dict(), "b.pth"
    )
    third = result(train("hydra.run.dir=c", "teacher.checkpoint=b.pth", *words[1:]))["teacher"]
    assert third["folder"] != first["folder"]


def test_no_teacher():
    assert result(train("teacher=none", "loss=ce"))["teacher"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher=none", "loss=kl"], "needs|learns from"),
        (["teacher.checkpoint=missing.pth"], "missing.pth"),
        (["teacher.finetune=true"], "teacher.finetune = true: must be false without teacher.checkpoint"),
        (["teacher.run=nowhere"], "nowhere"),
        (["teacher.run=empty"], "empty.*not a run folder"),
        (["teacher.checkpoint=text.pth"], "text.pth"),
        (["teacher.stop_epoch=99"], r"teacher\.stop_epoch = 99"),
        (["teacher.run=x", "teacher.checkpoint=y"], r"teacher\.checkpoint"),
        (["teacher.allow_chance=false", "teacher.optimizer.lr=0"], "guessing"),
    ],
)
def test_what_cannot_teach_is_refused_with_a_message(words, message, capsys):
    Path("empty").mkdir()
    Path("text.pth").write_text("hello", encoding="utf-8")
    assert kdbench("train", *tiny(*words), "hydra.run.dir=run", *words) != 0
    shown = capsys.readouterr()
    assert re.search(message, shown.err + shown.out), shown.err
    assert "Traceback" not in shown.err + shown.out


def test_parallel_runs_wait_for_one_training_of_their_teacher():
    code = "from tests.support.shell import train; train('hydra.run.dir=run{}', 'seed={}')"
    with ThreadPoolExecutor(2) as both:
        done = list(both.map(in_its_own_process, [code.format(i, i) for i in range(2)]))
    assert [process.returncode for process in done] == [0, 0], [process.stderr for process in done]
    outputs = [process.stdout for process in done]
    assert sum("trained now" in output for output in outputs) == 1
    folders = {result(Path(f"run{i}"))["teacher"]["folder"] for i in range(2)}
    assert len(folders) == 1


def test_a_network_with_a_foreign_head_is_refused(capsys):
    train("hydra.run.dir=a")
    assert kdbench("train", *TINY, "hydra.run.dir=b", "dataset.num_classes=5", "teacher.run=a") != 0
    assert "4 classes" in capsys.readouterr().err


def test_info_travels_with_the_run():
    folder = train("teacher=none", "loss=ce")
    kept = read_json(folder / "network.json")["info"]
    assert (
        read_info(kept) == ImageInfo(4, 3, 8) == read_info(list(kept.values()))
    )  # a list: as the first edition wrote it


def test_a_finished_teacher_in_a_store_that_may_not_be_written_is_used(monkeypatch):
    folder = train()
    store = Path(result(folder)["teacher"]["folder"])

    def refuse(self, *_arguments, **_options):
        raise OSError(errno.EROFS, "Read-only file system", str(self.lock_file))

    for lock in store.parent.glob("*.lock"):
        lock.unlink()
    real = FileLock.acquire
    beside = lambda self, *a, **k: (refuse if "teachers" in str(self.lock_file) else real)(self, *a, **k)  # noqa: E731
    monkeypatch.setattr(FileLock, "acquire", beside)
    other = train("hydra.run.dir=other", "seed=1")
    assert result(other)["teacher"]["weights"] == result(folder)["teacher"]["weights"]


def _labelled(task: Task, classes: list[str], test: torch.Tensor, training: torch.Tensor) -> Any:
    test_set, training_set = SimpleNamespace(labels=test), SimpleNamespace(labels=training)
    info = ImageInfo(len(classes), 3, 8)
    return SimpleNamespace(classes=classes, test=test_set, train=training_set, task=task, info=info)


@pytest.mark.parametrize(
    ("right", "counts", "said"),
    [
        (8, [5, 4, 4], "61.54 % on 13 test images may be a guess .38.46 % would be one.; about 26 images could tell"),
        (13, [5, 4, 4], None),
        (90, [90, 10], "no better than guessing .90.00 %, the share of the largest class."),
        (96, [90, 10], None),
        (26, [25, 25, 25, 25], "no better than guessing .25.00 %.. "),
    ],
)
def test_a_teacher_is_refused_as_a_guess_and_with_few_images_warned_about(right, counts, said, caplog):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    data = _labelled(CLASSIFICATION, ["a", "b", "c", "d"][: len(counts)], labels, labels)
    given = TaughtBy("net", NoTeacher(), metrics={"test/top1": right / sum(counts)})
    if said is not None and "no better" in said:
        with pytest.raises(UserError, match=said):
            introduced(given, data, allow_chance=False)
        assert introduced(given, data, allow_chance=True) is given
    else:
        assert introduced(given, data, allow_chance=False) is given
        warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == (said is not None) and all(re.search(str(said), text) for text in warned)


def test_a_language_model_is_refused_where_the_frequencies_of_the_tokens_say_as_much():
    """Of 3, 1, 0 training tokens, counted once more: 4/7, 2/7, 1/7."""
    test = torch.tensor([[0, 0, 1], [2, -1, -1]])
    data = _labelled(LANGUAGE_MODELLING, ["a", "b", "c"], test, torch.tensor([[0, 0], [0, 1]]))
    unigram = ((7 / 4) ** 2 * (7 / 2) * 7) ** (1 / 4)
    good, bad = (TaughtBy("net", NoTeacher(), metrics={"test/ppl": unigram + step}) for step in (-1e-3, 1e-3))
    assert introduced(good, data, allow_chance=False) is good
    with pytest.raises(UserError, match=r"net: 2.94 on test is no better than guessing .2.94, what the frequencies"):
        introduced(bad, data, allow_chance=False)


def test_what_a_teachers_own_training_shares_with_the_students_is_said(capfd):
    words = ["student=mlp", "student.hidden=[8]", "schedule.epochs=1", "teacher=mlp", "teacher.hidden=[8]"]
    train(*words, "hydra.run.dir=a", "optimizer=adamw", "dataset/augment=flip")
    shown = capfd.readouterr().out
    assert "teacher mlp: trained with optimizer=adamw, dataset/augment=flip too" in shown
    assert "optimizer@teacher.optimizer=" in shown and "dataset/augment@dataset.teacher_augment=" in shown
    train(*words, "hydra.run.dir=b", "optimizer=adamw", "optimizer@teacher.optimizer=sgd", "loss.tau=2")
    assert "trained with optimizer=" not in capfd.readouterr().out
    train(*words, "hydra.run.dir=c", "dataset/augment=flip", "+dataset/augment@dataset.teacher_augment=none")
    assert "too; " not in capfd.readouterr().out, "it has one of its own"
