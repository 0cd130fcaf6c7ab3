"""Background writes: in order, from copies, whole before the training goes on without them, and never silently lost."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdbench.engine.checkpoint import (
    PUT_OFF,
    SMALL,
    WAITING,
    Writer,
    _side_by_side,
    load_checkpoint,
    save_checkpoint,
    snapshot,
)


def test_writes_happen_in_order_elsewhere_and_all_before_the_block_ends():
    done: list[int] = []
    threads: set[int] = set()
    gate = threading.Event()

    def write(number: int) -> None:
        gate.wait(5)
        threads.add(threading.get_ident())
        done.append(number)

    with Writer() as writer:
        for number in range(5):
            writer.add(lambda number=number: write(number))
        assert done == []  # nobody waited
        gate.set()
    assert done == [0, 1, 2, 3, 4] and threads.isdisjoint({threading.get_ident()}) and len(threads) == 1


def test_a_failed_write_ends_the_training_and_another_error_is_not_hidden_by_it():
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), Writer() as writer:
        writer.add(full)
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.add(lambda: done.append(1))
        writer.add(full)
        raise KeyboardInterrupt
    assert done == [1]  # what was begun is still written


def test_waiting_writes_are_bounded():
    gate, started = threading.Event(), threading.Event()
    with Writer() as writer:
        writer.add(lambda: gate.wait(5) and None)
        for _ in range(WAITING - 1):
            writer.add(lambda: None)
        more = threading.Thread(target=lambda: (writer.add(lambda: None), started.set()))
        more.start()
        assert not started.wait(0.05)  # it waits for the oldest
        gate.set()
        more.join(5)
        assert started.is_set()


def test_what_is_put_off_is_written_after_a_while_or_at_the_end_and_only_the_newest_of_a_file():
    done: list[str] = []
    now = [100.0]
    best, last = Path("best"), Path("last")
    with pytest.raises(KeyboardInterrupt), Writer(lambda: now[0]) as writer:
        for epoch in range(1, 8):
            if epoch in (2, 3, 6):
                writer.put_off(best, lambda epoch=epoch: done.append(f"best {epoch}"))
            writer.put_off(last, lambda epoch=epoch: done.append(f"last {epoch}"))
            now[0] += 0.3 * PUT_OFF
            writer.catch_up()
            writer.flush()
            if epoch < 4:
                assert done == []
            elif epoch == 4:
                assert done == ["best 3", "last 4"]
        now[0] += 100 * PUT_OFF  # whatever it took
        raise KeyboardInterrupt
    assert done == ["best 3", "last 4", "best 6", "last 7"]


def test_what_is_stopped_while_it_catches_up_loses_nothing(monkeypatch):
    """It waits there for writes before; the weights of the best epoch go before the checkpoint that speaks of them."""
    done: list[str] = []

    def stopped(write) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Writer(iter([0.0, PUT_OFF, PUT_OFF]).__next__) as writer:
        for name in ("best", "last"):
            writer.put_off(Path(name), lambda name=name: done.append(name))
        monkeypatch.setattr(writer, "add", stopped)
        writer.catch_up()
    assert done == ["best", "last"]


@pytest.mark.parametrize("line", [1, 2, 3])
def test_what_is_stopped_while_it_puts_off_has_the_older_or_the_newer_write(line):
    """Ctrl-C comes between any two lines: it costs the epoch, and not all that was put off before it."""
    done: list[str] = []
    seen: list[int] = []
    before = sys.gettrace()

    def trace(frame, event, _):
        if frame.f_code is not Writer.put_off.__code__:
            return None
        seen.extend([frame.f_lineno] if event == "line" else [])
        if event == "line" and len(seen) == line:
            raise KeyboardInterrupt
        return trace

    with contextlib.suppress(KeyboardInterrupt), Writer() as writer:
        writer.put_off(Path("last"), lambda: done.append("older"))
        try:
            sys.settrace(trace)
            writer.put_off(Path("last"), lambda: done.append("newer"))
        finally:
            sys.settrace(before)
    assert seen and len(done) == 1


def test_a_write_that_was_put_off_and_fails_at_the_end_is_not_lost():
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), Writer() as writer:
        writer.put_off(Path("last"), full)


def test_a_snapshot_does_not_change_with_its_original():
    state = {"a": torch.ones(2), "b": [{"c": torch.zeros(1)}, 3, None], "best": {"val/top1": 0.5}}
    copy = snapshot(state)
    state["a"].add_(1)
    state["b"][0]["c"].add_(1)
    state["best"]["val/top1"] = 0.9
    assert copy["a"].tolist() == [1, 1] and copy["b"][0]["c"].item() == 0 and copy["best"]["val/top1"] == 0.5
    assert copy["b"][1:] == [3, None]


class Copies(TorchDispatchMode):
    """What is copied, and whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            waits = not (len(args) > 2 and args[2]) and not (kwargs or {}).get("non_blocking")
            self.seen.append((str(args[1].device), str(args[0].device), waits))
        elif func is torch.ops.aten._to_copy.default:
            self.seen.append("waits")
        return func(*args, **(kwargs or {}))


def test_a_gpus_state_comes_in_one_copy_of_each_type_and_one_wait_for_all(monkeypatch):
    """Each tensor's own would be 10 us and more, 193 times an epoch for resnet20 with momentum."""
    waits = []
    with FakeTensorMode(), Copies() as copies:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(len(copies.seen)))
        weights = [torch.empty(3, number + 1, device="cuda:1") for number in range(50)]
        weights.append(torch.empty(2, 3, 4, 5, device="cuda:1", memory_format=torch.channels_last))
        weights.append(torch.empty(SMALL + 1, device="cuda:1"))  # by itself: no memory of the GPU for it
        kept = snapshot(
            {"weights": weights, "batches": torch.zeros((), dtype=torch.int64, device="cuda:1"), "steps": 7}
        )
    assert copies.seen == [("cuda:1", "cpu", False)] * 3 and waits == [3] and kept["steps"] == 7
    for one, other in zip(kept["weights"], weights, strict=True):
        assert (one.device.type, one.shape, one.stride()) == ("cpu", other.shape, other.stride())
    assert kept["batches"].device.type == "cpu" and kept["batches"].shape == ()


def test_what_comes_in_one_copy_has_every_tensors_numbers_and_strides(tmp_path, monkeypatch):
    tensors = [
        torch.randn(()),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 4)[:, 1:3],
    ]
    tensors += [torch.empty(0), torch.randn(30)[7:12]]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **given: empty(*size, **given))
    found = _side_by_side(tensors)
    save_checkpoint(tmp_path / "c.pt", {"w": found})
    for one, read, other in zip(found, load_checkpoint(tmp_path / "c.pt")["w"], tensors, strict=True):
        assert torch.equal(one, other) and torch.equal(read, other) and read.stride() == one.stride()
    assert found[1].stride() == tensors[1].stride() and len({one.untyped_storage().data_ptr() for one in found}) == 1
