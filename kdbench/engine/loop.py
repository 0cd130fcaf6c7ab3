"""The loop over batches, of one student or of all of a cohort. There is no other in kdbench."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from kdbench.engine.graph import CohortGraph
from kdbench.engine.learner import Learner
from kdbench.engine.together import only, whole
from kdbench.types import Batch, Outputs, Teacher


def train_epoch(
    learners: Sequence[Learner], batches: Iterable[Batch], teacher: Teacher, advance: Callable[[], None],
    graph: CohortGraph | None = None,
) -> int:  # fmt: skip
    """A step of every learner for every batch; the number of samples seen. There is no other loop in kdbench.

    A learner whose step fails is left out from then on and keeps its `failure`. On a GPU `graph` does a step of all in
    one launch where it can. `advance` is called after each step. Returns when the device has done all of it.
    """
    samples = 0
    for batch, answer in graph.ahead(batches, teacher, learners) if graph else asked(batches, teacher, learners):
        if graph is None or not graph.step():
            for learner in learners:
                learner.step(batch, answer)
        if all(learner.failure for learner in learners):
            break
        samples += len(batch.target.row)
        advance()
    learners[0].distiller.placement.wait()  # once an epoch, so that images per second are of work done
    return samples


def cohort_graph(learners: Sequence[Learner], device: torch.device) -> CohortGraph | None:
    """What records the steps of those learners that want it; None if there is none."""
    return CohortGraph(device) if any(learner.recorded for learner in learners) else None


def asked(
    batches: Iterable[Batch], teacher: Teacher, learners: Sequence[Learner]
) -> Iterator[tuple[Batch, Outputs | None]]:
    """Each batch with what the teacher says of it: of the rows of all processes, where there are several."""
    for batch in batches:
        answer = teacher(batch)
        if not batch.whole:
            yield batch, answer
            continue
        needs = {key for learner in learners for key in learner.distiller.loss.needs}
        yield batch._replace(target=batch.whole), answer and whole(only(answer, needs), len(batch.whole.row))
