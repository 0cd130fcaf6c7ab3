"""Language models on the real command line: trained, resumed, side by side, refused, compared; on a user's own text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdbench.engine.learner import Learner
from kdbench.errors import UserError
from kdbench.runs.folder import network_of_run, spec_of_run
from tests.support import procedures
from tests.support.killing import KILLED, in_its_own_process
from tests.support.shell import kdbench, result

LINES = ["the cat sat on the mat .", "a dog ran to the cat .", "on the mat the dog sat .", "the dog ran ."]
WORDS = [
    "dataset=corpus", "dataset.root=text", "dataset.context=3", "dataset.predicted=5", "dataset.val=0.2",
    "dataset.test=0.2", "student=lstm_lm", "student.width=12", "student.dropout=0.1", "teacher=lstm_lm",
    "teacher.width=16", "optimizer=adamw", "optimizer.lr=0.02", "teacher.optimizer.lr=0.02", "schedule.epochs=3",
    "schedule.batch_size=8", "teacher.schedule.epochs=4", "teacher.schedule.batch_size=8", "trainer.device=cpu",
    "trainer.progress=none", "loss.tau=1",
]  # fmt: skip
IN_AN_EPOCH = """
from tests.support import procedures
from tests.support.killing import kill_at
from tests.runs.test_runs_lm import train
kill_at({step}, "cut")
train("cut")
"""


@pytest.fixture(autouse=True)
def text() -> None:
    Path("text").mkdir()
    Path("text/train.txt").write_text("".join(f"{LINES[i * 7 % 4]}\n" for i in range(120)))


def refusal(*words: str, out: str = "refused") -> str:
    with pytest.raises(UserError) as caught:
        procedures.train(*words, plain=True, out=out)
    return str(caught.value)


def without(*words: str) -> list[str]:
    """WORDS less those whose keys these have, and less the keys of the networks and losses that they replace."""
    replaced = {word.partition("=")[0] for word in words}
    gone = tuple(f"{group}." for group in ("student", "teacher", "loss") if group in replaced)
    return [word for word in WORDS if word.partition("=")[0] not in replaced and not _of(word, gone)]


def _of(word: str, groups: tuple[str, ...]) -> bool:
    return word.startswith(groups) and not word.startswith(("teacher.schedule", "teacher.optimizer"))


def train(out: str, *words: str) -> Path:
    assert kdbench("train", *without(*words), f"hydra.run.dir={out}", *words) == 0
    return Path(out)


def test_a_teacher_teaches_and_figures_are_perplexities(capfd):
    found = result(train("run"))
    shown = capfd.readouterr()
    said = shown.out + shown.err
    assert "tokens/s" in said and "a table would hold each token at each place" in said
    assert found["task"] == "language modelling" and 1 < found["last"]["test/ppl"] < 14 > found["last"]["val/ppl"]
    assert {"train/ppl", "test/nll", "test/top1", "test/agreement"} <= found["last"].keys()
    assert 1 < found["teacher"]["test/ppl"] < 14 and found["best"]["val/ppl"] <= found["last"]["val/ppl"]
    assert found["images"] == {"train": 560, "val": 140, "test": 166} and not Path("run/predictions.npz").exists()
    kept = json.loads(Path("run/network.json").read_text())
    assert kept["info"] == {"num_classes": 13, "context": 3, "predicted": 5} and kept["classes"][1] == "<unk>"
    capfd.readouterr()
    assert kdbench("evaluate", "run", "--against", "teacher", "--json") == 0
    again = json.loads(capfd.readouterr().out)
    assert again["ppl"] == pytest.approx(found["last"]["test/ppl"]) and again["tokens"] == 166
    assert again["agreement"] == pytest.approx(found["last"]["test/agreement"]) and "logit_distance" in again


def test_a_killed_training_goes_on_to_the_same_weights():
    whole = train("whole")
    done = in_its_own_process(IN_AN_EPOCH.format(step=20))
    assert done.returncode == KILLED, done.stderr
    assert Path("cut/checkpoint.pt").exists() and not Path("cut/result.json").exists()
    cut = train("cut")
    a, b = (load_file(folder / "student.safetensors") for folder in (whole, cut))
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)


def test_zaremba_s_schedule_goes_on_where_its_rate_falls_to_the_same_weights(monkeypatch):
    words = ["loss=ce", "teacher=none", "schedule=zaremba55", "schedule.epochs=55", "schedule.batch_size=112",
             "optimizer=sgd", "optimizer.lr=2", "trainer.evaluate_every=55"]  # fmt: skip
    whole = train("whole", *words)
    step, left = Learner.step, [30]  # one an epoch

    def interrupted(self, *given):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as context:
        context.setattr(Learner, "step", interrupted)
        assert kdbench("train", *without(*words), "hydra.run.dir=cut", *words) != 0
    assert Path("cut/checkpoint.pt").exists() and not Path("cut/result.json").exists()
    a, b = (load_file(folder / "student.safetensors") for folder in (whole, train("cut", *words)))
    assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a)
    rates = [json.loads(line)["lr"] for line in Path("cut/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([2 * 1.15 ** -max(0, epoch - 13) for epoch in range(55)], rel=1e-5)


def test_a_cohort_is_its_runs_alone():
    alone = {loss: result(train(f"alone-{loss}", f"loss={loss}", "loss.tau=1")) for loss in ("kl", "kl_reverse")}
    sweep = ["hydra/launcher=cohort", "hydra.sweep.dir=sweep", "loss=kl,kl_reverse"]
    assert kdbench("train", "-m", *WORDS, *sweep) == 0
    found = [json.loads(path.read_text()) for path in Path("sweep").rglob("result.json")]
    assert len(found) == 2
    for run in found:
        other = alone[run["choices"]["loss"]]
        assert run["student"] == other["student"] and run["last"]["test/ppl"] == other["last"]["test/ppl"]


def test_generations_are_born_again_and_compared_by_perplexity(capfd):
    out = train("outputs/runs/born", "procedure=born_again", "procedure.generations=2", "loss=ban_l")
    found = result(out)
    assert found["task"] == "language modelling" and found["figures"]["ensemble/2/test/ppl"] > 1
    kept = [{key for key in stage if key.startswith(("val/", "test/"))} for stage in found["stages"]]
    assert kept == [{"test/ppl", "val/ppl"}] * 2
    train("outputs/runs/plain", "loss=ce")
    capfd.readouterr()
    assert kdbench("compare", "outputs/runs") == 0
    table = capfd.readouterr().out
    assert "test perplexity (last)" in table and "top-1" not in table
    folders = (Path("outputs/runs/born"), Path("outputs/runs/plain"))
    best, worst = sorted(result(folder)["last"]["test/ppl"] for folder in folders)
    assert table.index(f"{best:.2f}") < table.index(f"{worst:.2f}")


def test_a_student_learns_from_texts_that_its_teacher_writes(capfd):
    words = ["procedure=sequence_level", "procedure.beam=2", "procedure.judged=20", "loss=ce"]
    found = result(train("texts", *words, "procedure.end='<eos>'"))
    assert found["figures"]["own_text/nll"] > 0 and found["last"]["test/ppl"] > 1
    assert "the teacher continues 112 texts of 4 tokens by 5" in "".join(capfd.readouterr())
    plain = result(train("plain", *words, "procedure.texts=data"))
    assert plain["student"] != found["student"] and plain["images"]["train"] == 560
    said = refusal(*without(*words), *words, "procedure.end=dot")
    assert "procedure.end = dot: must be a token as the vocabulary has it" in said
    said = refusal("procedure=sequence_level", "loss=ce", "teacher=resnet8")
    assert "procedure = sequence_level: must be another with dataset=digits: it is for running text" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student=resnet8"], r"student = resnet8: must be a network for corpus data \(context, predicted\), which"),
        (["student=text_cnn"], "student = text_cnn: must be a network for corpus data"),
        (["teacher=resnet8"], "teacher = resnet8: must be a network for corpus data"),
        (["loss=at"], "stage1"),
        (["loss=ptloss", "loss.epsilon=search", "dataset.val=0"], "dataset.validation = 0"),
        (["teacher.table=on"], "teacher.table = on: must be auto or off, since a text's blocks begin"),
        (["procedure=specialists"], "procedure = specialists: must be another with dataset=corpus"),
        (["procedure=noisy_student"], "procedure = noisy_student: must be another with dataset=corpus"),
        (["procedure=bias_correction"], "procedure = bias_correction: must be another with dataset=corpus"),
        (["procedure=meta_pseudo_labels"], "procedure = meta_pseudo_labels: must be another with dataset=corpus"),
        (["monitor=val/posterior_l2"], "monitor = val/posterior_l2: must be a figure of language modelling"),
        (["dataset.validation=0.1"], "dataset.validation = 0.1: must be 0"),
    ],
)
def test_wrong_pairs_are_refused_by_name_before_any_work(words, message):
    assert re.search(message, refusal(*without(*words), *words))
    assert not list(Path().rglob("result.json"))


def test_a_language_model_reads_no_images():
    said = refusal("dataset=digits", "student=lstm_lm", "teacher=none", "loss=ce")
    assert re.search(r"student = lstm_lm: must be a network for image data .*, which dataset=digits holds", said)


def test_a_teacher_of_another_vocabulary_or_other_blocks_is_refused():
    run = train("run", "teacher=none", "loss=ce")
    Path("text/train.txt").write_text("one two three four five six seven eight\n" * 60)
    kept = [word for word in WORDS if not word.startswith("teacher.width")]
    assert (
        "teacher.run = run: must be" in (said := refusal(*kept, f"teacher.run={run}")) and "reads the token ids" in said
    )
    other = refusal(*kept, f"teacher.run={run}", "dataset.predicted=6", out="another")
    assert "its network is for text of 13 tokens in blocks of 3 + 5" in other
    assert spec_of_run(run, _catalogue())[1].words[1] == "<unk>"
    network_of_run(run, _catalogue())


def _catalogue():
    from kdbench.arguments import trusting
    from kdbench.build import ConfigCatalogue

    return ConfigCatalogue(trusting())
