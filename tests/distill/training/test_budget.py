"""A budget in tokens, minutes or dollars ends a run with a usable student and reports why."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from limbeck.distill.data.blocks import Blocks, make_blocks, train_tokenizer
from limbeck.distill.data.document import Document
from limbeck.distill.models.heldout import bits_per_byte
from limbeck.distill.recipe.schema import Budget, Objective, Training
from limbeck.distill.students.initialise import fresh_model
from limbeck.distill.training import budget, callbacks
from limbeck.distill.training.budget import Evaluation
from limbeck.distill.training.callbacks import Progress
from limbeck.distill.training.trainer import Job, TrainingResult, train
from limbeck.registry.core.errors import BadInput
from tests.conftest import SIZES
from tests.distill.conftest import lines_of_text

TRAINING = Training(max_steps=40, per_device_train_batch_size=2, logging_steps=1, eval_steps=100, bf16=False)
TOKENS_PER_STEP = 2 * 32


@pytest.fixture(scope="module")
def text() -> tuple[Any, Blocks, Blocks]:
    """A tokenizer, blocks to train on and held-out ones."""
    documents = [Document(str(seed), lines_of_text(20, seed)) for seed in range(12)]
    tokenizer = train_tokenizer(documents, 300, 10_000)
    return tokenizer, make_blocks(documents[3:], tokenizer, 32), make_blocks(documents[:3], tokenizer, 32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monitor's clock: stands still until a test changes `now`, in seconds."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


@pytest.fixture
def run(tmp_path: Path, text: tuple[Any, Blocks, Blocks], clock: SimpleNamespace) -> Callable[..., Any]:
    """Train a tiny Llama with steps of one minute each; returns the result, learning rates and weights."""
    tokenizer, blocks, heldout = text

    def go(
        limits: Budget,
        training: Training = TRAINING,
        paid_usd: float = 0.0,
        folder: str = "run",
        stop: int | None = None,
    ) -> tuple[TrainingResult, list[float], dict[str, torch.Tensor]]:
        student = fresh_model({"model_type": "llama", **SIZES["llama"]}, tokenizer, 32, seed=0)
        rates: dict[int, float] = {}

        def on_progress(now: Progress) -> None:
            clock.now += 60
            if now.step == stop:
                raise KeyboardInterrupt

        def on_log(values: dict[str, float], step: int) -> None:
            if "learning_rate" in values:
                rates[step] = values["learning_rate"]

        job = Job(student, blocks, heldout, Objective(labels=1.0), training, None, tmp_path / folder, 0, 300, limits)
        trained = train(job._replace(paid_usd=paid_usd), on_progress, on_log)
        assert math.isfinite(bits_per_byte(student, heldout))
        return trained, list(rates.values()), student.state_dict()

    return go


def test_a_token_budget_shortens_the_run_and_its_schedule(run: Callable[..., Any]) -> None:
    limited, rates, weights = run(Budget(max_tokens=10 * TOKENS_PER_STEP + 5), folder="limited")
    _, planned_rates, planned = run(Budget(), TRAINING.model_copy(update={"max_steps": 10}), folder="planned")
    assert limited.tokens == 10 * TOKENS_PER_STEP
    assert limited.stop_reason == f"budget.max_tokens: {10 * TOKENS_PER_STEP + 5} tokens are 10 of 40 steps"
    assert rates == planned_rates
    assert all(torch.equal(weights[name], planned[name]) for name in weights)


@pytest.mark.parametrize(
    ("limits", "paid_usd", "reason"),
    [
        (Budget(max_minutes=10), 0.0, "budget.max_minutes: 10 of 10 minutes used at step 11"),
        (Budget(max_usd=2, usd_per_hour=6), 1.0, "budget.max_usd: 2 of 2 dollars used at step 11"),
        (Budget(max_usd=5, max_minutes=10, usd_per_hour=6), 0.0, "budget.max_minutes: 10 of 10 minutes used"),
    ],
)
def test_the_learning_rate_falls_with_the_used_time_or_money(
    run: Callable[..., Any], limits: Budget, paid_usd: float, reason: str
) -> None:
    trained, rates, _ = run(limits, paid_usd=paid_usd)
    assert trained.stop_reason.startswith(reason)
    assert trained.tokens == 11 * TOKENS_PER_STEP
    peak = 2e-3
    assert rates[-1] < 0.1 * peak  # as after 40 steps
    assert len(rates) == 11
    if not paid_usd:
        assert max(rates) > 0.8 * peak
    assert sorted(rates[3:], reverse=True) == rates[3:]


def test_a_budget_that_is_not_reached_changes_nothing(run: Callable[..., Any]) -> None:
    short = TRAINING.model_copy(update={"max_steps": 12})
    plain, rates, weights = run(Budget(), short, folder="plain")
    wide = Budget(max_tokens=10**6, max_minutes=10**6, max_usd=1e6, usd_per_hour=1.0)
    trained, wide_rates, same = run(wide, short, folder="wide")
    assert plain.stop_reason is trained.stop_reason is None
    assert trained.tokens == plain.tokens == 12 * TOKENS_PER_STEP
    assert rates == wide_rates
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_resumed_run_counts_earlier_spending(run: Callable[..., Any]) -> None:
    saving = TRAINING.model_copy(update={"save_minutes": 1.0})
    with pytest.raises(KeyboardInterrupt):
        run(Budget(max_minutes=10), saving, stop=7)
    trained, rates, _ = run(Budget(max_minutes=10), saving)
    # Six minutes up to the checkpoint; the interrupted step is not counted.
    assert trained.stop_reason == "budget.max_minutes: 10 of 10 minutes used at step 12"
    assert trained.seconds == 11 * 60  # includes the minute of the last step
    assert rates[-1] < 0.1 * 2e-3


def test_a_run_stops_when_its_gain_per_dollar_is_too_low(run: Callable[..., Any]) -> None:
    often = TRAINING.model_copy(update={"eval_steps": 5, "max_steps": 20})
    trained, rates, _ = run(Budget(usd_per_hour=60, stop_when=100.0), often)  # a dollar per step
    assert " bits per byte per dollar at step 15, below 100" in trained.stop_reason
    assert trained.tokens == 16 * TOKENS_PER_STEP  # one tenth of the steps so far to cool down
    assert rates[14] > 2e-4  # the schedule itself had not ended
    worth_it, _, _ = run(Budget(usd_per_hour=60, stop_when=1e-9), often, folder="worth it")
    assert worth_it.stop_reason is None


def test_cooling_down_ends_at_a_learning_rate_of_zero(run: Callable[..., Any]) -> None:
    often = TRAINING.model_copy(update={"eval_steps": 15, "max_steps": 1000, "lr_scheduler_type": "constant"})
    trained, rates, _ = run(Budget(usd_per_hour=60, stop_when=100.0), often)
    assert "at step 45" in trained.stop_reason
    np.testing.assert_allclose(rates[45:], 2e-3 * np.arange(4, 0, -1) / 4, atol=1e-9)


def test_the_gain_is_the_slope_of_the_last_three_evaluations() -> None:
    evaluations = [Evaluation(0.5, 9.0), Evaluation(1.0, 3.0), Evaluation(1.5, 2.5), Evaluation(2.5, 2.4)]
    slope = stats.linregress([1.0, 1.5, 2.5], [3.0, 2.5, 2.4]).slope
    assert budget.gain_per_usd(evaluations) == pytest.approx(-slope)
    assert budget.gain_per_usd(evaluations[:2]) is None
    # One noisy evaluation in a steady gain does not end the run.
    noisy = [Evaluation(1.0, 3.0), Evaluation(2.0, 3.1), Evaluation(3.0, 2.8)]
    assert (budget.gain_per_usd(noisy) or 0) > 0.05


def test_a_budget_below_one_step_is_bad_input(run: Callable[..., Any]) -> None:
    with pytest.raises(BadInput, match=r"budget\.max_tokens is 63 and a step reads 64 tokens"):
        run(Budget(max_tokens=63))


@pytest.mark.parametrize(
    ("epochs", "accumulation", "processes", "steps"), [(1.0, 1, 1, 13), (2.5, 3, 1, 13), (1.0, 2, 2, 4)]
)
def test_steps_are_counted_as_the_trainer_counts_them(
    epochs: float, accumulation: int, processes: int, steps: int
) -> None:
    training = Training(
        num_train_epochs=epochs, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation
    )
    assert budget.planned_steps(training, 50, processes) == steps


def test_a_run_in_epochs_takes_the_planned_steps(run: Callable[..., Any], text: tuple[Any, Blocks, Blocks]) -> None:
    training = TRAINING.model_copy(update={"max_steps": -1, "num_train_epochs": 0.5, "gradient_accumulation_steps": 3})
    trained, _, _ = run(Budget(), training)
    assert trained.tokens == budget.planned_steps(training, len(text[1].ids)) * 3 * TOKENS_PER_STEP
