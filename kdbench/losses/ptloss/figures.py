"""Two pictures of a chosen epsilon. Made without pyplot, so that no window system or global state is touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from kdbench.losses.ptloss.candidates import Ranked
from kdbench.losses.ptloss.functional import horner

LINES = 12  # classes drawn one by one; more are drawn as a band


def curve_figure(epsilon: Tensor, title: str) -> Figure:
    """phi(p) = -log p + sum_m eps_m (1 - p)^m against -log p. epsilon [M] or [C, M]."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    p = torch.linspace(0.005, 1, 400, dtype=torch.float64)
    rows = epsilon.to("cpu", torch.float64).reshape(-1, epsilon.shape[-1])
    q = (1 - p).expand(len(rows), -1)
    phi = -p.log() + q * horner(q, rows.unsqueeze(1))
    if len(rows) <= LINES:
        for c, line in enumerate(phi):
            axes.plot(p, line, label="perturbed" if len(rows) == 1 else f"class {c}")
    else:
        axes.fill_between(p, phi.amin(dim=0), phi.amax(dim=0), alpha=0.25, label=f"perturbed, {len(rows)} classes")
        axes.plot(p, phi.median(dim=0).values, label="median class")
    axes.plot(p, -p.log(), "k--", label="-log p")
    axes.set(
        xlabel="student's probability p",
        ylabel="loss of a class, nats",
        title=title,
        ylim=(float(phi.min().clamp(max=0)) - 0.1, 6),
    )
    axes.legend(fontsize="small")
    return figure


def candidate_figure(table: Sequence[Ranked], criterion: str) -> Figure:
    """The criterion of every candidate, best first, where it was chosen and on the images that had no say."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ranks = [row.rank for row in table]
    axes.plot(ranks, [row.held_out for row in table], ".", markersize=4, label="held out")
    axes.plot(ranks, [row.choose for row in table], "-", label="where it was chosen")
    teacher = next(row for row in table if row.origin.startswith("teacher"))
    axes.axhline(teacher.held_out, color="k", linestyle="--", linewidth=1, label="teacher, held out")
    axes.axvline(teacher.rank, color="k", linestyle=":", linewidth=1, label="teacher's rank")
    axes.set(xlabel="candidate, best first", ylabel=criterion, title="proxy teachers against labels (lower is better)")
    axes.legend(fontsize="small")
    return figure
