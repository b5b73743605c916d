"""What a verdict does not rest on."""

from __future__ import annotations

import numpy as np

from limbeck.evals.stats.noninferiority import Margins
from limbeck.evals.verdict.decide import decide_verdict
from limbeck.registry.mlflow.store import Store
from tests.evals.verdict.conftest import DOCUMENTS, AddScored, answers, candidate_of


def test_caveats_list_what_was_not_measured(store: Store, add_scored: AddScored) -> None:
    guess = np.tile([1.0, 0, 0, 0], 100)
    add_scored({"qa": answers(DOCUMENTS), "guess": guess, "one": answers(10)}, 1.0, kind="teacher", one_cluster=["one"])
    best = add_scored(
        {"qa": answers(DOCUMENTS), "guess": guess, "one": answers(10)},
        0.5,
        recipe="small",
        kind="onnx",
        engine="onnxruntime",
        parent="m/9",
        one_cluster=["one"],
    )
    add_scored({"other": answers(50)}, 0.1, alone=True)
    add_scored()
    found = decide_verdict(store, "m")
    assert found.left_out == {"m/3": "scored on other", "m/4": "not scored on these tasks"}
    assert found.other_tasks == ("other",)
    assert candidate_of(found, best).unknown_tasks.keys() == {"one"}
    # A task that cannot be tested is not passed.
    allowed = decide_verdict(store, "m", margins=Margins(default=0.1))
    assert {task.noninferiority.verdict for task in candidate_of(allowed, best).tasks} == {"pass"}
    assert (allowed.answer, candidate_of(allowed, best).quality) == ("not settled", "inconclusive")
    for words in (
        "Retention on guess: retention is undefined",
        "Quality on one: a confidence interval needs documents of two groups",
        "(qa, guess, one): other languages",
        "Other tasks that versions of m are scored on: other.",
        "Luck in training: only one student of small was trained",
        "Other requests than 64 tokens in and 64 out, in batches of 1 and 8",
        "Other machines than a test machine, 2 cores; no GPU was used.",
        "Dollars: no price of this machine is known",
        "m/1 ran in torch, m/2 in onnxruntime. To separate the two, run limbeck export m/1",
        "The cost of making m/2, and so when it pays back",
        "m/3 is not a candidate: scored on other",
    ):
        assert any(words in caveat for caveat in found.not_measured), words
    # The exported teacher shows how much of the speed-up comes from the engine.
    add_scored({"qa": answers(DOCUMENTS), "guess": guess, "one": answers(10)}, 0.7, kind="onnx", parent="m/1")
    found = decide_verdict(store, "m")
    assert any("The teacher itself, as m/5 fp32, runs at 70.0% [" in caveat for caveat in found.not_measured)
