"""Fitting epsilon by gradient through the proxy teacher, instead of drawing it.

Coefficients are written eps_m = (exp(theta_m) - 1) / m, that is 1/m + eps_m = exp(theta_m) / m: every theta is in
the safe region and theta = 0 is the teacher. Per class, theta_c is a shared part plus the class's own, so that what
all classes have in common is learnt from all images. A penalty lambda / n sum theta^2 (a Gaussian prior) pulls
towards the teacher; sets are fitted along a path of falling penalties, each from the last, and images not used in
the fit choose among them. Ours; the paper draws at random.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdbench.losses.ptloss.candidates import Candidate, SearchOptions
from kdbench.losses.ptloss.criteria import CRITERIA, prediction
from kdbench.losses.ptloss.functional import orders
from kdbench.losses.ptloss.implicit import differentiable_proxy

BOUND = 4.0  # |theta| < 4: 1/m + eps_m between 1/55 and 55 times 1/m, whatever a line search tries
EVALUATIONS = 40  # of the criterion, for each penalty


def epsilon_of(theta: Tensor) -> Tensor:
    """theta [..., M] -> epsilon [..., M]; 0 -> 0, slope 1/m there."""
    return (BOUND * torch.tanh(theta / BOUND)).expm1() / orders(theta)


def fit_path(teacher: Tensor, label: Tensor, options: SearchOptions, order: int, tau: float) -> list[Candidate]:
    """epsilon = 0 and one fitted set for each of `penalties`, strongest first.

    teacher [n, C] float64 probabilities and label [n]: the images to fit on.
    """
    theta = Theta(teacher.shape[1] if options.per_class else None, order, teacher.device)
    found = [Candidate("teacher (epsilon = 0)", theta.epsilon().cpu())]
    start: Tensor | None = None
    for penalty in sorted(options.penalties, reverse=True):
        start = _fit(theta, teacher, label, options, tau, float(penalty), start)
        found.append(Candidate(f"gradient M={order} penalty={penalty:g}", theta.epsilon().cpu()))
    return found


class Theta:
    """The numbers that are fitted: a set [M] for all classes and, per class, what each adds to it [C, M]."""

    def __init__(self, classes: int | None, order: int, device: torch.device) -> None:
        shapes = [(order,)] if classes is None else [(order,), (classes, order)]
        self.parts = [torch.zeros(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]

    def value(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else self.parts[0] + self.parts[1]

    def epsilon(self) -> Tensor:
        return epsilon_of(self.value()).detach()

    def square(self) -> Tensor:
        """What the penalty is on."""
        return torch.stack([part.square().sum() for part in self.parts]).sum()


def _fit(
    theta: Theta,
    teacher: Tensor,
    label: Tensor,
    options: SearchOptions,
    tau: float,
    penalty: float,
    start: Tensor | None,
) -> Tensor | None:
    """L-BFGS on theta in place; returns the last proxies, from which the next fit's solver starts."""
    optimizer = torch.optim.LBFGS(
        theta.parts, max_iter=EVALUATIONS, max_eval=EVALUATIONS, line_search_fn="strong_wolfe",
        tolerance_grad=1e-7, tolerance_change=1e-9,
    )  # fmt: skip
    last = [start]

    def closure() -> Tensor:
        optimizer.zero_grad()
        p = differentiable_proxy(teacher, epsilon_of(theta.value()), start=last[0], tolerance=1e-9)
        last[0] = p.detach()
        said = prediction(p.log(), tau, options.score_at)  # type: ignore[arg-type]
        loss = CRITERIA[options.criterion](said, label).mean() + penalty / len(label) * theta.square()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return last[0]
