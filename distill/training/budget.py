"""Limits of a student's training in tokens, minutes and dollars, and what another dollar of training brings.

A limit in tokens is a number of steps, known before the run. A limit in minutes or dollars is reached during the
run: the learning rate follows the used share of the budget, so that its schedule ends when the budget does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from limbeck.distill.recipe.schema import Budget, Training
from limbeck.registry.core.errors import BadInput

WINDOW = 3  # evaluations that a gain is measured over: two often differ by noise alone


class Spending(NamedTuple):
    """What a run took so far, over all its parts: seconds, including evaluations, and dollars."""

    seconds: float
    usd: float


class Evaluation(NamedTuple):
    """Held-out bits per byte after `usd` dollars."""

    usd: float
    bits_per_byte: float


def spending_of_run(budget: Budget, seconds: float, paid_usd: float = 0.0) -> Spending:
    """Seconds, and dollars: the seconds at this machine's price, and `paid_usd` paid to an endpoint before."""
    return Spending(seconds, paid_usd + (budget.usd_per_hour or 0.0) * seconds / 3600)


def planned_steps(training: Training, blocks: int, processes: int = 1) -> int:
    """Optimizer steps as transformers' Trainer counts them."""
    if training.max_steps > 0:
        return training.max_steps
    batches = math.ceil(blocks / (training.per_device_train_batch_size * processes))
    return math.ceil(training.num_train_epochs * math.ceil(batches / training.gradient_accumulation_steps))


def cap_steps_by_tokens(
    training: Training, budget: Budget, steps: int, tokens_per_step: int
) -> tuple[Training, str | None]:
    """Cap the steps of `training` at what `budget.max_tokens` pays for.

    Returns:
        The training settings, and why they have fewer than `steps` steps; None if they do not.

    Raises:
        BadInput: the budget has tokens for less than one step.
    """
    if budget.max_tokens is None or budget.max_tokens >= steps * tokens_per_step:
        return training, None
    affordable = budget.max_tokens // tokens_per_step
    if affordable == 0:
        raise BadInput(
            f"budget.max_tokens is {budget.max_tokens} and a step reads {tokens_per_step} tokens",
            fix="raise it, or lower training.per_device_train_batch_size or data.max_length",
        )
    reason = f"budget.max_tokens: {budget.max_tokens:,} tokens are {affordable} of {steps} steps"
    return training.model_copy(update={"max_steps": affordable}), reason


def budget_share_used(budget: Budget, spending: Spending) -> float:
    """The used share of the minutes or dollars, whichever is larger: 0 to 1 and above; 0 without such a limit."""
    shares = [0.0]
    if budget.max_minutes:
        shares.append(spending.seconds / 60 / budget.max_minutes)
    if budget.max_usd:
        shares.append(spending.usd / budget.max_usd)
    return max(shares)


def describe_reached_limit(budget: Budget, spending: Spending) -> str:
    """Which limit in minutes or dollars was reached, in words."""
    if budget.max_minutes and spending.seconds / 60 / budget.max_minutes >= budget_share_used(budget, spending):
        return f"budget.max_minutes: {spending.seconds / 60:.4g} of {budget.max_minutes:g} minutes"
    return f"budget.max_usd: {spending.usd:.4g} of {budget.max_usd or 0:g} dollars"


def gain_per_usd(evaluations: Sequence[Evaluation]) -> float | None:
    """Held-out bits per byte gained per dollar: the slope of a line through the last three evaluations.

    None before there are three, or if they cost nothing.
    """
    last = np.asarray(evaluations[-WINDOW:], dtype=float)
    if len(last) < WINDOW or last[-1, 0] <= last[0, 0]:
        return None
    slope, _ = np.polyfit(last[:, 0] - last[0, 0], last[:, 1], 1)
    return -float(slope)
