"""Choosing epsilon for a given teacher on labelled validation images, and reporting it without flattering it.

The images are split in two (seeded). On the first half the candidates are compared (with `gradient`, two thirds of
it fit them and one third compares). The second half has no say: its criterion of the chosen set is free of
selection bias, and it is recorded beside the first half's, which is not. epsilon = 0 is always a candidate.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from kdbench.errors import UserError
from kdbench.losses.ptloss.candidates import Candidate, Ranked, SearchOptions, draw, ranked
from kdbench.losses.ptloss.criteria import IMPROPER
from kdbench.losses.ptloss.fitting import fit_path
from kdbench.losses.ptloss.scoring import score_all, score_exactly
from kdbench.types import Calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

FEWEST = 20


@dataclass(frozen=True)
class Images:
    """The labelled validation images: the teacher's view of them at tau, their labels, and what each is used
    for."""

    teacher: Tensor  # [N, C] float64 probabilities
    label: Tensor  # [N] int64
    fit: Tensor  # rows to fit on; the first half too where nothing is fitted
    choose: Tensor  # rows that the candidates are compared on
    held_out: Tensor  # rows that only judge the result

    def sizes(self, method: str) -> dict[str, int]:
        fitted = {"fit": len(self.fit)} if method == "gradient" else {}
        return {"all": len(self.label), **fitted, "choose": len(self.choose), "held_out": len(self.held_out)}


def calibrate(
    logits: Tensor, label: Tensor, method: Literal["search", "gradient"], options: SearchOptions, order: int, tau: float
) -> tuple[Tensor, Calibration]:
    """The chosen epsilon ([M] or [C, M] float64, on the CPU) and how it was found.

    logits [N, C] the teacher's on the validation split, label [N] int64 (-1: left out). Raises UserError with fewer
    than 20 labelled images or wrong shapes; logs a warning if the result does not help on the held-out half.
    """
    began = time.perf_counter()
    _doubt(options, logits)
    images = split(logits, label, method, options, tau)
    classes = images.teacher.shape[1]
    if method == "search":
        candidates = draw(options, order, classes)
    else:
        candidates = fit_path(images.teacher[images.fit], images.label[images.fit], options, order, tau)
    scores = score_all(images.teacher, images.label, candidates, options, tau)
    choose, held_out = scores[:, images.choose].mean(dim=1).cpu(), scores[:, images.held_out].mean(dim=1).cpu()
    ranking = torch.sort(choose, stable=True).indices.tolist()  # stable: a draw goes to epsilon = 0, the first
    best = candidates[ranking[0]]
    record = {"epsilon": best.epsilon.tolist(), "method": method, "origin": best.origin, "order": order, "tau": tau}
    record |= {"per_class": options.per_class, "criterion": options.criterion, "score_at": options.score_at}
    record |= _exact(best, candidates[0], images, options, tau)._asdict()
    record |= {"count": len(candidates), "seed": options.seed, "classes": classes, "images": images.sizes(method)}
    record["seconds"] = round(time.perf_counter() - began, 3)
    table = [ranked(rank, candidates[k], choose[k], held_out[k]) for rank, k in enumerate(ranking, 1)]
    figures = _figures(best, options.criterion, table)
    return best.epsilon, Calibration("epsilon", record, [one.row() for one in table], figures)


def split(logits: Tensor, label: Tensor, method: str, options: SearchOptions, tau: float) -> Images:
    """Shuffle the labelled images by `search.seed`, keep at most `search.samples`, and deal them out."""
    if logits.dim() != 2 or label.shape != logits.shape[:1] or label.dtype.is_floating_point:
        raise UserError(
            f"epsilon is chosen from logits [N, C] and labels [N], got {list(logits.shape)}, {list(label.shape)}"
        )
    labelled = (label >= 0).nonzero().flatten().cpu()
    if len(labelled) < FEWEST:
        enough = f"given: it is chosen on at least {FEWEST} labelled validation samples, there are {len(labelled)}"
        raise UserError("epsilon", method, enough)
    generator = torch.Generator().manual_seed(options.seed)
    kept = labelled[torch.randperm(len(labelled), generator=generator)][: options.samples].to(logits.device)
    place = logits.device if logits.device.type != "mps" else torch.device("cpu")  # no float64 there
    teacher = (logits.detach()[kept].to(place).double() / tau).softmax(dim=-1)
    if not bool(torch.isfinite(teacher).all()):
        raise UserError("the teacher's logits on the validation split are not finite")
    rows = torch.arange(len(kept), device=place)
    judged = min(max(round(options.holdout * len(kept)), 5), len(kept) - 10)
    held_out, first = rows[:judged], rows[judged:]
    third = max(1, len(first) // 3) if method == "gradient" else 0
    fit, choose = (first[third:], first[:third]) if third else (first, first)
    return Images(teacher, label[kept.to(label.device)].to(place), fit, choose, held_out)


class Gain(NamedTuple):
    """What the chosen set gains over the plain teacher, and how hard the loss then pulls; the record's entries."""

    scores: dict[str, dict[str, float]]  # by half, then "teacher" and "best"
    held_out_gain: float
    held_out_stderr: float
    strength: float
    residual: float


def _exact(best: Candidate, teacher: Candidate, images: Images, options: SearchOptions, tau: float) -> Gain:
    """Teacher and chosen set on both halves in float64, how hard the loss pulls, and whether it helps."""
    first, chosen = (
        score_exactly(images.teacher, images.label, one.epsilon.to(images.teacher), options, tau)
        for one in (teacher, best)
    )
    halves = {"choose": images.choose, "held_out": images.held_out}
    scores = {
        half: {"teacher": float(first.score[rows].mean()), "best": float(chosen.score[rows].mean())}
        for half, rows in halves.items()
    }
    gain = (first.score - chosen.score)[images.held_out]
    error = float(gain.std() / len(gain) ** 0.5)
    found = Gain(scores, float(gain.mean()), error, chosen.strength, chosen.residual)
    if found.held_out_gain < 0:
        log.warning(
            "the chosen epsilon (%s) does worse than the plain teacher on held-out images: %s is %.3g higher "
            "(standard error %.2g)",
            best.origin,
            options.criterion,
            -found.held_out_gain,
            found.held_out_stderr,
        )
    return found


def _figures(best: Candidate, criterion: str, table: list[Ranked]) -> dict[str, Figure]:
    from kdbench.losses.ptloss.figures import candidate_figure, curve_figure  # matplotlib takes half a second to load

    return {
        "curves": curve_figure(best.epsilon, best.origin),
        "candidates": candidate_figure(table, criterion),
    }


def _doubt(options: SearchOptions, logits: Tensor) -> None:
    if options.criterion in IMPROPER:
        log.warning(
            "loss.search.criterion=%s is not a proper score: against labels it prefers too sharp a proxy even to a "
            "perfectly calibrated teacher; brier and nll are proper",
            options.criterion,
        )
    if options.per_class and len(logits) < 10 * logits.shape[1]:
        log.warning(
            "coefficients per class from %d samples of %d classes: under 10 a class, the choice is mostly noise",
            *logits.shape,
        )
