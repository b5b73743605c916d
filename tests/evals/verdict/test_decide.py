"""The answer of a verdict, its candidates, and what would settle it."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from scipy.stats import t as t_distribution

from limbeck.evals.cost.prices import ApiEntry, Prices
from limbeck.evals.stats.noninferiority import Margins, holm_adjusted_p_values
from limbeck.evals.verdict.decide import decide_verdict
from limbeck.evals.verdict.page import render_html, render_markdown
from limbeck.evals.verdict.records import VerdictReport
from limbeck.registry.core.digest import write_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Relative
from tests.evals.timed_costs import timed_cost
from tests.evals.verdict.conftest import (
    DOCUMENTS,
    TRAINING_COST,
    AddScored,
    add_teacher,
    answers,
    candidate_of,
    documents_of,
)

WIDE = Margins(default=0.02)


def test_yes_names_the_cheapest_candidate_that_is_as_good(store: Store, add_scored: AddScored) -> None:
    add_teacher(add_scored)
    expensive = add_scored({"qa": answers(DOCUMENTS, 4, 4)}, 0.5, recipe="base")
    cheap = add_scored({"qa": answers(DOCUMENTS, 6, 4)}, 0.2, recipe="small")
    bad = add_scored({"qa": answers(DOCUMENTS, 200)}, 0.1, recipe="tiny")
    found = decide_verdict(store, "m", margins=WIDE)
    assert (found.answer, found.candidate, found.teacher) == ("yes", cheap.ref, "m/1")
    # Candidates that are as good come first, the cheapest first.
    assert [(each.version, each.quality) for each in found.candidates] == [
        (cheap.ref, "pass"),
        (expensive.ref, "pass"),
        (bad.ref, "fail"),
    ]
    best = candidate_of(found, cheap)
    [task] = best.tasks
    assert task.difference.value == pytest.approx(-2 / DOCUMENTS)
    assert task.noninferiority.margin == 0.02
    assert best.retention
    assert best.retention.value == pytest.approx((0.8 - 0.001 - 0.25) / 0.55)
    assert found.next_steps == ()
    assert (found.default_margins, found.margins) == (False, {"qa": 0.02})
    assert found.sentence.startswith(
        f"small torch ({cheap.ref}) is as good as m/1 within the margins on qa, at 20.0% [19.8%, 20.2%] of its cost "
        "and 5.0 times its speed."
    )
    assert VerdictReport.model_validate_json(found.model_dump_json()) == found


def test_a_candidate_that_is_as_good_must_be_cheaper_for_yes(store: Store, add_scored: AddScored) -> None:
    add_teacher(add_scored)
    same = add_scored({"qa": answers(DOCUMENTS)}, 1.2)
    add_scored({"qa": answers(DOCUMENTS, 400)}, 0.1)
    found = decide_verdict(store, "m", margins=WIDE)
    assert (found.answer, found.candidate) == ("no", same.ref)
    assert candidate_of(found, same).cheaper is False
    assert "as good as m/1 within the margins, but not cheaper: 120.0% [118.8%, 121.2%] of its cost" in found.sentence
    # The interval of the cost ratio contains 1.
    add_scored({"qa": answers(DOCUMENTS)}, 0.999)
    found = decide_verdict(store, "m", margins=WIDE)
    assert (found.answer, found.candidate) == ("not settled", "m/4")
    assert "which may not be less than the teacher's" in found.sentence
    [next_step] = found.next_steps
    assert next_step.startswith("Measure its cost again on an idle machine: limbeck eval m/4 ")


def test_no_if_every_candidate_fails_a_task(store: Store, add_scored: AddScored) -> None:
    add_teacher(add_scored, ["qa", "more"])
    add_scored({"qa": answers(DOCUMENTS), "more": answers(DOCUMENTS, 300)}, 0.1)
    best = add_scored({"qa": answers(DOCUMENTS, 200), "more": answers(DOCUMENTS)}, 0.2, recipe="base")
    found = decide_verdict(store, "m")
    # One failed task is enough; the cost does not matter then.
    assert (found.answer, found.candidate, found.next_steps) == ("no", best.ref, ())
    assert [task.noninferiority.verdict for task in candidate_of(found, best).tasks] == ["fail", "pass"]
    assert "each of the 2 candidates is surely worse than m/1 by more than the margin on some task" in found.sentence
    assert "The closest, base torch (m/3), retains 90.9% [" in found.sentence
    assert decide_verdict(store, "m", tasks=["more"]).answer == "yes"


def test_the_suggested_documents_or_margin_settle_the_verdict(store: Store, add_scored: AddScored) -> None:
    add_scored({"qa": answers(300)}, 1.0, kind="teacher")
    add_scored({"qa": answers(300, 6, 4)}, 0.2)
    found = decide_verdict(store, "m")
    assert (found.answer, found.default_margins) == ("not settled", True)
    [next_step] = found.next_steps
    count, margin = re.search(r"About ([\d,]+) documents .* Or accept a wider margin of ([\d.]+), ", next_step).groups()
    many = int(count.replace(",", ""))
    assert many > 2000
    assert "would settle it and show it as good" in next_step
    assert decide_verdict(store, "m", margins=Margins(default=float(margin))).answer == "yes"
    assert decide_verdict(store, "m", margins=Margins(default=0.95 * float(margin))).answer == "not settled"
    # Score that many documents with the same difference.
    add_scored({"qa": answers(many)}, 1.0, name="n", kind="teacher", alone=True)
    add_scored({"qa": answers(many, many * 6 // 300, many * 4 // 300)}, 0.2, name="n", teacher="n/1", alone=True)
    [settled] = decide_verdict(store, "n", against="n/1").candidates
    assert settled.quality == "pass"


def test_the_correction_covers_all_candidates(store: Store, add_scored: AddScored) -> None:
    add_scored({"qa": answers(400)}, 1.0, kind="teacher")
    close = add_scored({"qa": answers(400, 4, 2)}, 0.2)
    allowed = Margins(default=0.025)
    alone = decide_verdict(store, "m", margins=allowed)
    assert alone.answer == "yes"
    for _ in range(3):
        add_scored({"qa": answers(400, 7)}, 0.3)
    found = decide_verdict(store, "m", margins=allowed)
    [task] = candidate_of(found, close).tasks
    assert (found.answer, found.candidate) == ("not settled", close.ref)
    assert (task.noninferiority.uncorrected, task.noninferiority.verdict) == ("pass", "inconclusive")
    p_values = [each.tasks[0].noninferiority.p_value for each in found.candidates]
    assert [each.tasks[0].noninferiority.p_holm for each in found.candidates] == pytest.approx(
        holm_adjusted_p_values(p_values)
    )
    [next_step] = found.next_steps
    assert "Alone it would pass; corrected for 4 candidates it does not" in next_step
    # As many documents as a single test at a quarter of the level needs.
    [open_task] = candidate_of(found, close).open_tasks
    assert open_task.as_good
    spread = 0.025 * (1 - 0.025)  # variance of the difference of 0/1 scores at the margin
    quantiles = t_distribution.isf(0.05 / 4, 399) + t_distribution.isf(0.2, 399)
    assert open_task.documents == pytest.approx(spread * (quantiles / (0.025 - 0.005)) ** 2, rel=0.01)
    margin = float(re.search(r"a wider margin of ([\d.]+),", next_step)[1])
    assert 0.025 < margin < 0.04
    assert decide_verdict(store, "m", margins=Margins(default=margin)).answer == "yes"


def test_an_unmeasured_cost_leaves_the_verdict_open(store: Store, add_scored: AddScored) -> None:
    add_scored({"qa": answers(DOCUMENTS)}, kind="teacher")
    as_good = add_scored({"qa": answers(DOCUMENTS)})
    found = decide_verdict(store, "m")
    assert (found.answer, candidate_of(found, as_good).quality) == ("not settled", "pass")
    assert found.next_steps == (
        "Measure its cost in one run with the teacher's: limbeck eval m/2 --tasks qa --against m/1",
    )
    assert "The cost of running m/2: speed, memory, dollars." in found.not_measured
    for text in (render_markdown(found), render_html(found)):
        assert "Not measured." in text


def test_payback_counts_the_training_cost(store: Store, add_scored: AddScored) -> None:
    add_teacher(add_scored)
    add_scored({"qa": answers(DOCUMENTS)}, 0.5, training_cost=TRAINING_COST)
    [best] = decide_verdict(store, "m", tokens_per_day=1e6, prices=Prices.load(usd_per_hour=2.0)).candidates
    assert best.payback
    assert best.payback.training_cost_usd == pytest.approx(2.0)
    # The teacher takes 0.1 s for 128 tokens, the student half of that: 2 / 3600 * 0.05 s / 128 saved on each.
    assert best.payback.break_even_tokens.value == pytest.approx(2.0 / (2 / 3600 * 0.05 / 128))
    found = decide_verdict(store, "m", tokens_per_day=1e6, prices=Prices.load(usd_per_hour=2.0))
    assert found.sentence.endswith(
        "Making it cost $2; it pays back after 9.22 million [9.04 million, 9.4 million] tokens: 9.2 days at 1 million "
        "tokens a day."
    )
    assert not any(words.startswith("The cost of making") for words in found.not_measured)
    assert "| training | 3,600 s | $2 |" in render_markdown(found)
    assert "Dollars: your price, 2 USD/h (--usd-per-hour)" in render_markdown(found).replace("\\-", "-")


def test_an_exported_teacher_is_called_the_teacher_itself(store: Store, add_scored: AddScored) -> None:
    add_teacher(add_scored)
    add_scored(
        {"qa": answers(DOCUMENTS)}, 0.5, kind="onnx", engine="onnxruntime", precision="int8-weight", parent="m/1"
    )
    found = decide_verdict(store, "m")
    assert found.answer == "yes"
    assert "It is the teacher itself in another form" in found.sentence
    assert not any(words.startswith("The cost of making") for words in found.not_measured)


def test_the_newest_comparable_scorecard_with_cost_and_teacher_counts(
    store: Store, add_scored: AddScored, tmp_path: Path
) -> None:
    add_teacher(add_scored)
    version = add_scored({"qa": answers(DOCUMENTS, 300)}, 0.5)
    card = store.findings.scorecards(version)[0]
    parquet.write_table(documents_of({"qa": answers(DOCUMENTS)}), tmp_path / "new.parquet")
    # Scored again on another machine, then without a teacher: the newest with both cost and teacher counts.
    elsewhere = timed_cost(0.5, machine="another machine, 8 cores; torch 2")
    store.findings.add_scorecard(
        version,
        card.model_copy(update={"created": datetime(2026, 3, 1, tzinfo=UTC), "cost": elsewhere}),
        tmp_path / "new.parquet",
    )
    last = {"created": datetime(2026, 4, 1, tzinfo=UTC), "relative": None}
    store.findings.add_scorecard(version, card.model_copy(update=last), tmp_path / "new.parquet")
    add_scored({"qa": answers(DOCUMENTS, 2)}, 0.6)
    # Scores on other prompts cannot be compared.
    add_scored({"qa": answers(DOCUMENTS)}, 0.1, card={"prompts_digest": "changed"})
    found = decide_verdict(store, "m")
    assert {each.version for each in found.candidates} == {"m/2", "m/3"}
    assert candidate_of(found, version).quality == "pass"
    assert found.left_out.keys() == {"m/4"}
    assert any("m/3 measured on another machine" in words for words in found.not_measured)


def test_a_teacher_behind_an_api_is_compared_by_its_price(
    store: Store, add_scored: AddScored, limbeck_home: Path
) -> None:
    url, digest, scores = "http://localhost:1/v1#giant", "e" * 64, {"qa": answers(DOCUMENTS)}
    version = add_scored(scores, 0.5, alone=True)
    own = store.findings.scorecards(version)[0]
    empty: dict[str, Any] = {"retention": None, "task_retention": {}, "difference": {}}
    relative = Relative(teacher=url, teacher_digest=digest, cost_ratio=None, speedup=None, **empty)
    against = own.model_copy(update={"relative": relative})
    store.findings.add_scorecard(version, against, store.findings.documents(version, own))
    with pytest.raises(BadInput, match="is not scored"):
        decide_verdict(store, "m")
    folder = limbeck_home / "scorecards-local" / digest / "x"
    folder.mkdir(parents=True)
    teacher_card = own.model_copy(update={"artifact": digest, "model": url, "cost": None})
    (folder / "scorecard.json").write_text(teacher_card.model_dump_json())
    parquet.write_table(documents_of(scores), folder / "documents.parquet")
    write_manifest(folder)
    found = decide_verdict(store, "m")
    assert (found.teacher, found.teacher_engine, found.answer) == (url, "endpoint", "not settled")
    # The API's price is 1 dollar per million tokens; the student's 128 tokens take 0.05 s at 1 dollar an hour.
    giant = ApiEntry(
        usd_per_million_input_tokens=0.5, usd_per_million_output_tokens=1.5, date=date(2026, 1, 1), source="s"
    )
    prices = Prices(apis={"giant": giant}, machines=Prices.load(usd_per_hour=1.0).machines)
    found = decide_verdict(store, "m", against=url, prices=prices)
    [best] = found.candidates
    assert best.cost_ratio == pytest.approx(0.05 / 3600 / 128 * 1e6)
    assert (found.answer, best.cheaper) == ("yes", True)


def test_unknown_models_tasks_and_margins_are_refused(store: Store, add_scored: AddScored) -> None:
    with pytest.raises(BadInput, match="no model is registered"):
        decide_verdict(store, "m")
    add_scored({"qa": answers(DOCUMENTS)}, 1.0, kind="teacher")
    with pytest.raises(BadInput, match="no version of m was scored against a teacher") as error:
        decide_verdict(store, "m")
    assert error.value.fix == "limbeck eval m --tasks ... --against TEACHER"
    with pytest.raises(BadInput, match="no other version was scored on the same tasks and prompts as m/1"):
        decide_verdict(store, "m", against="m/1")
    unscored = add_scored()
    with pytest.raises(BadInput, match="m/2 is not scored") as error:
        decide_verdict(store, "m", against=unscored.ref)
    assert error.value.fix == "limbeck eval MODEL --tasks ... --against m/2"
    with pytest.raises(BadInput, match="m has no version 9"):
        decide_verdict(store, "m", against="m/9")
    with pytest.raises(BadInput, match="did you mean qa"):
        decide_verdict(store, "m", against="m/1", tasks=["qaa"])
    add_scored({"qa": answers(DOCUMENTS)}, 0.5)
    with pytest.raises(BadInput, match="did you mean acc"):
        decide_verdict(store, "m", margins=Margins(by_name={"ac": 0.1}))
