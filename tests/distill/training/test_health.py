"""A run that diverges stops with the step and the cause, before its weights change, and registers nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.distill.data.blocks import make_blocks
from limbeck.distill.data.document import Document
from limbeck.distill.recipe.schema import Objective, Training
from limbeck.distill.training import health
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.checkpoints.load import load_tokenizer
from limbeck.registry.core.errors import Refused
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, lines_of_text


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path) -> Callable[..., None]:
    """Train a student on labels; keywords are keys of [training]."""
    documents = [Document(str(seed), lines_of_text(20, seed)) for seed in range(24)]
    blocks = make_blocks(documents, load_tokenizer(tiny_llama), 32)

    def go(student: PreTrainedModel, **changes: Any) -> None:
        settings = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 2, "bf16": False}
        training = Training(**(settings | changes))
        train(Job(student, blocks, blocks, Objective(labels=1.0), training, None, tmp_path / "run", 0, 300))

    return go


def spoil(module: torch.nn.Module, after: int, factor: float) -> None:
    """Multiply the module's output by `factor` after its first `after` forward passes in training."""
    passes = 0

    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += module.training
        return output * factor if passes > after else output

    module.register_forward_hook(hook)


def test_values_that_are_not_finite_are_traced_to_their_layer(
    run: Callable[..., None], tiny_llama: Path, tmp_path: Path
) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    spoil(student.model.layers[1].mlp, 4, math.nan)
    with pytest.raises(Refused) as refused:
        run(student=student, save_minutes=1e-9)
    message = str(refused.value)
    assert "diverged at step 5" in message
    assert "come out of student.model.layers.1.mlp;" in message
    assert "checkpoint-4" in message
    assert "learning_rate than 0.002" in message
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert all(
        parameter.isfinite().all() for parameter in student.parameters()
    )  # stopped before the optimizer used the gradients


def test_a_gradient_that_is_not_finite_is_named(run: Callable[..., None], tiny_llama: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    weight = student.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(3), math.inf))
    with pytest.raises(Refused, match=r"step 1: .*gradient of student\.model\.layers\.0\.mlp\.up_proj\.weight"):
        run(student=student)
    assert weight.isfinite().all()


def test_weights_that_are_not_finite_are_named(run: Callable[..., None], tiny_llama: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        student.model.norm.weight[2] = math.nan
    with pytest.raises(Refused, match=r"step 1: the weights student\.model\.norm\.weight are not finite"):
        run(student=student)


def test_a_loss_that_rises_and_stays_high_stops_the_run(run: Callable[..., None], tiny_llama: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny_llama)
    spoil(student.model.norm, 30, -30.0)
    with pytest.raises(Refused, match=r"diverged at step \d+: the loss rose from .* and stayed there for 20 steps"):
        run(student=student, max_steps=70, logging_steps=4, eval_steps=1000, learning_rate=1e-4)


FALLING = [8 * 0.9**n for n in range(40)]


@pytest.mark.parametrize(
    ("losses", "rises"),
    [
        (FALLING, False),
        (FALLING + [50.0] * 2, False),  # a bad batch or two
        (FALLING + [9.0] * 30, True),
        ([0.5, 0.45] * 20 + [0.9, 1.3] * 20, False),  # less than one nat
        ([0.5, 0.45] * 20 + [1.9, 2.3] * 20, True),
        ([3.0], False),
    ],
)
def test_what_counts_as_a_rise(losses: list[float], rises: bool) -> None:
    assert (health.describe_loss_rise(losses, logging_steps=1) is not None) == rises


def test_a_run_that_diverges_registers_nothing(
    store: Store, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path, limbeck_home: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra="learning_rate = 1e30\nwarmup_steps = 0.0\n")
    result = limbeck("distill", recipe)
    assert result.code == 1
    assert "training diverged at step 2: " in result.err
    assert "nothing was registered" in result.err
    assert "set a lower training.learning_rate" in result.err
    assert "Traceback" not in result.err
    assert [version.kind for version in store.versions()] == ["teacher"]
