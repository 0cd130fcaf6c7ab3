"""What the engine's tests share."""

from __future__ import annotations

import pytest

from kdbench.engine import device as placement
from kdbench.engine import graph
from tests.support.tape import Tape


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """Steps are recorded on the CPU, as they would be on a GPU; the recordings."""
    made: list[Tape] = []

    def record(function, device):
        made.append(Tape(function))
        return made[-1]

    monkeypatch.setattr(graph, "recording", record)
    monkeypatch.setattr(placement, "can_record", lambda device: True)
    return made
