"""The chunked head and loss against whole logits: values, gradients of every parameter, and what is held at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from limbeck.distill.losses import chunked_head, divergences
from limbeck.distill.losses.chunked_head import Body, LazyLogits
from limbeck.distill.losses.distiller import Distiller
from limbeck.distill.losses.divergences import Samples, TopK
from limbeck.distill.recipe.schema import Objective
from tests.conftest import make_model

N, V, D, T, K = 11, 50, 6, 10, 4  # tokens, entries, width, width of the teacher, stored entries


@pytest.fixture
def student() -> LazyLogits:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))
    return LazyLogits(
        *(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    )


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(40, (N,), generator=torch.Generator().manual_seed(1))


def said_by(form: str) -> LazyLogits | divergences.StoredDistribution | None:
    """What a teacher said: by its hidden states and head, its logits, or a stored form; None where it is silent."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, T), (V, T)))
    logits = hidden @ weight.T
    values, ids = logits.log_softmax(-1).topk(K)
    return {
        "silent": None,
        "head": LazyLogits(hidden, weight),
        "padded": LazyLogits(hidden, weight, vocab_size=40),
        "logits": LazyLogits(logits, vocab_size=40),
        "topk": TopK(ids, values),
        "samples": Samples(ids, torch.rand(N, K, generator=generator, dtype=torch.float64), values[:, 0] * -1),
    }[form]


def whole(said: LazyLogits | divergences.StoredDistribution | None) -> divergences.TeacherDistribution | None:
    """The teacher's word with its logits worked out."""
    if not isinstance(said, LazyLogits):
        return said
    logits = said.hidden if said.weight is None else said.hidden @ said.weight.T
    return logits[:, : said.vocab_size]


def gradients(value: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("rows", [1, 3, N, 100])
@pytest.mark.parametrize(
    ("form", "objective"),
    [
        ("silent", Objective(labels=1.0)),
        ("head", Objective(divergence="forward_kl", labels=0.3, temperature=2.0)),
        ("padded", Objective(divergence="reverse_kl")),
        ("logits", Objective(divergence="jsd", beta=0.3)),
        ("topk", Objective(divergence="skew_kl", labels=0.5)),
        ("samples", Objective(divergence="forward_kl")),
    ],
)
def test_chunks_give_the_loss_of_whole_logits(
    student: LazyLogits,
    labels: torch.Tensor,
    form: str,
    objective: Objective,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_head, "LOGITS_CHUNK_BYTES", 4 * V * rows)
    leaves = [student.hidden, student.weight, student.bias]
    said = said_by(form)
    got, agreed = chunked_head.loss(student, labels, objective, said, counts_agreement=True)
    logits = student.hidden @ student.weight.T + student.bias
    wanted = divergences.loss(logits, labels, objective, whole(said))
    torch.testing.assert_close(got, wanted)
    # Scaled, as by the number of tokens.
    for ours, plain in zip(gradients(got / 7, leaves), gradients(wanted / 7, leaves), strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)  # sums are float32
    if said is not None:
        assert int(agreed) == int((logits.argmax(-1) == divergences.likeliest(whole(said))).sum())


def test_agreement_is_counted_on_demand_only(student: LazyLogits, labels: torch.Tensor) -> None:
    mine = LazyLogits(*(part.detach() for part in student[:3]))
    assert (
        int(chunked_head.loss(student, labels, Objective(divergence="forward_kl"), mine, counts_agreement=True)[1]) == N
    )
    assert int(chunked_head.loss(student, labels, Objective(divergence="forward_kl"), mine)[1]) == 0


def test_what_is_frozen_gets_no_gradient(student: LazyLogits, labels: torch.Tensor) -> None:
    frozen = student._replace(weight=student.weight.detach(), bias=student.bias.detach())
    chunked_head.loss(frozen, labels, Objective(labels=1.0), None)[0].backward()
    assert student.hidden.grad is not None
    with torch.no_grad():
        value = chunked_head.loss(student, labels, Objective(labels=1.0), None)[0]
    assert not value.requires_grad


def test_a_second_backward_pass_is_refused(student: LazyLogits, labels: torch.Tensor) -> None:
    """Its gradients were scaled in place: nothing is better than twice the scale."""
    value, _ = chunked_head.loss(student, labels, Objective(labels=1.0), None)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


class Widest(TorchDispatchMode):
    """Notes the most rows of any tensor with as many columns as the vocabulary has entries."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (300,) and tensor.is_contiguous():
                self.rows = max(self.rows, tensor.numel() // 300)
        return made


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three blocks of 24 tokens, one of them of two documents, a few tokens not to be predicted."""
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
    """The loss by the models' own logits."""
    rows = batch["labels"][:, 1:] != -100
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        said = teacher(**inputs).logits[:, :-1][rows]
    logits = student(**inputs).logits[:, :-1][rows]
    return divergences.loss(logits, batch["labels"][:, 1:][rows], objective, said) / int(rows.sum())


MIXED = Objective(divergence="forward_kl", labels=0.3, temperature=1.5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_a_step_is_that_of_the_models_own_logits(
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
    # Gemma 2 caps its logits after the head: not to be had in chunks.
    assert (Body.from_model(student).head is None) == (model_type == "gemma2")
    with Widest() as widest:
        losses = distiller(batch, int((batch["labels"][:, 1:] != -100).sum()))
        losses.loss.backward()
    assert int(losses.targets) == 3 * 23 - 5
    ours = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    wanted = plain_loss(student, teacher, MIXED, batch)
    wanted.backward()
    torch.testing.assert_close(losses.loss, wanted, rtol=1e-5, atol=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    if model_type != "gemma2":
        assert widest.rows == 7


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gemma2", {"final_logit_softcapping": 30.0}), ("granite", {"logits_scaling": 1.0 + 1e-6}), ("llama", {})],
)
def test_what_is_done_to_logits_after_the_head_is_found_out(model_type: str, settings: dict[str, float]) -> None:
    """Even where it hardly shows: a cap of 30 on the small logits of a fresh model."""
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model(model_type, num_key_value_heads=2, head_dim=8, **sizes, **settings)
    model = AutoModelForCausalLM.from_config(config).train()
    assert (Body.from_model(model).head is None) == bool(settings)
    assert model.training


def test_stored_rows_are_those_of_the_targets(batch: dict[str, torch.Tensor], tiny_llama: Path) -> None:
    """What is stored at a position without a target has no say; agreement is counted where it is asked for."""
    student = load(tiny_llama).eval()
    distiller = Distiller(student, Objective(divergence="reverse_kl"), None, 300)
    values, ids = (torch.randn(3, 24, 300, generator=torch.Generator().manual_seed(4)) * 3).log_softmax(-1).topk(K)
    values[0, 4:8] = torch.nan
    losses = distiller({**batch, "teacher": {"ids": ids, "logprobs": values}}, 10)
    logits = student(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    wanted = torch.zeros(())
    for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        said = TopK(ids[row, place][None], values[row, place][None])
        one = logits[row, place][None]
        wanted = wanted + divergences.loss(one, ids.new_zeros(1), distiller.objective, said) / 10
    torch.testing.assert_close(losses.loss, wanted, rtol=1e-4, atol=1e-5)
    assert int(losses.agreement_count) == 0
    ids[..., 0] = logits.argmax(-1)
    ids[0, :4, 0] += 1
    distiller.counts_agreement = True
    losses = distiller({**batch, "teacher": {"ids": ids % 300, "logprobs": values}}, 10)
    assert int(losses.agreement_count) == int(losses.targets) - 4


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padding_of_either_vocabulary(
    padded: str, batch: dict[str, torch.Tensor], tiny_llama: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """As of Qwen2.5, whose sizes have 151,936 or 152,064 entries for the same tokens."""
    wide = load(make_model(tmp_path / "wide", tokenizer_folder, "qwen2")).eval()
    wide.resize_token_embeddings(320)
    student, teacher = (wide, load(tiny_llama).eval()) if padded == "student" else (load(tiny_llama).eval(), wide)
    objective = Objective(divergence="forward_kl")
    got = Distiller(student, objective, teacher, 300)(batch, 10).loss
    rows = batch["labels"][:, 1:] != -100
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    log_q, said = (model(**inputs).logits[:, :-1][rows] for model in (student, teacher))
    p = Categorical(logits=said[:, :300])
    wanted = -(p.probs * log_q.log_softmax(-1)[:, :300]).sum() - p.entropy().sum()
    torch.testing.assert_close(got, wanted / 10, rtol=1e-3, atol=1e-4)


def test_accumulated_and_checkpointed(batch: dict[str, torch.Tensor], tiny_llama: Path, tiny_qwen2: Path) -> None:
    """Two halves of a batch under gradient checkpointing give the gradients of the whole one."""
    student, teacher = load(tiny_llama).train(), load(tiny_qwen2).eval()
    distiller = Distiller(student, MIXED, teacher, 300)
    targets = int((batch["labels"][:, 1:] != -100).sum())
    distiller(batch, targets).loss.backward()
    whole = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    distiller.gradient_checkpointing_enable()
    for half in (slice(0, 1), slice(1, 3)):
        distiller({name: array[half] for name, array in batch.items()}, targets).loss.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_under_bf16_autocast(batch: dict[str, torch.Tensor], tiny_llama: Path, tiny_qwen2: Path) -> None:
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


@pytest.mark.parametrize("saved", [None, ["embed_out"]])
def test_with_adapters_of_peft(
    saved: list[str] | None, batch: dict[str, torch.Tensor], tiny_neox: Path, tiny_qwen2: Path
) -> None:
    """The frozen head gets no gradient and the adapters get theirs; a head that peft wraps trains too."""
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(load(tiny_neox), LoraConfig(r=2, target_modules="all-linear", modules_to_save=saved))
    teacher = load(tiny_qwen2).eval()
    distiller = Distiller(student.train(), MIXED, teacher, 300)
    assert (Body.from_model(student).head is None) == bool(saved)
    distiller(batch, int((batch["labels"][:, 1:] != -100).sum())).loss.backward()
    ours = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    plain_loss(student, teacher, MIXED, batch).backward()
    assert set(ours) == {name for name, p in student.named_parameters() if p.requires_grad}
    assert any("lora" in name for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)
