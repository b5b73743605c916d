"""The loss computed in chunks has the value and the gradients of the loss of whole logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.distill.losses import chunked_head, divergences
from limbeck.distill.losses.chunked_head import LazyLogits, SplitModel
from limbeck.distill.losses.divergences import Samples, TopK
from limbeck.distill.recipe.schema import Objective

N, V, D, T, K = 11, 50, 6, 10, 4  # tokens, vocabulary, student width, teacher width, stored tokens


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


def teacher_in_form(form: str) -> LazyLogits | divergences.StoredDistribution | None:
    """A teacher's distribution as hidden states and head, as logits, or in a stored form; None for "none"."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, T), (V, T)))
    logits = hidden @ weight.T
    values, ids = logits.log_softmax(-1).topk(K)
    return {
        "none": None,
        "head": LazyLogits(hidden, weight),
        "padded": LazyLogits(hidden, weight, vocab_size=40),
        "logits": LazyLogits(logits, vocab_size=40),
        "topk": TopK(ids, values),
        "samples": Samples(ids, torch.rand(N, K, generator=generator, dtype=torch.float64), values[:, 0] * -1),
    }[form]


def whole(teacher: LazyLogits | divergences.StoredDistribution | None) -> divergences.TeacherDistribution | None:
    """The teacher's distribution with its logits computed at once."""
    if not isinstance(teacher, LazyLogits):
        return teacher
    logits = teacher.hidden if teacher.weight is None else teacher.hidden @ teacher.weight.T
    return logits[:, : teacher.vocab_size]


def gradients(value: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, leaves))


@pytest.mark.parametrize("rows", [1, 3, N, 100])
@pytest.mark.parametrize(
    ("form", "objective"),
    [
        ("none", Objective(labels=1.0)),
        ("head", Objective(divergence="forward_kl", labels=0.3, temperature=2.0)),
        ("padded", Objective(divergence="reverse_kl")),
        ("logits", Objective(divergence="jsd", beta=0.3)),
        ("topk", Objective(divergence="skew_kl", labels=0.5)),
        ("samples", Objective(divergence="forward_kl")),
    ],
)
def test_loss_in_chunks_equals_loss_of_whole_logits(
    student: LazyLogits,
    labels: torch.Tensor,
    form: str,
    objective: Objective,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunked_head, "LOGITS_CHUNK_BYTES", 4 * V * rows)
    leaves = [student.hidden, student.weight, student.bias]
    teacher = teacher_in_form(form)
    got, agreed = chunked_head.loss(student, labels, objective, teacher, counts_agreement=True)
    logits = student.hidden @ student.weight.T + student.bias
    wanted = divergences.loss(logits, labels, objective, whole(teacher))
    torch.testing.assert_close(got, wanted)
    # Scaled, as when divided by the number of tokens.
    for gradient, expected in zip(gradients(got / 7, leaves), gradients(wanted / 7, leaves), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)  # sums are float32
    if teacher is not None:
        assert int(agreed) == int((logits.argmax(-1) == divergences.likeliest(whole(teacher))).sum())


def test_agreement_is_counted_only_on_request(student: LazyLogits, labels: torch.Tensor) -> None:
    same = LazyLogits(*(part.detach() for part in student[:3]))
    assert (
        int(chunked_head.loss(student, labels, Objective(divergence="forward_kl"), same, counts_agreement=True)[1]) == N
    )
    assert int(chunked_head.loss(student, labels, Objective(divergence="forward_kl"), same)[1]) == 0


def test_frozen_parameters_get_no_gradient(student: LazyLogits, labels: torch.Tensor) -> None:
    frozen = student._replace(weight=student.weight.detach(), bias=student.bias.detach())
    chunked_head.loss(frozen, labels, Objective(labels=1.0), None)[0].backward()
    assert student.hidden.grad is not None
    with torch.no_grad():
        value = chunked_head.loss(student, labels, Objective(labels=1.0), None)[0]
    assert not value.requires_grad


def test_a_second_backward_pass_is_refused(student: LazyLogits, labels: torch.Tensor) -> None:
    """The first pass scales the stored gradients in place, so a second one would scale them twice."""
    value, _ = chunked_head.loss(student, labels, Objective(labels=1.0), None)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("gemma2", {"final_logit_softcapping": 30.0}), ("granite", {"logits_scaling": 1.0 + 1e-6}), ("llama", {})],
)
def test_a_model_that_changes_logits_after_the_head_is_not_split(model_type: str, settings: dict[str, float]) -> None:
    """Even if the change is tiny: a cap of 30 on the small logits of a fresh model."""
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model(model_type, num_key_value_heads=2, head_dim=8, **sizes, **settings)
    model = AutoModelForCausalLM.from_config(config).train()
    assert (SplitModel.from_model(model).head is None) == bool(settings)
    assert model.training
