"""Where the tables of a teacher lie, and which of them this process has open."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kdbench.tables.feed import DeviceLogits, WindowLogits
from kdbench.tables.file import SUFFIX, LogitTable, Shape, read_header
from kdbench.tables.key import key_name

log = logging.getLogger(__name__)

ON_DEVICE = 0.25  # of a GPU's free memory: a larger table stays in main memory, and windows of it are copied


@dataclass
class Tables:
    """`mode` is teacher.table; runs that share a teacher in one process share its open tables."""

    mode: Literal["auto", "on", "off"]
    folder: Path
    _open: dict[str, tuple[LogitTable, WindowLogits | DeviceLogits]] = field(default_factory=dict, init=False)

    def path(self, key: Mapping[str, object]) -> Path:
        return self.folder / f"{key_name(key)}{SUFFIX}"

    def open(
        self, key: Mapping[str, object], shape: Shape, device: torch.device
    ) -> tuple[LogitTable, WindowLogits | DeviceLogits]:
        """The table of this key, and what holds its logits on the device. Raises OSError."""
        name = key_name(key)
        if name not in self._open:
            table = LogitTable(self.path(key), key, shape)
            whole = device.type == "cuda" and shape.bytes <= ON_DEVICE * torch.cuda.mem_get_info(device)[0]
            self._open[name] = (table, DeviceLogits(table, device) if whole else WindowLogits(device))
        return self._open[name]


def find_tables(folder: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """Every table below a folder and its header ({} where that is broken), by path."""
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        if path.is_file():
            yield path, read_header(path) or {}
