"""Background writes: in order, from copies, whole before the training goes on without them, and never silently lost."""

from __future__ import annotations

import threading

import pytest
import torch

from kdbench.engine.writer import WAITING, Writer, snapshot


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


def test_a_snapshot_does_not_change_with_its_original():
    state = {"a": torch.ones(2), "b": [{"c": torch.zeros(1)}, 3, None], "best": {"val/top1": 0.5}}
    copy = snapshot(state)
    state["a"].add_(1)
    state["b"][0]["c"].add_(1)
    state["best"]["val/top1"] = 0.9
    assert copy["a"].tolist() == [1, 1] and copy["b"][0]["c"].item() == 0 and copy["best"]["val/top1"] == 0.5
    assert copy["b"][1:] == [3, None]
