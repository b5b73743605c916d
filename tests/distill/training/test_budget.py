"""A budget in tokens, minutes or dollars ends a run with a student that can be used, and says why."""

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
from limbeck.distill.training import budget
from limbeck.distill.training import callbacks as watching
from limbeck.distill.training.budget import Evaluation
from limbeck.distill.training.callbacks import Progress
from limbeck.distill.training.trainer import Job, TrainingResult, train
from limbeck.registry.core.errors import BadInput
from tests.conftest import SIZES
from tests.distill.conftest import lines_of_text

TRAINING = Training(max_steps=40, per_device_train_batch_size=2, logging_steps=1, eval_steps=100, bf16=False)
STEP = 2 * 32  # tokens


@pytest.fixture(scope="module")
def text() -> tuple[Any, Blocks, Blocks]:
    """A tokenizer, blocks to train on and held-out ones."""
    documents = [Document(str(seed), lines_of_text(20, seed)) for seed in range(12)]
    tokenizer = train_tokenizer(documents, 300, 10_000)
    return tokenizer, make_blocks(documents[3:], tokenizer, 32), make_blocks(documents[:3], tokenizer, 32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The watch's clock: it stands still unless `now`, in seconds, is moved."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(watching, "time", clock)
    return clock


@pytest.fixture
def run(tmp_path: Path, text: tuple[Any, Blocks, Blocks], clock: SimpleNamespace) -> Callable[..., Any]:
    """Train a tiny Llama, each step a minute long; what came of it, its learning rates and its weights."""
    tokenizer, blocks, held = text

    def go(
        limits: Budget, training: Training = TRAINING, paid: float = 0.0, folder: str = "run", stop: int | None = None
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

        job = Job(student, blocks, held, Objective(labels=1.0), training, None, tmp_path / folder, 0, 300, limits)
        trained = train(job._replace(paid_usd=paid), on_progress, on_log)
        assert math.isfinite(bits_per_byte(student, held))
        return trained, list(rates.values()), student.state_dict()

    return go


def test_tokens_are_fewer_steps_with_a_schedule_of_their_own(run: Callable[..., Any]) -> None:
    limited, rates, weights = run(Budget(max_tokens=10 * STEP + 5), folder="limited")
    _, planned_rates, planned = run(Budget(), TRAINING.model_copy(update={"max_steps": 10}), folder="planned")
    assert limited.tokens == 10 * STEP
    assert limited.stop_reason == f"budget.max_tokens: {10 * STEP + 5} tokens are 10 of 40 steps"
    assert rates == planned_rates
    assert all(torch.equal(weights[name], planned[name]) for name in weights)


@pytest.mark.parametrize(
    ("limits", "paid", "why"),
    [
        (Budget(max_minutes=10), 0.0, "budget.max_minutes: 10 of 10 minutes used at step 11"),
        (Budget(max_usd=2, usd_per_hour=6), 1.0, "budget.max_usd: 2 of 2 dollars used at step 11"),
        (Budget(max_usd=5, max_minutes=10, usd_per_hour=6), 0.0, "budget.max_minutes: 10 of 10 minutes used"),
    ],
)
def test_the_learning_rate_comes_down_with_the_time_or_money(
    run: Callable[..., Any], limits: Budget, paid: float, why: str
) -> None:
    trained, rates, _ = run(limits, paid=paid)
    assert trained.stop_reason.startswith(why)
    assert trained.tokens == 11 * STEP
    peak = 2e-3
    assert rates[-1] < 0.1 * peak  # as at the end of 40 steps
    assert len(rates) == 11
    if not paid:
        assert max(rates) > 0.8 * peak
    assert sorted(rates[3:], reverse=True) == rates[3:]


def test_what_does_not_bind_changes_nothing(run: Callable[..., Any]) -> None:
    short = TRAINING.model_copy(update={"max_steps": 12})
    plain, rates, weights = run(Budget(), short, folder="plain")
    wide = Budget(max_tokens=10**6, max_minutes=10**6, max_usd=1e6, usd_per_hour=1.0)
    trained, wide_rates, same = run(wide, short, folder="wide")
    assert plain.stop_reason is trained.stop_reason is None
    assert trained.tokens == plain.tokens == 12 * STEP
    assert rates == wide_rates
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_resumed_run_counts_what_was_spent_before(run: Callable[..., Any]) -> None:
    saving = TRAINING.model_copy(update={"save_minutes": 1.0})
    with pytest.raises(KeyboardInterrupt):
        run(Budget(max_minutes=10), saving, stop=7)
    trained, rates, _ = run(Budget(max_minutes=10), saving)
    # Six minutes and their checkpoint: the step that was cut short is not counted.
    assert trained.stop_reason == "budget.max_minutes: 10 of 10 minutes used at step 12"
    assert trained.seconds == 11 * 60  # the last step's own minute with them
    assert rates[-1] < 0.1 * 2e-3


def test_a_run_stops_when_it_is_not_worth_its_money(run: Callable[..., Any]) -> None:
    often = TRAINING.model_copy(update={"eval_steps": 5, "max_steps": 20})
    trained, rates, _ = run(Budget(usd_per_hour=60, stop_when=100.0), often)  # a dollar a step
    assert "bits per byte a dollar gained at step 15, and 100 asked for" in trained.stop_reason
    assert trained.tokens == 16 * STEP  # a tenth of the way again to cool down
    assert rates[14] > 2e-4  # the schedule itself was not at its end
    going_on, _, _ = run(Budget(usd_per_hour=60, stop_when=1e-9), often, folder="worth it")
    assert going_on.stop_reason is None


def test_cooling_down_ends_at_nothing(run: Callable[..., Any]) -> None:
    often = TRAINING.model_copy(update={"eval_steps": 15, "max_steps": 1000, "lr_scheduler_type": "constant"})
    trained, rates, _ = run(Budget(usd_per_hour=60, stop_when=100.0), often)
    assert "at step 45" in trained.stop_reason
    np.testing.assert_allclose(rates[45:], 2e-3 * np.arange(4, 0, -1) / 4, atol=1e-9)


def test_the_gain_is_the_slope_of_the_last_three_evaluations() -> None:
    evaluations = [Evaluation(0.5, 9.0), Evaluation(1.0, 3.0), Evaluation(1.5, 2.5), Evaluation(2.5, 2.4)]
    slope = stats.linregress([1.0, 1.5, 2.5], [3.0, 2.5, 2.4]).slope
    assert budget.gain_per_usd(evaluations) == pytest.approx(-slope)
    assert budget.gain_per_usd(evaluations[:2]) is None
    # One noisy evaluation amid a steady gain does not look like the end of it.
    noisy = [Evaluation(1.0, 3.0), Evaluation(2.0, 3.1), Evaluation(3.0, 2.8)]
    assert (budget.gain_per_usd(noisy) or 0) > 0.05


def test_less_than_a_step_is_bad_input(run: Callable[..., Any]) -> None:
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


def test_steps_of_epochs_are_what_a_run_takes(run: Callable[..., Any], text: tuple[Any, Blocks, Blocks]) -> None:
    training = TRAINING.model_copy(update={"max_steps": -1, "num_train_epochs": 0.5, "gradient_accumulation_steps": 3})
    trained, _, _ = run(Budget(), training)
    assert trained.tokens == budget.planned_steps(training, len(text[1].ids)) * 3 * STEP
