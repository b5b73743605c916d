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

from limbeck.evals.cost.measure import in_one_run, load_of, median, priced
from limbeck.evals.cost.prices import Prices
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Cost, Estimate, Frozen, Record, Scorecard, TrainingCost

API = "tokens of the teacher's API"


class Part(Frozen):
    """A part of what making a student took."""

    what: str
    seconds: float | None  # None: tokens of an API
    usd: float
    price: str


class Span(Frozen):
    """A number with its interval, of which any may be None: never."""

    value: float | None
    low: float | None
    high: float | None


class Payback(Record):
    """When a student has paid for itself."""

    student: str
    teacher: str
    parts: tuple[Part, ...]
    making_usd: float
    batch: int
    prompt_tokens: int
    new_tokens: int
    student_usd_per_million_tokens: float
    teacher_usd_per_million_tokens: float
    saving_usd_per_million_tokens: Estimate
    break_even_tokens: Span
    tokens_per_day: float | None
    break_even_days: Span | None
    prices: tuple[str, ...]  # all that the figures used


def payback(
    card: Scorecard,
    making: TrainingCost,
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
        making: what the student took (`limbeck.registry.mlflow.store.Store.making`).
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
    student = _at(card.cost, prices)
    used = [student.price]
    if api_teacher is not None:
        dollars, words = api_usd(api_teacher, student, prices)
        saved = _less(Estimate(value=dollars, low=dollars, high=dollars, confidence=1.0), _usd(student, batch))
        used.append(words)
    else:
        assert teacher is not None
        teacher = _at(teacher, prices)
        dollars = load_of(teacher, batch).usd_per_million_tokens
        saved = saving(student, teacher, batch)
        used.append(teacher.price)
    seconds = (card.seconds or 0.0) if scoring_seconds is None else scoring_seconds
    parts = making_parts(making, prices, seconds, card.cost.machine)
    made = sum(part.usd for part in parts)
    tokens = break_even(made, saved)
    return Payback(
        student=card.model,
        teacher=api_teacher or (card.relative.teacher if card.relative else ""),
        parts=tuple(parts),
        making_usd=made,
        batch=batch,
        prompt_tokens=student.prompt_tokens,
        new_tokens=student.new_tokens,
        student_usd_per_million_tokens=load_of(student, batch).usd_per_million_tokens,
        teacher_usd_per_million_tokens=dollars,
        saving_usd_per_million_tokens=saved,
        break_even_tokens=tokens,
        tokens_per_day=tokens_per_day,
        break_even_days=_over(tokens, tokens_per_day) if tokens_per_day else None,
        prices=tuple(dict.fromkeys(words for words in [*used, *(part.price for part in parts)] if words)),
    )


def making_parts(making: TrainingCost, prices: Prices, scoring_seconds: float, scoring_machine: str) -> list[Part]:
    """What making a student cost, part by part; a capture that several students share counts in full."""
    shared = f", shared by {making.students_sharing_teacher} students" if making.students_sharing_teacher > 1 else ""
    spent = [
        (f"teacher's forward passes{shared}", making.teacher_seconds, making.machine),
        ("training", making.training_seconds, making.machine),
        ("scoring", scoring_seconds, scoring_machine),
    ]
    parts = []
    for what, seconds, machine in spent:
        if seconds:
            price = prices.of_machine(machine)
            parts.append(Part(what=what, seconds=seconds, usd=seconds / 3600 * price.usd_per_hour, price=price.words))
    if making.api_model and making.api_usd is not None:
        words = f"{making.api_model}, at the recipe's prices"
        parts.append(Part(what=API, seconds=None, usd=making.api_usd, price=words))
    elif making.api_model:
        api = prices.of_api(making.api_model)
        dollars = making.api_input_tokens * api.usd_per_million_input_tokens
        dollars += making.api_output_tokens * api.usd_per_million_output_tokens
        parts.append(Part(what=API, seconds=None, usd=dollars / 1e6, price=api.words))
    return parts


def saving(student: Cost, teacher: Cost, batch: int = 1) -> Estimate:
    """Dollars that a million tokens of the student save.

    Of one run: the median over paired rounds. Of two runs: the difference of the two medians, from the least to
    the most that their intervals allow.
    """
    if not in_one_run(student, teacher):
        return _less(_usd(teacher, batch), _usd(student, batch))
    ours, theirs = (_usd_of_rounds(cost, batch) for cost in (student, teacher))
    return median(np.subtract(theirs, ours))


def break_even(making_usd: float, saved: Estimate) -> Span:
    """Tokens after which a student has paid for itself."""

    def tokens(dollars: float) -> float | None:
        return making_usd / dollars * 1e6 if dollars > 0 else None

    # The more it saves, the sooner.
    return Span(value=tokens(saved.value), low=tokens(saved.high), high=tokens(saved.low))


def _over(span: Span, per_day: float) -> Span:
    numbers = {name: value / per_day if value is not None else None for name, value in span}
    return Span(**numbers)


def _at(cost: Cost, prices: Prices) -> Cost:
    return priced(cost, *prices.of_machine(cost.machine))


def _usd_of_rounds(cost: Cost, batch: int) -> Sequence[float]:
    """Dollars per million tokens, round by round."""
    tokens = batch * (cost.prompt_tokens + cost.new_tokens)
    return [ms / 3.6e6 * cost.usd_per_hour / tokens * 1e6 for ms in load_of(cost, batch).request_ms]


def _usd(cost: Cost, batch: int) -> Estimate:
    return median(_usd_of_rounds(cost, batch))


def _less(a: Estimate, b: Estimate) -> Estimate:
    """a - b, from the least to the most that both intervals allow; as sure as both of them together (Bonferroni)."""
    sure = max(0.0, a.confidence + b.confidence - 1)
    return Estimate(value=a.value - b.value, low=a.low - b.high, high=a.high - b.low, confidence=sure)


def api_usd(model: str, student: Cost, prices: Prices) -> tuple[float, str]:
    """Dollars per million tokens of an API, for requests as long as the student's."""
    price = prices.of_api(model)
    dollars = student.prompt_tokens * price.usd_per_million_input_tokens
    dollars += student.new_tokens * price.usd_per_million_output_tokens
    return dollars / (student.prompt_tokens + student.new_tokens), price.words
