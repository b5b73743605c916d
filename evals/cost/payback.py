"""Payback: the cost of making a student, compared with what each token that it serves saves.

The training cost is seconds times the hourly price of their machine (the teacher's forward passes, training, scoring)
plus API tokens times their price. The saving is the teacher's dollars minus the student's per million prompt and new
tokens together, at the batch size and lengths that were measured. Break-even is training cost over saving; its interval
comes from that of the saving. This holds for a machine that is paid by the hours it works; one that is paid while it
idles saves less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limbeck.evals.cost.measure import cost_at_batch, is_same_run, median_estimate, reprice
from limbeck.evals.cost.prices import Prices
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Cost, Estimate, Frozen, Record, Scorecard, TrainingCost

API_TOKENS_PART = "tokens of the teacher's API"


class TrainingCostPart(Frozen):
    """One part of a student's training cost."""

    name: str
    seconds: float | None  # None for API tokens
    usd: float
    price: str


class BreakEvenRange(Frozen):
    """A number with its interval; None means never."""

    value: float | None
    low: float | None
    high: float | None


class Payback(Record):
    """When a student's saving has paid its training cost."""

    student: str
    teacher: str
    parts: tuple[TrainingCostPart, ...]
    training_cost_usd: float
    batch: int
    prompt_tokens: int
    new_tokens: int
    student_usd_per_million_tokens: float
    teacher_usd_per_million_tokens: float
    saving_usd_per_million_tokens: Estimate
    break_even_tokens: BreakEvenRange
    tokens_per_day: float | None
    break_even_days: BreakEvenRange | None
    prices: tuple[str, ...]  # descriptions of all prices that the figures use


def compute_payback(
    card: Scorecard,
    training_cost: TrainingCost,
    prices: Prices,
    *,
    tokens_per_day: float | None = None,
    batch: int = 1,
    scoring_seconds: float | None = None,
    api_teacher: str | None = None,
) -> Payback:
    """When the student of a scorecard has paid for itself; all dollars are at `prices`.

    Args:
        card: with the student's cost, and the teacher's cost of the same run in its relative part.
        training_cost: of the student (see `limbeck.registry.mlflow.store.Store.runs.training_cost`).
        tokens_per_day: the load, prompt and new tokens together.
        batch: the batch size that the student is served at; it must have been measured.
        scoring_seconds: the scorecard's own if None.
        api_teacher: the API model that the student replaces; its price is used in place of the teacher's cost.

    Raises:
        BadInput: an unknown cost or price; a load that is not above zero.
    """
    teacher_cost = card.relative.teacher_cost if card.relative else None
    if card.cost is None or not card.cost.loads or (teacher_cost is None and api_teacher is None):
        raise BadInput(
            f"{card.model}: its saving is unknown, because it and its teacher were not timed in one run",
            fix=f"limbeck eval {card.model} --tasks ... --against TEACHER",
        )
    if tokens_per_day is not None and not tokens_per_day > 0:
        raise BadInput(f"a load of {tokens_per_day:g} tokens a day", fix="give one above 0")
    student = _price_cost(card.cost, prices)
    if api_teacher is None:
        assert teacher_cost is not None
        saving = _saving_over_model(student, _price_cost(teacher_cost, prices), batch)
    else:
        saving = _saving_over_api(student, api_teacher, prices, batch)
    seconds = (card.seconds or 0.0) if scoring_seconds is None else scoring_seconds
    parts = training_cost_parts(training_cost, prices, seconds, card.cost.machine)
    training_cost_usd = sum(part.usd for part in parts)
    tokens = break_even_range(training_cost_usd, saving.usd_per_million_tokens)
    used_prices = [student.price, saving.teacher_price, *(part.price for part in parts)]
    return Payback(
        student=card.model,
        teacher=api_teacher or (card.relative.teacher if card.relative else ""),
        parts=tuple(parts),
        training_cost_usd=training_cost_usd,
        batch=batch,
        prompt_tokens=student.prompt_tokens,
        new_tokens=student.new_tokens,
        student_usd_per_million_tokens=cost_at_batch(student, batch).usd_per_million_tokens,
        teacher_usd_per_million_tokens=saving.teacher_usd_per_million_tokens,
        saving_usd_per_million_tokens=saving.usd_per_million_tokens,
        break_even_tokens=tokens,
        tokens_per_day=tokens_per_day,
        break_even_days=_divide_range(tokens, tokens_per_day) if tokens_per_day else None,
        prices=tuple(dict.fromkeys(price for price in used_prices if price)),
    )


class _Saving(NamedTuple):
    """What a million tokens of the student save, and what they cost with the teacher."""

    usd_per_million_tokens: Estimate
    teacher_usd_per_million_tokens: float
    teacher_price: str | None


def _saving_over_model(student: Cost, teacher: Cost, batch: int) -> _Saving:
    dollars = cost_at_batch(teacher, batch).usd_per_million_tokens
    return _Saving(saving_per_million_tokens(student, teacher, batch), dollars, teacher.price)


def _saving_over_api(student: Cost, api_model: str, prices: Prices, batch: int) -> _Saving:
    dollars, price = api_usd_per_million_tokens(api_model, student, prices)
    of_api = Estimate(value=dollars, low=dollars, high=dollars, confidence=1.0)
    return _Saving(_subtract_estimates(of_api, _usd_estimate(student, batch)), dollars, price)


def training_cost_parts(
    training_cost: TrainingCost, prices: Prices, scoring_seconds: float, scoring_machine: str
) -> list[TrainingCostPart]:
    """A student's training cost, part by part; forward passes that several students share count in full.

    Raises:
        BadInput: a machine or an API model without a price.
    """
    students = training_cost.students_sharing_teacher
    shared = f", shared by {students} students" if students > 1 else ""
    timed_parts = [
        (f"teacher's forward passes{shared}", training_cost.teacher_seconds, training_cost.machine),
        ("training", training_cost.training_seconds, training_cost.machine),
        ("scoring", scoring_seconds, scoring_machine),
    ]
    parts = []
    for name, seconds, machine in timed_parts:
        if seconds:
            price = prices.machine_price(machine)
            parts.append(
                TrainingCostPart(
                    name=name, seconds=seconds, usd=seconds / 3600 * price.usd_per_hour, price=price.description
                )
            )
    if training_cost.api_model and training_cost.api_usd is not None:
        description = f"{training_cost.api_model}, at the recipe's prices"
        parts.append(TrainingCostPart(name=API_TOKENS_PART, seconds=None, usd=training_cost.api_usd, price=description))
    elif training_cost.api_model:
        api = prices.api_price(training_cost.api_model)
        dollars = training_cost.api_input_tokens * api.usd_per_million_input_tokens
        dollars += training_cost.api_output_tokens * api.usd_per_million_output_tokens
        parts.append(TrainingCostPart(name=API_TOKENS_PART, seconds=None, usd=dollars / 1e6, price=api.description))
    return parts


def saving_per_million_tokens(student: Cost, teacher: Cost, batch: int = 1) -> Estimate:
    """Dollars that a million tokens of the student save.

    For two costs of one run it is the median over paired rounds. For costs of two runs it is the difference of their
    medians, with the widest interval that theirs allow.
    """
    if not is_same_run(student, teacher):
        return _subtract_estimates(_usd_estimate(teacher, batch), _usd_estimate(student, batch))
    return median_estimate(np.subtract(_usd_of_rounds(teacher, batch), _usd_of_rounds(student, batch)))


def break_even_range(training_cost_usd: float, saving: Estimate) -> BreakEvenRange:
    """Tokens after which the saving has paid the training cost; None if it never does."""

    def tokens(dollars: float) -> float | None:
        return training_cost_usd / dollars * 1e6 if dollars > 0 else None

    # A higher saving breaks even sooner.
    return BreakEvenRange(value=tokens(saving.value), low=tokens(saving.high), high=tokens(saving.low))


def _divide_range(span: BreakEvenRange, per_day: float) -> BreakEvenRange:
    numbers = {name: value / per_day if value is not None else None for name, value in span}
    return BreakEvenRange(**numbers)


def _price_cost(cost: Cost, prices: Prices) -> Cost:
    return reprice(cost, *prices.machine_price(cost.machine))


def _usd_of_rounds(cost: Cost, batch: int) -> Sequence[float]:
    """Dollars per million tokens, round by round."""
    tokens = batch * (cost.prompt_tokens + cost.new_tokens)
    return [ms / 3.6e6 * cost.usd_per_hour / tokens * 1e6 for ms in cost_at_batch(cost, batch).request_ms]


def _usd_estimate(cost: Cost, batch: int) -> Estimate:
    return median_estimate(_usd_of_rounds(cost, batch))


def _subtract_estimates(a: Estimate, b: Estimate) -> Estimate:
    """a - b with the widest interval that theirs allow; its confidence is Bonferroni's for both together."""
    confidence = max(0.0, a.confidence + b.confidence - 1)
    return Estimate(value=a.value - b.value, low=a.low - b.high, high=a.high - b.low, confidence=confidence)


def api_usd_per_million_tokens(model: str, student: Cost, prices: Prices) -> tuple[float, str]:
    """Dollars per million tokens of an API, for requests as long as the student's; and the price's description."""
    price = prices.api_price(model)
    dollars = student.prompt_tokens * price.usd_per_million_input_tokens
    dollars += student.new_tokens * price.usd_per_million_output_tokens
    return dollars / (student.prompt_tokens + student.new_tokens), price.description
