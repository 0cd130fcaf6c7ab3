"""Chains of teacher assistants beside the direct run."""

from __future__ import annotations

import pytest

from tests.support.procedures import refusal, result, stages, train

CHAIN = ["procedure=sequential", "procedure.chain=[resnet14,mlp,resnet8]"]


def test_each_network_teaches_the_next_and_the_direct_run_stands_beside():
    out = train(*CHAIN, "procedure.losses=[kl,{name: mse, weights: {task: 0, distill: 1}}]")
    first, second, direct = (result(stage) for stage in stages(out))
    names = [(r["teacher"]["name"], r["student"]["name"]) for r in (first, second, direct)]
    assert names == [("resnet14", "mlp"), ("mlp", "resnet8"), ("resnet14", "resnet8")]
    assert second["teacher"]["weights"] == first["student"]["weights"]
    assert direct["teacher"]["weights"] == first["teacher"]["weights"]
    assert [r["choices"]["loss"] for r in (first, second, direct)] == ["kl", "mse", "kl"]
    assert second["formula"].startswith("mean_k") and second["seed"] == direct["seed"] == 0 != first["seed"]
    whole = result(out)
    assert whole["choices"]["teacher"] == "resnet14" and whole["choices"]["student"] == "resnet8"
    assert whole["config"]["teacher.depth"] == 14
    assert whole["student"]["weights"] == second["student"]["weights"]
    gain = second["last"]["test/top1"] - direct["last"]["test/top1"]
    assert whole["figures"]["gain/test/top1"] == pytest.approx(gain)


def test_a_chain_of_null_is_the_plain_run_and_typed_options_are_kept():
    words = [
        "procedure=sequential",
        "procedure.chain=null",
        "teacher=mlp",
        "teacher.hidden=[12]",
        "student=mlp",
    ]
    out = train(*words, "student.hidden=[20]", "procedure.direct=false", "loss.tau=2")
    (only,) = stages(out)
    plain = result(
        train(
            "teacher=mlp",
            "teacher.hidden=[12]",
            "student=mlp",
            "student.hidden=[20]",
            "loss.tau=2",
            out="plain",
        )
    )
    assert result(only)["student"] == plain["student"] and result(only)["teacher"] == plain["teacher"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["procedure.chain=[resnet8]"], ["procedure.chain", "resnet8", "at least two"]),
        (["procedure.losses=[kl]"], ["procedure.losses", "kl", "one loss a hop: 2"]),
        (["procedure.losses=[kl,nothing]"], ["procedure.losses[1] = nothing: must be a name that kdbench list loss"]),
        (["procedure.losses=[{name: kl, tau: -2},mse]"], ["procedure.losses[0].tau = -2: must be a number > 0"]),
        (["procedure.losses=[{name: kl, taau: 2},mse]"], ["procedure.losses[0].taau: there is no such key"]),
        (["procedure.chain=[resnet14,resnett8]"], ["procedure.chain[1] = resnett8: must be", "Did you mean resnet8"]),
        (["student=resnet20"], ["procedure.chain", "resnet20", "student="]),
        (["procedure.losses=[kl,{tau: 4}]"], ["procedure.losses", "tau", "name"]),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], parts: list[str]):
    message = refusal(*CHAIN, *words)
    assert all(part in message for part in parts), message
