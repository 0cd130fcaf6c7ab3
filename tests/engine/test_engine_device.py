"""Precision on a CPU: what computes in which type, and that the weights stay float32 and their names the same."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import weakref

import pytest
import torch
from torch import nn

from kdbench.engine import device
from kdbench.engine.device import evaluation_batch, place
from kdbench.engine.distiller import Distiller
from kdbench.engine.evaluate import in_float32
from kdbench.engine.learner import Learner
from kdbench.engine.metrics import Meters
from kdbench.engine.options import OptimizerOptions, TrainerOptions
from kdbench.errors import UserError
from kdbench.models.base import flops
from kdbench.types import CorpusInfo, ImageInfo
from tests.support.engine import Stream, make_learner


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(64, 2)
    )


def types_of(net: nn.Module, image: torch.Tensor, placement) -> list[torch.dtype]:
    seen: list[torch.dtype] = []
    handles = [module.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype)) for module in net]
    with placement.autocast():
        net(image)
    for handle in handles:
        handle.remove()
    return seen


def bf16_answer(net: nn.Module, image: torch.Tensor, placement) -> torch.Tensor:
    with placement.autocast():
        return net(image).float()


def test_depthwise_convolutions_stay_in_float32_under_bf16():
    bf16 = place(TrainerOptions(device="cpu", precision="bf16"))
    fp32 = place(TrainerOptions(device="cpu", precision="fp32"))
    net, plain, image = bf16.put(network()), fp32.put(network()), torch.randn(2, 3, 8, 8)
    low, full = torch.bfloat16, torch.float32
    assert types_of(net, image, bf16) == [low, full, low, low, low]
    assert types_of(copy.deepcopy(net), image, bf16) == [low, full, low, low, low]
    assert types_of(plain, image, fp32) == [full] * 5
    assert list(net.state_dict()) == list(plain.state_dict())
    assert {value.dtype for value in net.state_dict().values()} == {full}
    torch.testing.assert_close(bf16_answer(net, image, bf16), plain(image), rtol=0.05, atol=0.02)
    with bf16.autocast():
        net(image).float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == full for p in net.parameters())


def test_a_frozen_network_that_is_cast_once_gives_the_numbers_of_autocast():
    bf16 = place(TrainerOptions(device="cpu", precision="bf16"))
    net, image = bf16.put(network()).eval(), torch.randn(2, 3, 8, 8)
    once = bf16.cast(copy.deepcopy(net))
    assert once[0].weight.dtype == torch.bfloat16
    with torch.no_grad(), bf16.autocast():
        assert torch.equal(once(image), net(image))


def test_a_copy_of_a_network_computes_with_its_own_weights():
    bf16 = place(TrainerOptions(device="cpu", precision="bf16"))
    net, image = bf16.put(network()), torch.randn(2, 3, 8, 8)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[1].weight.zero_()
        other[1].bias.zero_()
        assert other[1](net[0](image)).abs().sum() == 0 and net[1](net[0](image)).abs().sum() > 0


def test_arithmetic_is_counted_alike_in_either_precision():
    bf16, info = place(TrainerOptions(device="cpu", precision="bf16")), ImageInfo(2, 3, 8)
    assert flops(bf16.cast(bf16.put(network()).eval()), info) == flops(network(), info) > 0


def test_what_a_process_computes_with_is_set_and_said(monkeypatch):
    """float32 on a GPU is float32 unless TF32 is asked for; the device of all new streams and graphs is the run's."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for precision in ("fp32", "tf32", "bf16", "fp16", "auto"):
        placement = place(TrainerOptions(device="cuda:1", precision=precision))
        allowed = {torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32}
        found[precision] = (placement.precision, placement.dtype, allowed)
    assert found == {
        "fp32": ("fp32", torch.float32, {False}),
        "tf32": ("tf32", torch.float32, {True}),
        "bf16": ("bf16", torch.bfloat16, {False}),
        "fp16": ("fp16", torch.float16, {False}),
        "auto": ("bf16", torch.bfloat16, {False}),
    }
    assert chosen == [torch.device("cuda:1")] * 5
    assert place(TrainerOptions(device="cuda")).device == torch.device("cuda:0")
    with pytest.raises(UserError, match="torch sees 2 CUDA devices"):
        place(TrainerOptions(device="cuda:2"))


def test_what_auto_precision_stands_for_is_right_for_the_device_and_said_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    device._say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found, capability = [], [(9, 0)]
    for capability[0] in ((9, 0), (7, 5), (9, 0)):
        found.append(place(TrainerOptions(device="cuda")).precision)
    found += [place(TrainerOptions(device=name)).precision for name in ("mps", "cpu")]
    assert found == ["bf16", "fp32", "bf16", "fp32", "fp32"]
    assert [record.message for record in caplog.records] == [
        "trainer.precision=auto is bf16 on Card",
        "trainer.precision=auto is fp32 on Card, which has no bfloat16 of its own",
        "trainer.precision=auto is fp32 on this mps",
    ]
    caplog.clear()
    capability[0] = (7, 0)
    for _ in range(2):
        assert place(TrainerOptions(device="cuda", precision="bf16")).precision == "bf16"
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
    place(TrainerOptions(device="cpu", precision="bf16"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    device._say_once.cache_clear()
    place(TrainerOptions(device="cpu", precision="bf16"))
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "trainer.precision=bf16: Card has no bfloat16 of its own",
        "trainer.precision=bf16: this cpu has no bfloat16 of its own",
    ]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has one kind of flag alone")
def test_evaluation_is_in_float32_where_somebody_has_set_the_newer_flags():
    """torch raises where it is asked by the older ones then."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            _ = matmul.allow_tf32
        with in_float32():
            assert {cudnn.conv.fp32_precision, matmul.fp32_precision} <= {"ieee", "none"}
        assert cudnn.conv.fp32_precision == matmul.fp32_precision == "tf32"
    finally:
        cudnn.allow_tf32 = matmul.allow_tf32 = False


def test_evaluation_is_in_float32_and_changes_nothing_else_of_what_a_process_computes_with():
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    kept = [backend.allow_tf32 for backend in backends]
    enabled, tried = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark
    try:
        for backend in backends:
            backend.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        with in_float32():
            assert [backend.allow_tf32 for backend in backends] == [False, False]
            assert torch.backends.cudnn.enabled == enabled and torch.backends.cudnn.benchmark
        assert [backend.allow_tf32 for backend in backends] == [True, True]
    finally:
        torch.backends.cudnn.benchmark = tried
        for backend, allowed in zip(backends, kept, strict=True):
            backend.allow_tf32 = allowed


def test_all_trainings_of_a_process_run_in_one_stream(monkeypatch):
    """torch keeps freed memory by stream: a stream for each training would hold the memory of all that went before."""
    made: list[str] = []

    class Stream:
        def __init__(self, device) -> None:
            made.append(str(device))

        def wait_stream(self, other) -> None:
            made.append("waits")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    here = Stream("default")
    device._stream.cache_clear()
    try:
        for _ in range(2):
            with device.own_stream(torch.device("cuda:1")):
                pass
    finally:
        device._stream.cache_clear()
    assert made == ["default", "cuda:1", *["waits"] * 4]


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_a_precision_that_a_device_does_not_have_is_refused(precision):
    with pytest.raises(UserError, match=rf"trainer\.precision = {precision}: must be auto, fp32 or bf16 on cpu"):
        place(TrainerOptions(device="cpu", precision=precision))


def test_deterministic_kernels_are_asked_for_and_given_up_again(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        place(TrainerOptions(device="cpu", deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        place(TrainerOptions(device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_a_loss_in_half_precision_is_scaled_and_a_step_that_overflows_is_left_out():
    learner = make_learner()
    half = learner.distiller.placement._replace(dtype=torch.float16)
    learner = Learner(
        Distiller(learner.distiller.student, learner.distiller.loss, half), OptimizerOptions("sgd", 0.1),
        TrainerOptions(device="cpu", clip=1.0), [1.0] * 9, Meters(torch.device("cpu"), 9), 0,
    )  # fmt: skip
    assert half.precision == "fp16" and learner.scaler.is_enabled()
    learner.begin_epoch(0)
    batches = list(Stream(72).epoch(0, 1))
    scale = learner.scaler.get_scale()
    before = [p.detach().clone() for p in learner.distiller.parameters()]
    learner.step(batches[0]._replace(input=batches[0].input * float("inf")), None)
    assert learner.failure is None and learner.scaler.get_scale() < scale
    assert all(torch.equal(p, b) for p, b in zip(learner.distiller.parameters(), before, strict=True))
    for batch in batches[1:]:
        learner.step(batch, None)
    assert learner.failure is None
    assert any(not torch.equal(p, b) for p, b in zip(learner.distiller.parameters(), before, strict=True))
    again = make_learner()
    again.restore(learner.state())  # in float32 it goes on without a scale


def test_a_step_that_fails_gives_back_what_it_held():
    learner, held = make_learner(), []

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.cuda.OutOfMemoryError("no memory left")

    forward = learner.distiller.loss.forward

    def loss(student, teacher, target):
        logits = Broken.apply(student.logits)
        held.append(weakref.ref(logits))
        return forward(student._replace(logits=logits), teacher, target)

    learner.distiller.loss.forward = loss
    learner.begin_epoch(0)
    batch = next(iter(Stream().epoch(0, 1)))
    learner.step(batch, None)
    gc.collect()
    assert isinstance(learner.failure, torch.cuda.OutOfMemoryError) and held[0]() is None
    assert all(p.grad is None for p in learner.distiller.parameters())
    learner.step(batch, None)  # it takes no part any more
    assert learner.steps_done == 1 and len(held) == 1


def test_evaluation_takes_many_small_inputs_at_once_on_a_gpu():
    """Each batch of resnet20 is 75 launches, whatever its size."""
    auto, cuda, cpu = TrainerOptions(), torch.device("cuda"), torch.device("cpu")
    small, large = ImageInfo(100, 3, 32), ImageInfo(1000, 3, 224)
    assert evaluation_batch(auto, cuda, small) == 2500 and evaluation_batch(auto, cpu, small) == 500
    assert evaluation_batch(auto, cuda, large) == 500
    assert evaluation_batch(auto, cuda, CorpusInfo(50_000, 0, 128)) == 1
    assert evaluation_batch(TrainerOptions(eval_batch_size=7), cuda, small) == 7
