"""Which claims of the papers hold in the runs of scripts/reproduce_<paper>.sh: on this data, with these seeds.

    python scripts/claims.py [outputs/reproduce] [--size small] [--markdown] [--against OTHER]

Every claim is a figure and a bound, written down before the runs: one comparison each, judged as `kdbench compare`
judges (kdbench/results/claims.py: holds, does not hold, cannot be told with so few seeds). "reported" ones are within
the noise of the papers themselves. Most figures are differences of test accuracies, in points. A claim whose runs are
not there is left out. --against OTHER: what moved between these runs and those of another machine, library or
number of threads, whose outputs are in OTHER.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

from kdbench.results.claims import (
    ALL,
    HEAD,
    MOVED,
    BySeed,
    Claim,
    Of,
    Results,
    Runs,
    defined,
    figure,
    first_teacher,
    last,
    members,
    moved,
    of_teacher,
    ratio,
    rows,
    stage,
    stopped,
    summary,
    teacher,
    training,
)
from kdbench.results.read import Run
from kdbench.results.result import read_result


def against_teacher(name: str) -> Of:
    """What `kdbench evaluate RUN --against teacher --split train` says."""
    return lambda run: _against_teacher(run.folder)[name]


@functools.cache
def _against_teacher(folder: Path) -> dict[str, float]:
    from kdbench.commands.evaluate import evaluate_run, teacher_folder  # loads torch

    return evaluate_run(folder, "train", [], against=teacher_folder(folder))


def way_to_teacher(r: Runs) -> BySeed:
    low = r("hard")[last].mean[0]
    return BySeed({ALL: 100 * (r("soft")[last].mean[0] - low) / (r("soft")[teacher].mean[0] - low)})


def bias_gain(run: Run) -> float:
    return last(run) - figure("before/test/top1")(run)


def errors_left(run: Run) -> float:
    """Percent of the errors that are left after the bias correction."""
    return 100 * (100 - last(run)) / (100 - figure("before/test/top1")(run))


def best_tau(r: Runs, hidden: list[int]) -> BySeed:
    """The temperature of the best mean accuracy."""
    accuracy = {tau: r("narrow", student__hidden=hidden, loss__tau=tau)[last].mean[0] for tau in (1, 2.5, 4, 8, 20)}
    return BySeed({ALL: max(accuracy, key=lambda tau: accuracy[tau])})


def spread(r: Runs, hidden: list[int]) -> BySeed:
    accuracy = [r("narrow", student__hidden=hidden, loss__tau=tau)[last].mean[0] for tau in (8, 20)]
    return BySeed({ALL: abs(accuracy[0] - accuracy[1])})


def gain_kept(results: Results) -> BySeed:
    """Percent, of the means: a single run's share divides by a gain that may be nothing."""
    low = results[members].mean[0]
    return BySeed({ALL: 100 * (results[last].mean[0] - low) / (results[teacher].mean[0] - low)})


MISSING, AFTER = figure("before/missing/test/top1"), figure("after/missing/test/top1")
HINTON = [
    Claim("H1", "claim", "soft targets - hard labels", ">", 0, lambda r: r("soft")[last] - r("hard")[last]),
    Claim("H1", "claim", "% of the way from hard labels to the teacher", ">=", 50, way_to_teacher),
    Claim("H2", "claim", "3s never seen: % of them known", ">=", 50, lambda r: r("omit3", loss="kl")[MISSING]),
    Claim("H2", "claim", "with the bias", ">=", 95, lambda r: r("omit3", loss="kl")[AFTER]),
    Claim("H2", "claim", "the bias", ">", 0, lambda r: r("omit3", loss="kl")[figure("offset", 1)], exact=True),
    Claim("H2", "claim", "all images: with the bias - without", ">", 0, lambda r: r("omit3", loss="kl")[bias_gain]),
    Claim("H2", "claim", "hard labels: % of 3s known", "<=", 0, lambda r: r("omit3", loss="ce")[MISSING], exact=True),
    Claim("H3", "claim", "only 7s and 8s seen: % of the errors left by the bias", "<=", 60,
          lambda r: r("only78")[errors_left]),
    Claim("H4", "claim", "6 units: best tau of 1, 2.5, 4, 8, 20 is above", ">", 1, lambda r: best_tau(r, [6, 6])),
    Claim("H4", "claim", "and below", "<", 20, lambda r: best_tau(r, [6, 6])),
    Claim("H4", "claim", "300 units: tau = 8 and 20 differ by", "<=", 0.3, lambda r: spread(r, [300, 300])),
    Claim("H5", "claim", "3 % of the images: soft - hard, stopped early", ">", 0,
          lambda r: r("few_soft")[last] - r("few_hard")[stopped]),
    Claim("H5", "claim", "training accuracy: soft - hard", "<", 0,
          lambda r: r("few_soft")[training] - r("few_hard")[training]),
    Claim("H5", "claim", "soft: last epoch - best by validation", ">=", -1,
          lambda r: r("few_soft")[last] - r("few_soft")[stopped]),
    Claim("H6", "claim", "ensemble - members' mean", ">", 0, lambda r: r("ensemble")[teacher] - r("ensemble")[members]),
    Claim("H6", "claim", "distilled - members' mean", ">", 0, lambda r: r("ensemble")[last] - r("ensemble")[members]),
    Claim("H6", "claim", "% of the gain recovered", ">=", 40, lambda r: gain_kept(r("ensemble"))),
    Claim("H6", "claim", "Gaussians: ensemble - members' mean", ">", 0,
          lambda r: r("ensemble_gaussian")[teacher] - r("ensemble_gaussian")[members]),
    Claim("H6", "claim", "Gaussians: % of the gain recovered", ">=", 40, lambda r: gain_kept(r("ensemble_gaussian"))),
    Claim("H6", "claim", "Gaussians: training accuracy of the best member (guard)", "<", 90,
          lambda r: r("ensemble_gaussian")[members_training]),
    Claim("H7", "claim", "answers changed where no specialist covers them", "<=", 0,
          lambda r: r("specialists")[figure("changed_uncovered/test", 1)], exact=True),
    Claim("H7", "claim", "conditional accuracy: fused - generalist", ">=", 0,
          lambda r: r("specialists")[figure("conditional/fused/test/top1")]
          - r("specialists")[figure("conditional/generalist/test/top1")]),
]  # fmt: skip


def born_again(r: Runs) -> Results:
    return r("generations", loss="ban", procedure__generations=3)


def one_generation(r: Runs, loss: str) -> Results:
    return r("generations", loss=loss, procedure__generations=1)


def best_of(generations: int) -> Of:
    return lambda run: max(stage(number)(run) for number in range(1, generations + 1))


BORN_AGAIN = [
    Claim("B1", "claim", "BAN - its teacher", ">=", -0.1,
          lambda r: born_again(r)[stage(1)] - born_again(r)[first_teacher]),
    Claim("B2", "claim", "ensemble of 2 generations - the better one", ">", 0,
          lambda r: born_again(r)[figure("ensemble/2/test/top1")] - born_again(r)[best_of(2)]),
    Claim("B2", "claim", "ensemble of 3 generations - the best one", ">", 0,
          lambda r: born_again(r)[figure("ensemble/3/test/top1")] - born_again(r)[best_of(3)]),
    Claim("B3", "claim", "BAN - DKPP", ">=", 0, lambda r: born_again(r)[stage(1)] - one_generation(r, "dkpp")[last]),
    Claim("B3", "claim", "DKPP - the teacher", ">=", 0,
          lambda r: one_generation(r, "dkpp")[last] - born_again(r)[first_teacher]),
    Claim("B3", "reported", "CWTM - the teacher", ">=", 0,
          lambda r: one_generation(r, "cwtm")[last] - born_again(r)[first_teacher]),
    Claim("B4", "claim", "generation 2 - the teacher", ">=", 0,
          lambda r: born_again(r)[stage(2)] - born_again(r)[first_teacher]),
    Claim("B4", "claim", "generation 3 - the teacher", ">=", 0,
          lambda r: born_again(r)[stage(3)] - born_again(r)[first_teacher]),
    Claim("B5", "claim", "strong student - its weak teacher", ">", 0,
          lambda r: r("wrn_to_densenet")[last] - r("wrn_to_densenet")[teacher]),
    Claim("B6", "claim", "BAN - BAN+L", ">=", 0, lambda r: born_again(r)[stage(1)] - one_generation(r, "ban_l")[last]),
]  # fmt: skip


def ppl(run: Run) -> float:
    return run.result.last["test/ppl"]


def teachers_ppl(run: Run) -> float:
    assert run.result.teacher is not None
    return defined(run.result.teacher.metrics["test/ppl"])


def labelled_ppl(r: Runs) -> BySeed:
    """Mean perplexity of the first teacher and of a network that learns from labels with other seeds."""
    plain = r("lm", loss="ce")
    both = plain[ppl] - plain[teachers_ppl] * -1
    return both * 0.5


def sequence(r: Runs, texts: str, of: Of) -> BySeed:
    return r("sequence_kd", procedure__texts=texts)[of] * 100


def real_nll(run: Run) -> float:
    return run.result.last["test/nll"]


LANGUAGE = [
    Claim("B6", "claim", "language model: % of the label-trained networks' perplexity, BAN+L", "<=", 100,
          lambda r: ratio(r("lm", loss="ban_l")[ppl], labelled_ppl(r)), exact=True),
    Claim("B6", "claim", "language model: % of BAN+L's perplexity, BAN", ">", 100,
          lambda r: ratio(r("lm", loss="ban")[ppl], r("lm", loss="ban_l")[ppl]), exact=True),
]  # fmt: skip
KIM2016 = [
    Claim("word level", "claim", "% of the perplexity without a teacher, half labels and half teacher", "<=", 100,
          lambda r: ratio(r("word_kd", loss="ban_l")[ppl], r("word_kd", loss="ce")[ppl]), exact=True),
    Claim("sequence level", "claim", "100 x nll on real text: teacher's texts - the text itself", ">", 0,
          lambda r: sequence(r, "teacher", real_nll) - sequence(r, "data", real_nll), exact=True),
    Claim("sequence level", "claim", "100 x teacher's nll of greedy texts: teacher's texts - the text itself", "<", 0,
          lambda r: sequence(r, "teacher", figure("own_text/nll", 1)) - sequence(r, "data", figure("own_text/nll", 1)),
          exact=True),
]  # fmt: skip


def kl(r: Runs, tau: float, alpha: float = 1) -> Results:
    return r("kl", loss__tau=tau, loss__weights__distill=alpha)


def farther(name: str, one: Results, other: Results) -> BySeed:
    """How much larger a distance to the teacher is, on the training images."""
    return one[against_teacher(name)] - other[against_teacher(name)]


def tld_gap(run: Run) -> float:
    return abs(against_teacher("tld")(run) - against_teacher("teacher_tld")(run))


def noisy(r: Runs, tau: float) -> Results:
    return r("noise", loss="kl", loss__tau=tau)


def noise_gap(tau: float, other: str, r: Runs) -> BySeed:
    return noisy(r, tau)[last] - (r("noise", loss="kim_mse") if other == "MSE" else noisy(r, math.inf))[last]


KIM = [
    Claim("K1", "claim", "tau 20, training accuracy: alpha 1 - alpha 0.1", "<", 0,
          lambda r: kl(r, 20)[training] - kl(r, 20, 0.1)[training]),
    Claim("K1", "claim", "tau 20, test accuracy: alpha 1 - alpha 0.1", ">", 0,
          lambda r: kl(r, 20)[last] - kl(r, 20, 0.1)[last]),
    Claim("K2", "claim", "alpha 1: tau 20 - tau 1", ">", 0, lambda r: kl(r, 20)[last] - kl(r, 1)[last]),
    Claim("K3", "claim", "distance of logits: KL, tau 20 - MSE", ">", 0,
          lambda r: farther("logit_distance", kl(r, 20), r("mse")), exact=True),
    Claim("K3", "claim", "distance of logits: KL, tau 1 - tau 20", ">", 0,
          lambda r: farther("logit_distance", kl(r, 1), kl(r, 20)), exact=True),
    Claim("K3", "claim", "shift of logits: KL, tau inf - MSE", ">", 0,
          lambda r: farther("logit_shift", kl(r, math.inf), r("mse")), exact=True),
    Claim("K3", "claim", "TLD, distance to the teacher's: tau 1 - tau 20", ">", 0,
          lambda r: kl(r, 1)[tld_gap] - kl(r, 20)[tld_gap], exact=True),
    Claim("K4", "reported", "norm of features: KL, tau inf - MSE", ">", 0,
          lambda r: farther("feature_norm", kl(r, math.inf), r("mse")), exact=True),
    *(Claim("K5", "claim", f"40 % label noise: KL, tau {tau} - {name}", ">", 0, functools.partial(noise_gap, tau, name))
      for tau in (0.5, 1) for name in ("MSE", "tau inf")),
    Claim("K6", "claim", "few images: KD - labels alone", ">=", 3,
          lambda r: r("few_images", teacher="resnet20")[last] - r("few_images", loss="ce")[last]),
    Claim("K6", "claim", "few images: small teacher - large teacher", ">=", 0,
          lambda r: r("few_images", teacher="resnet8")[last] - r("few_images", teacher="resnet20")[last]),
    Claim("K7", "claim", "half of the classes: KD, small teacher - labels alone", ">=", 15,
          lambda r: r("few_classes", teacher="resnet8")[last] - r("few_classes", loss="ce")[last]),
    Claim("K7", "claim", "labels alone", "<=", 50, lambda r: r("few_classes", loss="ce")[last]),
    Claim("K8", "reported", "MSE - KL, tau 20", ">", 0, lambda r: r("mse")[last] - kl(r, 20)[last]),
    Claim("K8", "reported", "through an assistant - direct", ">", 0,
          lambda r: r("sequential", procedure__direct=True)[figure("gain/test/top1")]),
]  # fmt: skip


def distance(run: Run) -> float:
    """The student's L2 distance to the true probabilities on the test set."""
    return 100 * run.result.last["test/posterior_l2"]


def teachers_distance(run: Run) -> float:
    return of_teacher(run, "test/posterior_l2")


def pt(r: Runs, order: int = 5, of: Of = last) -> BySeed:
    return r("ptloss_gaussian", loss="ptloss", loss__order=order)[of]


def gaussian(r: Runs, loss: str, tau: float, weight: float = 1, of: Of = last) -> BySeed:
    return r("ptloss_gaussian", loss=loss, loss__tau=tau, loss__weights__distill=weight)[of]


def best_rival(r: Runs) -> BySeed:
    """In each seed the best of PTLoss' own rivals, chosen on the test set: in their favour."""
    rivals = [gaussian(r, "kl", tau) for tau in (2, 4, 8)] + [r("ptloss_gaussian", loss="label_smoothing")[last]]
    return BySeed({seed: max(rival[seed] for rival in rivals) for seed in rivals[0]})


def fragments(order: int, r: Runs) -> BySeed:
    """PTLoss on languages of short texts, less KL at its temperature."""
    plain = r("ptloss_udhr", loss="kl", loss__tau=1, loss__weights__distill=1)
    return r("ptloss_udhr", loss="ptloss", loss__order=order)[last] - plain[last]


SUPERVISION = (("p*", "ensemble"), ("ensemble", "one teacher"), ("one teacher", "labels"))


def supervision(r: Runs, by: str) -> Results:
    named = {"p*": "posterior", "ensemble": "ensemble", "one teacher": "mlp_128", "labels": "none"}
    return r("supervision", teacher=named[by])


def supervised(of: Of, one: str, other: str, r: Runs) -> BySeed:
    return supervision(r, one)[of] - supervision(r, other)[of]


def members_training(run: Run) -> float:
    """The best training accuracy of an ensemble's members, from their own results."""
    if run.result.teacher is None:
        raise LookupError(f"{run.folder}: no teacher taught it")
    folders = [Path(member.folder or "") for member in run.result.teacher.members]
    return max(100 * read_result(folder).last["train/top1"] for folder in folders)


OTHERS = {
    "beyer2022": [
        Claim("patience", "claim", "240 epochs - 30 epochs", ">", 0,
              lambda r: r("patient", schedule__epochs=240)[last] - r("patient", schedule__epochs=30)[last]),
    ],
    "huang2017": [
        Claim("snapshots", "claim", "ensemble - the snapshots' mean", ">", 0,
              lambda r: r("snapshot")[teacher] - r("snapshot")[members]),
        Claim("snapshots", "reported", "distilled - the snapshots' mean", ">", 0,
              lambda r: r("snapshot")[last] - r("snapshot")[members]),
    ],
    "mirzadeh2020": [
        Claim("assistants", "reported", "through assistants - direct", ">", 0,
              lambda r: r("assistants")[figure("gain/test/top1")]),
    ],
    "pham2021": [
        Claim("feedback", "claim", "student - its teacher before", ">", 0,
              lambda r: r("meta_pseudo_labels")[last] - r("meta_pseudo_labels")[figure("teacher_before/test/top1")]),
    ],
    "xie2020": [
        Claim("noisy student", "claim", "last student - first teacher", ">", 0,
              lambda r: r("noisy_student")[last] - r("noisy_student")[first_teacher]),
    ],
    "zhang2018": [
        Claim("mutual", "reported", "taught by a peer - alone", ">", 0,
              lambda r: r("mutual", procedure="mutual")[last] - r("mutual", procedure="single")[last]),
    ],
    "ren2022": [
        *(Claim("supervision", "claim", f"test accuracy: {one} - {other}", ">", 0,
                functools.partial(supervised, last, one, other)) for one, other in SUPERVISION),
        *(Claim("supervision", "claim", f"100 x distance to p*: {other} - {one}", ">", 0,
                functools.partial(supervised, distance, other, one), exact=True) for one, other in SUPERVISION),
        Claim("supervision", "claim", "100 x the teachers' distance to p*: one teacher - ensemble", ">", 0,
              functools.partial(supervised, teachers_distance, "one teacher", "ensemble"), exact=True),
    ],
    "zhang2024": [
        Claim("Gaussians", "claim", "PTLoss - KL at tau = 1", ">=", 1, lambda r: pt(r) - gaussian(r, "kl", 1)),
        Claim("Gaussians", "claim", "PTLoss - the best of KL at tau = 2, 4, 8 and label smoothing", ">", 0,
              lambda r: pt(r) - best_rival(r)),
        Claim("Gaussians", "claim", "order 3 - order 1", ">", 0, lambda r: pt(r, 3) - pt(r, 1)),
        Claim("Gaussians", "reported", "order 5 - order 3", ">", 0, lambda r: pt(r) - pt(r, 3)),
        Claim("Gaussians", "reported", "PTLoss - KL at tau = 1 with a tenth of the weight", ">", 0,
              lambda r: pt(r) - gaussian(r, "kl", 1, 0.1)),
        Claim("Gaussians", "reported", "100 x distance to p*: KL at tau = 1 - PTLoss", ">", 0,
              lambda r: gaussian(r, "kl", 1, of=distance) - pt(r, of=distance), exact=True),
        *(Claim("fragments", "claim", f"order {order} - KL at tau = 1", ">=", 0, functools.partial(fragments, order))
          for order in (1, 5)),
        Claim("PTLoss", "reported", "r/m - KL at the same tau", ">", 0,
              lambda r: r("ptloss", loss__epsilon="0.5/m")[last] - r("ptloss", loss="kl", loss__tau=4)[last]),
        Claim("PTLoss", "reported", "epsilon searched - KL at the same tau", ">", 0,
              lambda r: r("ptloss", loss__epsilon="search")[last] - r("ptloss", loss="kl", loss__tau=4)[last]),
    ],
}  # fmt: skip
CLAIMS = {
    "hinton2015": HINTON,
    "furlanello2018": [*BORN_AGAIN, *LANGUAGE],
    "kim2016": KIM2016,
    "kim2021": KIM,
    **OTHERS,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="?", type=Path, default=Path("outputs/reproduce"))
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument(
        "--against", metavar="OTHER", type=Path, help="outputs of the same runs from elsewhere: what moved"
    )
    arguments = parser.parse_args()
    head, found = list(HEAD), list(rows(CLAIMS, arguments.outputs, arguments.size))
    if arguments.against:
        head, found = list(MOVED), list(moved(found, list(rows(CLAIMS, arguments.against, arguments.size))))
    table = [head, *found]
    if not found:
        both = f" and {arguments.against}" if arguments.against else ""
        print(f"no claim has its runs below {arguments.outputs}{both}", file=sys.stderr)
        return 1
    if arguments.against:
        print(summary(found), file=sys.stderr)
    if arguments.markdown:
        print("\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *table[1:]]))
        return 0
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
