"""What a run writes while it runs: metrics.jsonl and TensorBoard, behind one `write`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Metrics of one run folder. `resume_epoch` > 0 continues a log: later lines and points are dropped first."""

    def __init__(self, folder: Path, resume_epoch: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "metrics.jsonl"
        kept = _lines_up_to(self._file, resume_epoch)
        if not resume_epoch:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        self._lines = open(self._file, "w", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self._lines.writelines(kept)
        self._lines.flush()
        purge = resume_epoch + 1 if resume_epoch else None
        self._board = SummaryWriter(str(folder), purge_step=purge, flush_secs=5)

    def write(self, epoch: int, values: dict[str, float]) -> None:
        """One line and one point a curve; `epoch` counts from 1."""
        self._lines.write(json.dumps({"epoch": epoch, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if name == "step":  # for reading the file; as a curve it would be a straight line
                continue
            self._board.add_scalar(name, value, epoch)

    def text(self, name: str, text: str) -> None:
        self._board.add_text(name, text)

    def figure(self, name: str, figure: Any) -> None:
        self._board.add_figure(name, figure)

    def hparams_start(self, values: dict[str, Any], trial: str) -> None:
        """Announce the run in the HParams tab, in the run's own event file.

        Not `add_hparams`: that makes a second run beside each run, and its Experiment summary hides the
        hyper-parameters that only later runs have. With a session start and no Experiment, TensorBoard takes the union.
        """
        from tensorboard.plugins.hparams import summary_v2

        scalars = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in values.items() if v is not None
        }
        self._add_summary(summary_v2.hparams_pb(scalars, trial_id=trial))

    def hparams_end(self, ok: bool) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        status = api_pb2.STATUS_SUCCESS if ok else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        about = SummaryMetadata.FromString(about.SerializeToString())
        self._add_summary(Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about)]))

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def _add_summary(self, summary: Any) -> None:
        self._board._get_file_writer().add_summary(summary)


def _lines_up_to(file: Path, epoch: int) -> list[str]:
    """The whole lines of a metrics file up to an epoch; a half-written last line is dropped."""
    if not epoch or not file.exists():
        return []
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    return kept
