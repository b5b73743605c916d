"""The distiller's loss and gradients equal those of the models' own logits, and it computes logits in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from limbeck.distill.losses import chunked_head, divergences
from limbeck.distill.losses.chunked_head import SplitModel
from limbeck.distill.losses.distiller import Distiller
from limbeck.distill.losses.divergences import TopK
from limbeck.distill.recipe.schema import Objective
from tests.conftest import make_model

K = 4  # stored tokens


class LargestLogits(TorchDispatchMode):
    """Records the most rows of any tensor whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (300,) and tensor.is_contiguous():
                self.rows = max(self.rows, tensor.numel() // 300)
        return output


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three blocks of 24 tokens; one holds two documents, and a few tokens are no targets."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(300, (3, 24), generator=generator)
    positions = torch.arange(24).repeat(3, 1)
    positions[1, 10:] -= 10
    labels = ids.clone()
    labels[0, 5:9] = labels[1, 10] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def plain_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, objective: Objective, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The loss computed from the models' own logits."""
    rows = batch["labels"][:, 1:] != -100
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits[:, :-1][rows]
    logits = student(**inputs).logits[:, :-1][rows]
    return divergences.loss(logits, batch["labels"][:, 1:][rows], objective, teacher_logits) / int(rows.sum())


MIXED = Objective(divergence="forward_kl", labels=0.3, temperature=1.5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_loss_and_gradients_equal_those_of_the_models_own_logits(
    model_type: str,
    batch: dict[str, torch.Tensor],
    tiny_qwen2: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_head, "LOGITS_CHUNK_BYTES", 4 * 300 * 7)
    student = load(make_model(tmp_path / "student", tokenizer_folder, model_type))
    teacher = load(tiny_qwen2).eval()
    distiller = Distiller(student.eval(), MIXED, teacher, 300)  # no dropout
    # Gemma 2 caps its logits after the head, so it cannot be split.
    assert (SplitModel.from_model(student).head is None) == (model_type == "gemma2")
    with LargestLogits() as largest:
        losses = distiller(batch, int((batch["labels"][:, 1:] != -100).sum()))
        losses.loss.backward()
    assert int(losses.targets) == 3 * 23 - 5
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    wanted = plain_loss(student, teacher, MIXED, batch)
    wanted.backward()
    torch.testing.assert_close(losses.loss, wanted, rtol=1e-5, atol=1e-5)
    for name, parameter in student.named_parameters():
        expected = parameter.grad
        torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if model_type != "gemma2":
        assert largest.rows == 7


def test_stored_outputs_are_used_at_targets_only(batch: dict[str, torch.Tensor], tiny_llama: Path) -> None:
    """Positions without a target do not count; agreement is counted only on request."""
    student = load(tiny_llama).eval()
    distiller = Distiller(student, Objective(divergence="reverse_kl"), None, 300)
    values, ids = (torch.randn(3, 24, 300, generator=torch.Generator().manual_seed(4)) * 3).log_softmax(-1).topk(K)
    values[0, 4:8] = torch.nan
    losses = distiller({**batch, "teacher": {"ids": ids, "logprobs": values}}, 10)
    logits = student(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    wanted = torch.zeros(())
    for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        stored = TopK(ids[row, place][None], values[row, place][None])
        position_logits = logits[row, place][None]
        wanted = wanted + divergences.loss(position_logits, ids.new_zeros(1), distiller.objective, stored) / 10
    torch.testing.assert_close(losses.loss, wanted, rtol=1e-4, atol=1e-5)
    assert int(losses.agreement_count) == 0
    ids[..., 0] = logits.argmax(-1)
    ids[0, :4, 0] += 1
    distiller.counts_agreement = True
    losses = distiller({**batch, "teacher": {"ids": ids % 300, "logprobs": values}}, 10)
    assert int(losses.agreement_count) == int(losses.targets) - 4


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_embeddings_of_student_or_teacher_may_be_padded(
    padded: str, batch: dict[str, torch.Tensor], tiny_llama: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """As in Qwen2.5, whose model sizes have 151,936 or 152,064 rows for the same tokens."""
    wide = load(make_model(tmp_path / "wide", tokenizer_folder, "qwen2")).eval()
    wide.resize_token_embeddings(320)
    narrow = load(tiny_llama).eval()
    student, teacher = wide, narrow
    if padded == "teacher":
        student, teacher = narrow, wide
    objective = Objective(divergence="forward_kl")
    got = Distiller(student, objective, teacher, 300)(batch, 10).loss
    rows = batch["labels"][:, 1:] != -100
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    log_q, teacher_logits = (model(**inputs).logits[:, :-1][rows] for model in (student, teacher))
    p = Categorical(logits=teacher_logits[:, :300])
    wanted = -(p.probs * log_q.log_softmax(-1)[:, :300]).sum() - p.entropy().sum()
    torch.testing.assert_close(got, wanted / 10, rtol=1e-3, atol=1e-4)


def test_gradients_accumulate_under_activation_checkpointing(
    batch: dict[str, torch.Tensor], tiny_llama: Path, tiny_qwen2: Path
) -> None:
    """Two halves of a batch give the gradients of the whole batch."""
    student, teacher = load(tiny_llama).train(), load(tiny_qwen2).eval()
    distiller = Distiller(student, MIXED, teacher, 300)
    targets = int((batch["labels"][:, 1:] != -100).sum())
    distiller(batch, targets).loss.backward()
    whole = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    distiller.activation_checkpointing_enable()
    for half in (slice(0, 1), slice(1, 3)):
        distiller({name: array[half] for name, array in batch.items()}, targets).loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_loss_and_gradients_under_bf16_autocast(
    batch: dict[str, torch.Tensor], tiny_llama: Path, tiny_qwen2: Path
) -> None:
    student, teacher = load(tiny_llama).train(), load(tiny_qwen2).eval()
    distiller = Distiller(student, MIXED, teacher, 300)
    exact = distiller(batch, 64).loss
    exact.backward()
    weight = student.get_output_embeddings().weight
    wanted = weight.grad.clone()
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = distiller(batch, 64).loss
    rounded.backward()
    assert rounded.dtype == weight.grad.dtype == torch.float32
    assert rounded != exact  # it did run in bfloat16
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
    assert torch.cosine_similarity(weight.grad.flatten(), wanted.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft_adapters_are_trained(
    saved: list[str] | None, batch: dict[str, torch.Tensor], tiny_neox: Path, tiny_qwen2: Path
) -> None:
    """Adapters get gradients and a frozen head gets none; a head that peft wraps is trained too."""
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(load(tiny_neox), LoraConfig(r=2, target_modules="all-linear", modules_to_save=saved))
    teacher = load(tiny_qwen2).eval()
    distiller = Distiller(student.train(), MIXED, teacher, 300)
    assert (SplitModel.from_model(student).head is None) == bool(saved)
    distiller(batch, int((batch["labels"][:, 1:] != -100).sum())).loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    plain_loss(student, teacher, MIXED, batch).backward()
    assert set(gradients) == {name for name, p in student.named_parameters() if p.requires_grad}
    assert any("lora" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)
