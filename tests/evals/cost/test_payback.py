"""Payback, compared with numbers computed by hand."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import pytest

from limbeck.evals.cost.measure import median_estimate
from limbeck.evals.cost.payback import (
    BreakEvenRange,
    Payback,
    break_even_range,
    compute_payback,
    saving_per_million_tokens,
    training_cost_parts,
)
from limbeck.evals.cost.prices import ApiEntry, MachineEntry, Prices
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import BatchCost, Cost, Estimate, Relative, Scorecard, TrainingCost

PRICES = Prices(
    machines={
        "trainer": MachineEntry(match="GPU", usd_per_hour=7.2, date=date(2026, 1, 1), source="a"),
        "server": MachineEntry(match="CPU", usd_per_hour=3.6, date=date(2026, 1, 1), source="b"),
    },
    apis={
        "giant": ApiEntry(
            usd_per_million_input_tokens=2, usd_per_million_output_tokens=10, date=date(2026, 1, 1), source="c"
        )
    },
)
# 100 s of teacher and 400 s of training at 0.002 dollars a second.
TRAINING_COST = TrainingCost(
    training_seconds=400, teacher_seconds=100, students_sharing_teacher=2, tokens=10, machine="GPU, 8 cores"
)


def cost(rounds: list[float], run: str | None = "r", **changes: Any) -> Cost:
    """Batch 1 and 4 of 75 tokens in, 25 out; `rounds` in milliseconds; a batch of 4 takes twice as long as one."""
    loads = tuple(
        BatchCost(
            batch=batch,
            request_ms=tuple(factor * ms for ms in rounds),
            prefill_tokens_per_s=1,
            decode_tokens_per_s=1,
            p50_ms=factor * median_estimate(rounds).value,
            p95_ms=1,
            usd_per_million_tokens=factor * median_estimate(rounds).value / 3.6e6 / (batch * 100) * 1e6,
            peak_rss_bytes=1,
        )
        for batch, factor in ((1, 1.0), (4, 2.0))
    )
    fields: dict[str, Any] = dict(
        params=1,
        disk_bytes=1,
        requests=len(rounds),
        usd_per_hour=1.0,
        prompt_tokens=75,
        new_tokens=25,
        threads=1,
        machine="CPU, 2 cores; torch",
        protocol=2,
        run=run,
        loads=loads,
        **loads[0].model_dump(exclude={"batch", "request_ms"}),
    )
    return Cost(**fields | changes)


# At 0.001 dollars a second and 100 tokens a request, 1 ms is 0.01 dollars a million tokens.
TEACHER = cost([100.0, 110, 120, 90, 100, 100])
STUDENT = cost([20.0, 20, 30, 30, 20, 20])


def card(student: Cost | None = STUDENT, teacher: Cost | None = TEACHER, **changes: Any) -> Scorecard:
    relative = Relative(
        teacher="m/1",
        teacher_digest="t",
        retention=None,
        task_retention={},
        difference={},
        cost_ratio=None,
        speedup=None,
        teacher_cost=teacher,
    )
    fields: dict[str, Any] = dict(
        artifact="a",
        model="m/2",
        tasks={},
        tasks_digest="",
        prompts_digest="",
        harness="",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        cost=student,
        relative=relative,
        seconds=50.0,
    )
    return Scorecard(**fields | changes)


def test_the_figures_equal_those_computed_by_hand() -> None:
    found = compute_payback(card(), TRAINING_COST, PRICES, tokens_per_day=500_000)
    assert [(part.name, part.seconds, part.usd) for part in found.parts] == [
        ("teacher's forward passes, shared by 2 students", 100, pytest.approx(0.2)),
        ("training", 400, pytest.approx(0.8)),
        ("scoring", 50, pytest.approx(0.05)),
    ]
    assert found.training_cost_usd == pytest.approx(1.05)
    # Round by round the student is 80, 90, 90, 60, 80 and 80 ms faster.
    saved = found.saving_usd_per_million_tokens
    assert (saved.value, saved.low, saved.high) == pytest.approx((0.8, 0.6, 0.9))
    assert saved.confidence == 0.95
    assert found.student_usd_per_million_tokens == pytest.approx(0.2)
    assert found.teacher_usd_per_million_tokens == pytest.approx(1.0)
    tokens, days = found.break_even_tokens, found.break_even_days
    assert tokens.value == pytest.approx(1.05 / 0.8 * 1e6)
    assert (tokens.low, tokens.high) == (pytest.approx(1.05 / 0.9 * 1e6), pytest.approx(1.05 / 0.6 * 1e6))
    assert days
    assert days.value == pytest.approx(2.625)
    assert days.high == pytest.approx(3.5)
    assert found.prices == ("server, 3.6 USD/h (2026-01-01, b)", "trainer, 7.2 USD/h (2026-01-01, a)")
    assert Payback.model_validate_json(found.model_dump_json()) == found


def test_a_larger_batch_halves_all_dollars() -> None:
    found = compute_payback(card(), TRAINING_COST, PRICES, batch=4)
    # A batch of 4 takes twice the time for four times the tokens.
    assert found.saving_usd_per_million_tokens.value == pytest.approx(0.4)
    assert found.teacher_usd_per_million_tokens == pytest.approx(0.5)
    assert found.break_even_days is None
    with pytest.raises(BadInput, match="batches of 3 were not measured"):
        compute_payback(card(), TRAINING_COST, PRICES, batch=3)


def test_an_api_teacher_counts_in_the_training_cost_and_in_the_saving() -> None:
    training_cost = TRAINING_COST.model_copy(
        update={"api_model": "giant", "api_input_tokens": 500_000, "api_output_tokens": 200_000, "teacher_seconds": 0}
    )
    found = compute_payback(card(teacher=None), training_cost, PRICES, api_teacher="giant", scoring_seconds=0)
    assert [(part.seconds, part.usd) for part in found.parts] == [(400, pytest.approx(0.8)), (None, pytest.approx(3))]
    assert found.teacher == "giant"
    assert found.teacher_usd_per_million_tokens == pytest.approx(0.75 * 2 + 0.25 * 10)
    saved = found.saving_usd_per_million_tokens
    assert (saved.value, saved.low, saved.high) == pytest.approx((3.8, 3.7, 3.8))
    assert found.break_even_tokens.value == pytest.approx(1e6)
    assert any(price.startswith("giant, 2 and 10 USD") for price in found.prices)


def test_a_student_that_is_not_cheaper_never_breaks_even() -> None:
    never = compute_payback(card(student=TEACHER, teacher=STUDENT), TRAINING_COST, PRICES, tokens_per_day=1)
    assert never.break_even_tokens == never.break_even_days == BreakEvenRange(value=None, low=None, high=None)
    assert break_even_range(1.0, Estimate(value=0.5, low=-0.1, high=1)) == BreakEvenRange(value=2e6, low=1e6, high=None)
    assert break_even_range(1.0, Estimate(value=-0.5, low=-1, high=0.5)) == BreakEvenRange(
        value=None, low=2e6, high=None
    )
    assert break_even_range(1.0, Estimate(value=0, low=0, high=0)) == BreakEvenRange(value=None, low=None, high=None)
    assert break_even_range(0.0, Estimate(value=1, low=1, high=1)) == BreakEvenRange(value=0, low=0, high=0)


def test_costs_of_two_runs_give_a_wider_interval() -> None:
    priced = {"usd_per_hour": 3.6}
    one_run = saving_per_million_tokens(STUDENT.model_copy(update=priced), TEACHER.model_copy(update=priced))
    two_runs = saving_per_million_tokens(
        STUDENT.model_copy(update={"run": "s", **priced}), TEACHER.model_copy(update=priced)
    )
    assert (one_run.value, one_run.low, one_run.high) == pytest.approx((0.8, 0.6, 0.9))
    assert (two_runs.value, two_runs.low, two_runs.high) == pytest.approx((0.8, 0.6, 1.0))
    assert two_runs.confidence == pytest.approx(0.9)


def test_work_that_took_no_time_is_not_listed() -> None:
    training_cost = TRAINING_COST.model_copy(update={"teacher_seconds": 0})
    assert [part.name for part in training_cost_parts(training_cost, PRICES, 0, "CPU")] == ["training"]


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"cost": None}, {}, "not timed in one run"),
        ({"relative": None}, {}, "not timed in one run"),
        ({"cost": cost([1.0], loads=())}, {}, "not timed in one run"),
        ({}, {"tokens_per_day": 0}, "a load of 0 tokens a day"),
        ({}, {"tokens_per_day": float("nan")}, "a load of nan tokens a day"),
        ({}, {"api_teacher": "gaint"}, "no price for 'gaint'"),
    ],
)
def test_unknown_costs_and_prices_are_reported(changes: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compute_payback(card(**changes), TRAINING_COST, PRICES, **more)
