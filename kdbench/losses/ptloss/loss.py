"""PTLoss as a loss of kdbench: the weighted sum, where its coefficients come from, and how it says so."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from kdbench.arguments.ranges import Positive, within
from kdbench.errors import UserError, require
from kdbench.losses.base import DistillationLoss, Smoothing, Weights, detached, number
from kdbench.losses.ptloss.calibration import FEWEST, calibrate
from kdbench.losses.ptloss.candidates import SearchOptions
from kdbench.losses.ptloss.coefficients import source_of
from kdbench.losses.ptloss.functional import Series, perturbed_kl
from kdbench.losses.ptloss.validity import check
from kdbench.types import Calibration, LossTerms, Outputs, Target

log = logging.getLogger(__name__)

SHOWN = 60  # coefficients that `formula` writes out


class PTLoss(DistillationLoss):
    """weights.task CE(y, s) + weights.distill tau^2 PT(t, s), t and s at temperature tau, PT(t, s) = KL(t || s) +
    sum_c t_c sum_{m=1..order} eps_{c,m} (1 - s_c)^m (Zhang et al., KDD 2024, rebuilt from descriptions).

    `epsilon`: a number (eps_1), M numbers for all classes, C rows of them, "r/m" (eps_m = r/m; r < 0 teaches a
    smoother, r > 0 a sharper proxy of the teacher), a file (.json, .pt, .npy, .csv), null (zeros: plain KL), or
    `search` / `gradient`: chosen on the validation split before training (`search`, see SearchOptions). The loss
    may be negative where epsilon is. Its gradient is G times that of KL towards the proxy, G between 1 and about 1
    + r for "r/m": r < 0 also slows training down. `series`: exact keeps the logarithm; truncated cuts its series at
    `order` too (see `doubts`). Temperature, tau^2 and the label's term are this project's, as in loss=kl; the paper's
    setting has neither (tau=1, weights.task=0).
    """

    terms: ClassVar[tuple[str, ...]] = ("task", "distill")
    paper: ClassVar[str] = "Zhang et al. 2024 (PTLoss, KDD), as rebuilt here"
    epsilon: Tensor

    def __init__(
        self,
        weights: Weights,
        order: Annotated[int, within(1, 100)] = 5,
        epsilon: float | list[float] | list[list[float]] | str | None = "0.5/m",
        tau: Positive = 4.0,
        scale: Literal["tau2", "none"] = "tau2",
        series: Series = "exact",
        search: Mapping[str, object] | None = None,
        label_smoothing: Smoothing = 0.0,
    ) -> None:
        super().__init__(weights, label_smoothing)
        self.order = order
        self.tau = tau
        self.scale = scale
        self.series: Series = series
        self.search = SearchOptions.of(search, self.order)
        source = source_of(epsilon, self.order)
        self.method = source.method
        self.known = source.values is not None
        unknown = torch.full((self.order,), torch.nan)
        self.register_buffer("epsilon", unknown if source.values is None else source.values.float())
        self.fitted_tau = source.tau
        if self.series == "truncated" and not self.known:
            allowed = f"exact with epsilon={self.method}: a cut series has no proxy teacher"
            raise UserError("series", series, allowed)

    @property
    def formula(self) -> str:
        factor = "tau^2 " if self.scale == "tau2" else ""
        log = "KL(t || s)" if self.series == "exact" else f"[-H(t) + sum_c t_c sum_(m<={self.order}) (1 - s_c)^m / m]"
        distill = f"{factor}({log} + sum_c t_c sum_(m<={self.order}) eps_m (1 - s_c)^m)"
        text = self.written(task=self.task_text, distill=distill)
        return f"{text}, t and s at tau = {number(self.tau)}, eps = {self._numbers()}"

    @property
    def doubts(self) -> list[str]:
        """What a user should know of these settings before believing in them; logged when a training starts."""
        found = []
        if self.series == "truncated":
            found.append(
                f"loss.series=truncated drops -log s beyond order {self.order}: its best student is not the teacher "
                "even with epsilon = 0, and classes may vanish; series=exact is PTLoss"
            )
        if self.fitted_tau is not None and self.fitted_tau != self.tau:
            found.append(
                f"loss.epsilon was fitted at tau = {self.fitted_tau:g}, it does not carry over to {self.tau:g}"
            )
        validity = check(self.epsilon) if self.known else None
        if validity is not None and not validity.safe:
            found.append(f"loss.epsilon: {validity.complaint}; the student may settle in a wrong place")
        return found

    def setup(self, student: Outputs, teacher: Outputs | None) -> None:
        """Check the class count of coefficients per class; make room for those that are still to be chosen."""
        for doubt in () if student.logits.is_meta else self.doubts:  # said once, when the training starts
            log.warning("%s", doubt)
        classes = student.logits.shape[-1]
        if not self.known and self.search.per_class:
            self.epsilon = self.epsilon.new_full((classes, self.order), torch.nan)
        rows = self.epsilon.shape[0] if self.epsilon.dim() == 2 else classes
        require(rows == classes, "epsilon", f"{rows} rows", f"one row for each of the {classes} classes")

    @property
    def needs_calibration(self) -> bool:
        return not self.known

    @property
    def least_calibration(self) -> int:
        return 1 if self.known else FEWEST

    def calibrate(self, teacher_logits: Tensor, label: Tensor) -> Calibration:
        """Choose epsilon on the validation split; see calibration.py for the method and SearchOptions for the
        settings."""
        if self.method == "given":
            raise UserError("epsilon", "given", "search or gradient to be calibrated")
        method: Literal["search", "gradient"] = "search" if self.method == "search" else "gradient"
        chosen, found = calibrate(teacher_logits, label, method, self.search, self.order, self.tau)
        self.epsilon = chosen.to(self.epsilon)
        self.known = True
        return found

    def forward(self, student: Outputs, teacher: Outputs | None, target: Target) -> LossTerms:
        if not self.known:
            raise UserError(f"epsilon={self.method} has not been chosen yet: call calibrate first")
        rows = perturbed_kl(student.logits, detached(teacher, "ptloss"), self.epsilon, self.tau, self.series)
        factor = self.tau**2 if self.scale == "tau2" else 1.0
        return self.combine(task=self.task(student.logits, target.label), distill=factor * rows.mean())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.known = bool(torch.isfinite(self.epsilon).all())  # a checkpoint carries what was chosen

    def _numbers(self) -> str:
        if not self.known:
            return f"{self.method} (not chosen yet)"
        rows = self.epsilon.detach().double().cpu()
        chosen = "" if self.method == "given" else f" ({self.method})"
        if rows.numel() <= SHOWN:
            return str(_rounded(rows.tolist())).replace("'", "") + chosen
        digest = hashlib.sha256(self.epsilon.detach().cpu().numpy().tobytes()).hexdigest()[:12]
        low, high = _rounded(rows.amin(dim=0).tolist()), _rounded(rows.amax(dim=0).tolist())
        return (
            f"[{rows.shape[0]} classes x {rows.shape[1]}, sha256 {digest}, min {low}, max {high}]".replace("'", "")
            + chosen
        )


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else format(value, ".6g")
