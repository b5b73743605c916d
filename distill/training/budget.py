"""What a student's training may cost: limits in tokens, minutes and dollars, and when going on is not worth it.

A limit in tokens is a number of steps, known beforehand. One in minutes or dollars is met as the run goes: the
learning rate then follows the share of it that is used, so that it comes down to its end when the budget does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limbeck.distill.recipe.schema import Budget, Training
from limbeck.registry.core.errors import BadInput

WINDOW = 3  # evaluations that a gain is measured over: two differ by noise alone too often


class Spending(NamedTuple):
    """What a run took so far, over all its parts: seconds, evaluations included, and dollars."""

    seconds: float
    usd: float


class Evaluation(NamedTuple):
    """Held-out bits per byte after so many dollars."""

    usd: float
    bits_per_byte: float


def spending_of_run(budget: Budget, seconds: float, paid: float = 0.0) -> Spending:
    """Seconds, and dollars at this machine's price and `paid` to an endpoint before."""
    return Spending(seconds, paid + (budget.usd_per_hour or 0.0) * seconds / 3600)


def planned_steps(training: Training, blocks: int, processes: int = 1) -> int:
    """Optimizer steps as transformers' Trainer counts them."""
    if training.max_steps > 0:
        return training.max_steps
    batches = math.ceil(blocks / (training.per_device_train_batch_size * processes))
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def cap_steps_by_tokens(
    training: Training, budget: Budget, steps: int, tokens_per_step: int
) -> tuple[Training, str | None]:
    """`training` with no more steps than the budget has tokens for, and why there are fewer than `steps`.

    Raises:
        BadInput: tokens for less than one step.
    """
    if budget.max_tokens is None or budget.max_tokens >= steps * tokens_per_step:
        return training, None
    affordable = budget.max_tokens // tokens_per_step
    if affordable == 0:
        raise BadInput(
            f"budget.max_tokens is {budget.max_tokens} and a step reads {tokens_per_step} tokens",
            fix="give it more tokens, or set training.per_device_train_batch_size or data.max_length lower",
        )
    why = f"budget.max_tokens: {budget.max_tokens:,} tokens are {affordable} of {steps} steps"
    return training.model_copy(update={"max_steps": affordable}), why


def budget_share_used(budget: Budget, so_far: Spending) -> float:
    """How much of the minutes and dollars is used: from 0 to 1 and above; 0 where there is no limit."""
    used = [0.0]
    if budget.max_minutes:
        used.append(so_far.seconds / 60 / budget.max_minutes)
    if budget.max_usd:
        used.append(so_far.usd / budget.max_usd)
    return max(used)


def describe_reached_limit(budget: Budget, so_far: Spending) -> str:
    """Which limit in minutes or dollars was reached."""
    if budget.max_minutes and so_far.seconds / 60 / budget.max_minutes >= budget_share_used(budget, so_far):
        return f"budget.max_minutes: {so_far.seconds / 60:.4g} of {budget.max_minutes:g} minutes"
    return f"budget.max_usd: {so_far.usd:.4g} of {budget.max_usd or 0:g} dollars"


def gain_per_usd(evaluations: Sequence[Evaluation]) -> float | None:
    """Held-out bits per byte gained a dollar: the slope of a line through the last three evaluations.

    None before there are three, or where they cost nothing.
    """
    last = np.asarray(evaluations[-WINDOW:], dtype=float)
    if len(last) < WINDOW or last[-1, 0] <= last[0, 0]:
        return None
    slope, _ = np.polyfit(last[:, 0] - last[0, 0], last[:, 1], 1)
    return -float(slope)
