"""What teacher.table=auto weighs: passes saved, disk, memory, and the teacher's share of a step."""

from __future__ import annotations

import builtins
import os
from dataclasses import replace

import pytest
import torch

from kdbench.files import in_bytes
from kdbench.tables.worth import Costs, choose, free_disk, free_memory

CIFAR100 = Costs(
    epochs=240, images=50_000, views=162, filled=0.0, size=3_300_000_000, teacher=250, students=80,
    disk=100_000_000_000, memory=20_000_000_000,
)  # fmt: skip


def test_a_long_run_takes_a_table():
    pays, why = choose(CIFAR100)
    assert pays and "48 %" in why and "3.3 GB" in why
    assert "there already" in choose(replace(CIFAR100, filled=0.5))[1]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"epochs": 3}, "views"),
        ({"disk": 10_000_000_000}, "disk"),
        ({"memory": 5_000_000_000}, "memory"),
        ({"teacher": 10, "students": 80}, "4 % of a step"),
    ],
)
def test_a_run_that_gains_nothing_does_not(change, word):
    pays, why = choose(replace(CIFAR100, **change))
    assert not pays and word in why


def test_a_table_that_is_there_pays_for_a_short_run():
    assert choose(replace(CIFAR100, epochs=1, filled=0.4))[0]
    assert not choose(replace(CIFAR100, epochs=1, views=1))[0]
    assert choose(replace(CIFAR100, epochs=2, views=1))[0]


@pytest.mark.parametrize("images", [7, 48, 96, 1294, 50_000])
def test_one_epoch_saves_nothing_and_not_less(images):
    for views in (1, 2, 3, 18, 162):
        costs = replace(CIFAR100, epochs=1, images=images, views=views)
        assert 0 <= costs.saved < 1e-9 and "-0" not in choose(costs)[1]


def test_saved_passes_are_those_of_uniform_draws():
    views, epochs, images = 18, 10, 4000
    drawn = torch.randint(views, (images, epochs), generator=torch.Generator().manual_seed(0))
    different = sum(len(set(row)) for row in drawn.tolist())
    costs = replace(CIFAR100, views=views, epochs=epochs, images=images)
    assert costs.saved == pytest.approx(1 - different / (epochs * images), abs=0.005)
    assert replace(costs, filled=1.0).saved == 1.0


def test_what_is_free_is_measured(tmp_path):
    assert free_disk(tmp_path / "not" / "there" / "yet") == free_disk(tmp_path) > 0
    assert free_memory() > 1e8
    assert [in_bytes(n) for n in (7, 696_320, 3.3e9, 999.7e6)] == ["7 B", "696 kB", "3.3 GB", "1 GB"]


def test_free_memory_is_told_without_proc_and_without_sysconf(monkeypatch):
    real = builtins.open

    def no_proc(file, *arguments, **options):
        if str(file).startswith("/proc"):
            raise FileNotFoundError(file)
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", no_proc)
    assert free_memory() > 2**28
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert free_memory() > 2**28
