"""Adapters: only they are trained, a stopped run resumes with them, and they are merged into the student."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from limbeck.distill.data.blocks import Blocks, make_blocks
from limbeck.distill.data.document import Document
from limbeck.distill.recipe.schema import Lora, Objective, Training
from limbeck.distill.students.initialise import add_lora, merge_adapter
from limbeck.distill.training.trainer import Job, train
from limbeck.registry.checkpoints.load import load_model
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, lines_of_text

Limbeck = Callable[..., Any]


@pytest.fixture
def text(tokenizer_folder: Path) -> Blocks:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return make_blocks([Document("a", lines_of_text(200))], tokenizer, 32)


def make_job(model: PreTrainedModel, text: Blocks, folder: Path, **changes: Any) -> Job:
    training = Training(max_steps=6, per_device_train_batch_size=4, bf16=False, learning_rate=1e-2, eval_steps=100)
    training = training.model_copy(update=changes)
    return Job(model, text, text, Objective(labels=1.0), training, None, folder, seed=0, vocab_size=300)


def logits(model: PreTrainedModel, text: Blocks) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in text.batch(np.arange(4)).items() if k != "labels"}).logits


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_neox"])
def test_only_the_adapter_is_trained_and_it_is_merged(
    request: pytest.FixtureRequest, family: str, text: Blocks, tmp_path: Path
) -> None:
    plain = load_model(request.getfixturevalue(family))
    model = add_lora(copy.deepcopy(plain), Lora(r=2, lora_alpha=8), seed=0)
    assert type(model) is type(plain)
    assert torch.equal(logits(model, text), logits(plain, text))  # a new adapter changes nothing
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    train(make_job(model, text, tmp_path / "run"))
    unmerged = logits(model, text)
    assert (unmerged - logits(plain, text)).abs().max() > 1e-3
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged, text), unmerged, atol=1e-4, rtol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    adapted = 0
    for name, weight in plain.named_parameters():
        change = merged.get_parameter(name) - weight
        if change.abs().sum() > 0:
            assert torch.linalg.matrix_rank(change.detach(), rtol=1e-3) <= 2
            adapted += 1
    per_layer = {"tiny_llama": 7, "tiny_gpt2": 4, "tiny_neox": 4}[family]
    assert adapted == 2 * per_layer  # all linear layers, but neither embeddings nor head
    merged.save_pretrained(tmp_path / "saved")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(loaded, text), logits(merged, text))


def test_the_adapter_equals_the_formula_of_lora(tiny_llama: Path, text: Blocks) -> None:
    """W x + (alpha / r) B A x, for the named modules."""
    plain = load_model(tiny_llama)
    model = add_lora(copy.deepcopy(plain), Lora(r=4, lora_alpha=6, target_modules=("q_proj",)), seed=0)
    matrices = dict(model.named_parameters())
    assert sum("lora_" in name for name in matrices) == 2 * 2
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn.q_proj"
        down, up = (matrices[f"{path}.lora_{part}.default.weight"] for part in "AB")
        assert (down.shape, up.shape) == ((4, 32), (32, 4))
        up.data.normal_()
        plain.get_parameter(f"{path}.weight").data += 6 / 4 * up.data @ down.data
    torch.testing.assert_close(logits(model, text), logits(plain, text), atol=1e-4, rtol=1e-4)


def test_a_stopped_run_resumes_with_its_adapter(tiny_llama: Path, text: Blocks, tmp_path: Path) -> None:
    def initial_model() -> PreTrainedModel:
        return add_lora(load_model(tiny_llama), Lora(r=2, lora_dropout=0.1), seed=3)

    def stop(now: Any) -> None:
        if now.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    whole, resumed = initial_model(), initial_model()
    train(make_job(whole, text, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(make_job(resumed, text, tmp_path / "parts"), stop)
    resumed = initial_model()
    steps: list[int] = []
    train(make_job(resumed, text, tmp_path / "parts"), lambda now: steps.append(now.step))
    assert steps[0] in (4, 5)  # not from the first step
    for (name, one), (_, other) in zip(
        merge_adapter(whole).named_parameters(), merge_adapter(resumed).named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_activation_checkpointing_changes_nothing(tiny_llama: Path, text: Blocks, tmp_path: Path) -> None:
    plain, checkpointed = (add_lora(load_model(tiny_llama), Lora(r=2), seed=0) for _ in range(2))
    before = [p.detach().clone() for p in plain.parameters()]
    train(make_job(plain, text, tmp_path / "plain"))
    train(make_job(checkpointed, text, tmp_path / "checkpointed", activation_checkpointing=True))
    for old, one, other in zip(before, plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert torch.equal(old, one) != one.requires_grad


def recipe_with_lora(recipe: Path, start: str, lora: str) -> Path:
    text = recipe.read_text()
    begin, end = text.index("[students.small.config]"), text.index("[objectives")
    recipe.write_text(f"{text[:begin]}{start}\n[students.small.lora]\n{lora}\n{text[end:]}")
    return recipe


@pytest.mark.parametrize(
    ("start", "lora", "message"),
    [
        ("[students.small.prune]\nnum_hidden_layers = 1", 'target_modules = ["c_attn"]', "or some of: "),
        ('[students.small.config]\nmodel_type = "gpt2"', "r = 2", "begins from a config"),
    ],
)
def test_an_adapter_that_does_not_fit_is_bad_input(
    store: Store,
    limbeck: Limbeck,
    write_recipe: Callable[..., Path],
    tiny_llama: Path,
    start: str,
    lora: str,
    message: str,
) -> None:
    done = limbeck("distill", recipe_with_lora(write_recipe(tiny_llama, objectives=DISTILLED), start, lora))
    assert done.code == 2
    assert "recipe.toml:" in done.err
    assert "students.small.lora: " in done.err
    assert message in done.err
