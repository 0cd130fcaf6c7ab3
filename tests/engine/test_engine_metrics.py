import gc

import pytest
import torch
import torchmetrics.functional.classification as oracle

from kdbench.engine import evaluate as evaluation
from kdbench.engine.metrics import Meters, combined, measure_logits, of_task, piece_figures
from kdbench.results.metrics import CLASSIFICATION, LANGUAGE_MODELLING
from kdbench.types import Batch, LossTerms, Outputs, StepOutput, Target
from tests.support.engine import CLASSES


def test_report_agrees_with_torchmetrics():
    torch.manual_seed(0)
    logits, label = 3 * torch.randn(200, 10), torch.randint(10, (200,))
    got = measure_logits(logits, label)
    kwargs = {"num_classes": 10, "average": "micro"}
    assert got["top1"] == pytest.approx(oracle.multiclass_accuracy(logits, label, **kwargs).item())
    assert got["top5"] == pytest.approx(oracle.multiclass_accuracy(logits, label, top_k=5, **kwargs).item())
    ece = oracle.multiclass_calibration_error(logits.softmax(1), label, num_classes=10, n_bins=15)
    assert got["ece"] == pytest.approx(ece.item(), abs=1e-6)
    assert got["nll"] == pytest.approx(-logits.log_softmax(1)[torch.arange(200), label].mean().item())


def test_two_classes_have_f1_and_a_correlation():
    torch.manual_seed(0)
    for share in (0.5, 0.1, 0.0):
        logits, label = torch.randn(200, 2), (torch.rand(200) < share).long()
        got = measure_logits(logits, label)
        assert got["f1"] == pytest.approx(oracle.binary_f1_score(logits.argmax(1), label).item())
        if share:
            expected = oracle.binary_matthews_corrcoef(logits.argmax(1), label).item()
            assert got["mcc"] == pytest.approx(expected, abs=1e-6)
    one_answer = measure_logits(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 1, 0]))
    assert one_answer["f1"] == 0 == one_answer["mcc"]
    assert not {"f1", "mcc"} & measure_logits(torch.randn(9, 3), torch.arange(9) % 3).keys()


def test_fidelity_to_a_teacher():
    torch.manual_seed(0)
    student, teacher, label = torch.randn(50, 4), torch.randn(50, 4), torch.randint(4, (50,))
    got = measure_logits(student, label, teacher)
    p, q = teacher.softmax(1), student.softmax(1)
    assert got["teacher_kl"] == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert got["agreement"] == pytest.approx((student.argmax(1) == teacher.argmax(1)).float().mean().item())
    same = measure_logits(teacher, label, teacher)
    assert same["agreement"] == 1.0 and same["teacher_kl"] == pytest.approx(0.0, abs=1e-7)


def _output(loss: float, logits: torch.Tensor) -> StepOutput:
    return StepOutput(LossTerms(torch.tensor(loss), {"task": torch.tensor(loss / 2)}), logits)


def test_meters_weigh_batches_by_their_size_and_name_the_first_bad_step():
    meters = Meters(torch.device("cpu"), 4)
    right = torch.eye(CLASSES)
    target = Target(torch.arange(CLASSES), torch.arange(CLASSES), torch.tensor(0.0))
    meters.add(_output(1.0, right), None, target)
    meters.add(_output(5.0, -right[:1]), None, Target(target.label[:1], target.row[:1], target.progress))
    means, bad = meters.read()
    assert means == pytest.approx({"loss": 2.0, "loss_task": 1.0, "top1": 0.75})
    assert bad is None
    broken = Meters(torch.device("cpu"), 4)
    for loss in (1.0, float("inf"), float("nan")):
        broken.add(_output(loss, right), Outputs(right, {}), target)
    means, bad = broken.read()
    assert bad == 1 and means["agreement"] == 1.0


def test_accuracies_are_of_the_images_that_have_a_label():
    truth = torch.tensor([0, 1, 2, -1])
    meters = Meters(torch.device("cpu"), 2, truth)
    answers = torch.eye(CLASSES)[[0, 1, 0, 0]]  # right, right, wrong, unknown
    noisy = torch.tensor([0, 0, -1, -1])
    meters.add(_output(1.0, answers), None, Target(noisy, torch.arange(4), torch.tensor(0.0)))
    means, _ = meters.read()
    assert means["top1"] == pytest.approx(1 / 2) and means["clean_top1"] == pytest.approx(2 / 3)
    mixed = torch.tensor([[0.3, 0.7, 0], [0, 0, 0]])
    meters.reset()
    meters.add(_output(1.0, answers[1:3]), None, Target(mixed, torch.tensor([3, 3]), torch.tensor(0.0)))
    means, _ = meters.read()
    assert means["top1"] == 1.0 and "clean_top1" not in means


def test_ties_are_broken_one_way_for_every_figure():
    """A network whose answers are rounded to ties agrees with itself in all of them, and is no better than itself."""
    torch.manual_seed(0)
    logits = torch.randint(0, 3, (500, 20)).float()
    label = torch.randint(20, (500,))
    got = measure_logits(logits, label, logits)
    assert got["agreement"] == 1.0 and got["top5"] >= got["top1"]
    assert got["top1"] == pytest.approx((logits.argmax(1) == label).float().mean().item())


@pytest.mark.parametrize("classes", [2, 10])
def test_the_figures_of_a_set_follow_from_those_of_its_pieces(classes):
    torch.manual_seed(0)
    logits, teacher, label = torch.randn(200, classes), torch.randn(200, classes), torch.randint(classes, (200,))
    whole = measure_logits(logits, label, teacher)
    cuts = ((0, 70), (70, 71), (71, 200))
    parts = combined([piece_figures(logits[a:b], label[a:b], teacher[a:b]) for a, b in cuts])
    assert list(parts) == list(whole) and parts == pytest.approx(whole, abs=1e-6)
    assert combined([piece_figures(logits, label, teacher)]) == whole


def test_a_set_is_measured_in_pieces_against_logits_that_are_kept_or_a_teacher_that_is_asked(monkeypatch):
    torch.manual_seed(0)
    student, teacher = (Answers(torch.nn.Linear(6, 5)) for _ in range(2))
    inputs, label = torch.randn(40, 6), torch.randint(5, (40,))
    target = Target(label, label, torch.tensor(0.0))
    batches = [
        Batch(inputs[i : i + 8], label[i : i + 8], target._replace(label=label[i : i + 8])) for i in range(0, 40, 8)
    ]
    logits, said = (network(inputs).logits.detach() for network in (student, teacher))
    whole = measure_logits(logits, label, said)
    for piece in (10**9, 5 * 16, 1):
        monkeypatch.setattr(evaluation, "PIECE", piece)
        for reference in (said, teacher):
            found = evaluation.evaluate(student, batches, reference)
            assert found == pytest.approx(whole, abs=1e-6)
    assert evaluation.evaluate(student, batches).keys() == {"top1", "top5", "nll", "ece"}


def test_the_perplexity_of_a_language_model_follows_from_its_nll():
    assert of_task({"nll": 2.0}, LANGUAGE_MODELLING) == {"ppl": pytest.approx(7.389056), "nll": 2.0}
    assert (
        of_task({"nll": 2.0}, CLASSIFICATION) == {"nll": 2.0}
        and of_task({"nll": 1e6}, LANGUAGE_MODELLING)["ppl"] > 1e300
    )
    meters = Meters(torch.device("cpu"), 3, task=LANGUAGE_MODELLING)
    target = Target(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor(0.0))
    meters.add(_output(1.0, torch.zeros(2, 4)), None, target)
    meters.add(
        _output(1.0, torch.zeros(3, 4)), None, target._replace(label=torch.tensor([0, 1, 2]))
    )  # more of it counts
    means, _ = meters.read()
    assert means["ppl"] == pytest.approx(4.0) and means["top1"] == pytest.approx(2 / 5)


class Answers(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> Outputs:
        return Outputs(self.layer(inputs), {})


class Watched(torch.nn.Module):
    """Of running text: 64 predictions of 500 words a batch. Asked for the last time it notes how many numbers tensors
    hold."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.left, self.numbers = last, 0

    def forward(self, inputs: torch.Tensor) -> Outputs:
        self.left -= 1
        if self.left == 0:
            self.numbers = _numbers()
        return Outputs(torch.randn(64, 500), {})


def _numbers() -> int:
    return sum(one.numel() for one in gc.get_objects() if type(one) is torch.Tensor)


def test_a_set_s_logits_are_never_all_in_memory(monkeypatch):
    """Those of a text (82,430 tokens of 10,000 words: 3.3 GB, and a teacher's) must not be: 40 batches, 4 a piece."""
    monkeypatch.setattr(evaluation, "PIECE", 4 * 64 * 500)
    label = torch.zeros(64, dtype=torch.int64)
    batch = Batch(torch.zeros(2, 3), label, Target(label, label, torch.tensor(0.0)))
    before, student = _numbers(), Watched(40)
    evaluation.evaluate(student, [batch] * 40, Watched(0))
    batches = (student.numbers - before) / (64 * 500)
    assert 3 <= batches <= 16, f"{batches:.1f} batches of logits are in memory before the last of 40"
