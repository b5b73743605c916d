"""Whether a student pays: what it took to make, against what each token that it serves saves.

Making is seconds times the hourly price of their machine (the teacher's forward passes, training, scoring) and
tokens of an API times their price. Saving is the teacher's dollars less the student's, for a million prompt and
new tokens together, at the batch size and lengths that were measured. Break-even is making over saving; its
interval is that of the saving. It holds where a machine is paid by the hours it works: one that is paid while it
idles saves less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from limbeck.evals.cost.measure import cost_at_batch, is_same_run, median_estimate, reprice
from limbeck.evals.cost.prices import Prices
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Cost, Estimate, Frozen, Record, Scorecard, TrainingCost

API_TOKENS_PART = "tokens of the teacher's API"


class TrainingCostPart(Frozen):
    """A part of what making a student took."""

    what: str
    seconds: float | None  # None: tokens of an API
    usd: float
    price: str


class BreakEvenRange(Frozen):
    """A number with its interval, of which any may be None: never."""

    value: float | None
    low: float | None
    high: float | None


class Payback(Record):
    """When a student has paid for itself."""

    student: str
    teacher: str
    parts: tuple[TrainingCostPart, ...]
    making_usd: float
    batch: int
    prompt_tokens: int
    new_tokens: int
    student_usd_per_million_tokens: float
    teacher_usd_per_million_tokens: float
    saving_usd_per_million_tokens: Estimate
    break_even_tokens: BreakEvenRange
    tokens_per_day: float | None
    break_even_days: BreakEvenRange | None
    prices: tuple[str, ...]  # all that the figures used


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
    """When the student of a scorecard has paid for itself; every dollar is at `prices`.

    Args:
        card: with its cost, and the teacher's of the same run in its relative part.
        training_cost: what the student took (`limbeck.registry.mlflow.store.Store.making`).
        tokens_per_day: the load, prompt and new tokens together.
        batch: the batch size it is served at, one that was measured.
        scoring_seconds: the scorecard's own where None.
        api_teacher: the API model that the student stands in for; its price counts in place of the teacher's cost.

    Raises:
        BadInput: a cost or a price that is not known; a load that is not above zero.
    """
    teacher = card.relative.teacher_cost if card.relative else None
    if card.cost is None or not card.cost.loads or (teacher is None and api_teacher is None):
        raise BadInput(
            f"{card.model}: what it saves is not known, since it and its teacher were not timed in one run",
            fix=f"limbeck eval {card.model} --tasks ... --against TEACHER",
        )
    if tokens_per_day is not None and not tokens_per_day > 0:
        raise BadInput(f"a load of {tokens_per_day:g} tokens a day", fix="give one above 0")
    student = _price_cost(card.cost, prices)
    used = [student.price]
    if api_teacher is not None:
        dollars, words = api_usd_per_million_tokens(api_teacher, student, prices)
        saved = _subtract_estimates(
            Estimate(value=dollars, low=dollars, high=dollars, confidence=1.0), _usd(student, batch)
        )
        used.append(words)
    else:
        assert teacher is not None
        teacher = _price_cost(teacher, prices)
        dollars = cost_at_batch(teacher, batch).usd_per_million_tokens
        saved = saving_per_million_tokens(student, teacher, batch)
        used.append(teacher.price)
    seconds = (card.seconds or 0.0) if scoring_seconds is None else scoring_seconds
    parts = training_cost_parts(training_cost, prices, seconds, card.cost.machine)
    made = sum(part.usd for part in parts)
    tokens = break_even_range(made, saved)
    return Payback(
        student=card.model,
        teacher=api_teacher or (card.relative.teacher if card.relative else ""),
        parts=tuple(parts),
        making_usd=made,
        batch=batch,
        prompt_tokens=student.prompt_tokens,
        new_tokens=student.new_tokens,
        student_usd_per_million_tokens=cost_at_batch(student, batch).usd_per_million_tokens,
        teacher_usd_per_million_tokens=dollars,
        saving_usd_per_million_tokens=saved,
        break_even_tokens=tokens,
        tokens_per_day=tokens_per_day,
        break_even_days=_divide_range(tokens, tokens_per_day) if tokens_per_day else None,
        prices=tuple(dict.fromkeys(words for words in [*used, *(part.price for part in parts)] if words)),
    )


def training_cost_parts(
    training_cost: TrainingCost, prices: Prices, scoring_seconds: float, scoring_machine: str
) -> list[TrainingCostPart]:
    """What making a student cost, part by part; a capture that several students share counts in full."""
    shared = (
        f", shared by {training_cost.students_sharing_teacher} students"
        if training_cost.students_sharing_teacher > 1
        else ""
    )
    spent = [
        (f"teacher's forward passes{shared}", training_cost.teacher_seconds, training_cost.machine),
        ("training", training_cost.training_seconds, training_cost.machine),
        ("scoring", scoring_seconds, scoring_machine),
    ]
    parts = []
    for what, seconds, machine in spent:
        if seconds:
            price = prices.machine_price(machine)
            parts.append(
                TrainingCostPart(
                    what=what, seconds=seconds, usd=seconds / 3600 * price.usd_per_hour, price=price.description
                )
            )
    if training_cost.api_model and training_cost.api_usd is not None:
        words = f"{training_cost.api_model}, at the recipe's prices"
        parts.append(TrainingCostPart(what=API_TOKENS_PART, seconds=None, usd=training_cost.api_usd, price=words))
    elif training_cost.api_model:
        api = prices.api_price(training_cost.api_model)
        dollars = training_cost.api_input_tokens * api.usd_per_million_input_tokens
        dollars += training_cost.api_output_tokens * api.usd_per_million_output_tokens
        parts.append(TrainingCostPart(what=API_TOKENS_PART, seconds=None, usd=dollars / 1e6, price=api.description))
    return parts


def saving_per_million_tokens(student: Cost, teacher: Cost, batch: int = 1) -> Estimate:
    """Dollars that a million tokens of the student save.

    Of one run: the median over paired rounds. Of two runs: the difference of the two medians, from the least to
    the most that their intervals allow.
    """
    if not is_same_run(student, teacher):
        return _subtract_estimates(_usd(teacher, batch), _usd(student, batch))
    ours, theirs = (_usd_of_rounds(cost, batch) for cost in (student, teacher))
    return median_estimate(np.subtract(theirs, ours))


def break_even_range(training_cost_usd: float, saved: Estimate) -> BreakEvenRange:
    """Tokens after which a student has paid for itself."""

    def tokens(dollars: float) -> float | None:
        return training_cost_usd / dollars * 1e6 if dollars > 0 else None

    # The more it saves, the sooner.
    return BreakEvenRange(value=tokens(saved.value), low=tokens(saved.high), high=tokens(saved.low))


def _divide_range(span: BreakEvenRange, per_day: float) -> BreakEvenRange:
    numbers = {name: value / per_day if value is not None else None for name, value in span}
    return BreakEvenRange(**numbers)


def _price_cost(cost: Cost, prices: Prices) -> Cost:
    return reprice(cost, *prices.machine_price(cost.machine))


def _usd_of_rounds(cost: Cost, batch: int) -> Sequence[float]:
    """Dollars per million tokens, round by round."""
    tokens = batch * (cost.prompt_tokens + cost.new_tokens)
    return [ms / 3.6e6 * cost.usd_per_hour / tokens * 1e6 for ms in cost_at_batch(cost, batch).request_ms]


def _usd(cost: Cost, batch: int) -> Estimate:
    return median_estimate(_usd_of_rounds(cost, batch))


def _subtract_estimates(a: Estimate, b: Estimate) -> Estimate:
    """a - b, from the least to the most that both intervals allow; as sure as both of them together (Bonferroni)."""
    sure = max(0.0, a.confidence + b.confidence - 1)
    return Estimate(value=a.value - b.value, low=a.low - b.high, high=a.high - b.low, confidence=sure)


def api_usd_per_million_tokens(model: str, student: Cost, prices: Prices) -> tuple[float, str]:
    """Dollars per million tokens of an API, for requests as long as the student's."""
    price = prices.api_price(model)
    dollars = student.prompt_tokens * price.usd_per_million_input_tokens
    dollars += student.new_tokens * price.usd_per_million_output_tokens
    return dollars / (student.prompt_tokens + student.new_tokens), price.description
