"""Losses equal those of torch.distributions and plain formulas, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from limbeck.distill.losses.divergences import (
    DIVERGENCES,
    Samples,
    TopK,
    divergence,
    likeliest,
    log_softmax_at,
    loss,
)
from limbeck.distill.recipe import schema
from limbeck.distill.recipe.schema import Objective

N, V, K = 6, 40, 5
KINDS = list(DIVERGENCES)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits (N, V) that require gradients, teacher logits (N, V), labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (N,), generator=generator)


def formulas(objective: Objective, p: torch.Tensor, q: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Each divergence by torch.distributions from probabilities (N, V), summed over N."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return kl_divergence(Categorical(a), Categorical(b)).sum()

    def mixed(of_p: float) -> torch.Tensor:
        return of_p * p + (1 - of_p) * q

    beta, alpha = objective.beta, objective.alpha
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixed(beta)) + (1 - beta) * kl(q, mixed(beta)),
        "skew_kl": lambda: kl(p, mixed(alpha)),
        "skew_reverse_kl": lambda: kl(q, mixed(1 - alpha)),
        "total_variation": lambda: torch.maximum(p - q, torch.zeros_like(p)).sum(),
    }


def plain(objective: Objective, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return formulas(objective, p, q)[str(objective.divergence)]()


def reference(
    student: torch.Tensor, target: torch.Tensor, objective: Objective, p: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    """The label loss mixed with the divergence of q from p, scaled for its temperature."""
    total = objective.labels * cross_entropy(student, target, reduction="sum")
    return total + (1 - objective.labels) * objective.temperature**2 * plain(objective, p, q)


def assert_equal_with_gradients(
    actual: torch.Tensor, reference: torch.Tensor, leaf: torch.Tensor, tolerance: float = 1e-6
) -> None:
    torch.testing.assert_close(actual, reference, rtol=tolerance, atol=tolerance)
    [gradient] = torch.autograd.grad(actual, leaf)
    [reference_gradient] = torch.autograd.grad(reference, leaf)
    assert reference_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, reference_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "labels": 0.25, "beta": 0.2, "alpha": 0.3}])
def test_the_whole_vocabulary(logits, kind: str, settings: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": kind, **settings})
    p, q = ((each / objective.temperature).softmax(-1) for each in (teacher, student))
    assert_equal_with_gradients(
        loss(student, target, objective, teacher), reference(student, target, objective, p, q), student
    )


def with_others(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of `ids` (N, k) and of all the others together: (N, k + 1)."""
    chosen = torch.stack([row[index] for row, index in zip(probabilities, ids, strict=True)])
    others = torch.ones_like(probabilities, dtype=torch.bool).scatter(1, ids, False)
    return torch.cat([chosen, (probabilities * others).sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"labels": 0.5, "alpha": 0.3}, {"labels": 0.5, "temperature": 2.0}])
def test_stored_top_k_with_the_mass_of_all_other_tokens(logits, kind: str, settings: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    """The stored distribution is that of the teacher at the objective's temperature."""
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": kind, **settings})
    p, q = ((each / objective.temperature).softmax(-1) for each in (teacher, student))
    values, ids = p.log().topk(K, dim=-1)
    wanted = reference(student, target, objective, with_others(p, ids), with_others(q, ids))
    assert_equal_with_gradients(loss(student, target, objective, TopK(ids, values)), wanted, student)


@pytest.mark.parametrize("settings", [{}, {"labels": 0.3}, {"labels": 0.3, "temperature": 2.0}])
def test_samples_weight_the_students_log_probabilities(logits, settings: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": "forward_kl", **settings})
    t = objective.temperature
    p, log_q = (teacher / t).softmax(-1), (student / t).log_softmax(-1)
    ids = torch.tensor([[3, 7, 9, 0]]).repeat(N, 1)
    weights = torch.tensor([[0.5, 0.1, 0.7, 0.0]], dtype=torch.float64).repeat(N, 1)  # the last entry is unused
    entropy = Categorical(p).entropy()
    by_hand = -entropy.sum() - (0.5 * log_q[:, 3] + 0.1 * log_q[:, 7] + 0.7 * log_q[:, 9]).sum()
    wanted = (
        objective.labels * cross_entropy(student, target, reduction="sum") + (1 - objective.labels) * t * t * by_hand
    )
    assert_equal_with_gradients(loss(student, target, objective, Samples(ids, weights, entropy)), wanted, student)


def test_samples_estimate_forward_kl_without_bias(logits) -> None:  # type: ignore[no-untyped-def]
    """With many draws, the estimate and its gradient approach those of the whole distribution."""
    student, teacher, target = logits
    objective, draws = Objective(divergence="forward_kl"), 100_000
    ids = torch.multinomial(teacher.softmax(-1), draws, replacement=True, generator=torch.Generator().manual_seed(1))
    weights = torch.full((N, draws), 1 / draws, dtype=torch.float64)
    entropy = Categorical(logits=teacher).entropy()
    assert_equal_with_gradients(
        loss(student, target, objective, Samples(ids, weights, entropy)) / N,
        loss(student, target, objective, teacher) / N,
        student,
        tolerance=0.01,
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_samples_serve_forward_kl_only(logits, kind: str) -> None:  # type: ignore[no-untyped-def]
    student, _, target = logits
    samples = Samples(target[:, None], torch.ones(N, 1), torch.zeros(N))
    with pytest.raises(ValueError, match=f"but not {kind}"):
        loss(student, target, Objective.model_validate({"divergence": kind}), samples)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_changes_the_loss_little(logits, kind: str) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    values, ids = teacher.log_softmax(-1).topk(K, dim=-1)
    objective = Objective.model_validate({"divergence": kind})
    exact = loss(student, target, objective, TopK(ids, values))
    stored = loss(student.bfloat16(), target, objective, TopK(ids, values.half()))
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored.double(), exact, rtol=5e-3, atol=5e-3)
    # A confident teacher: the stored mass rounds to 1, and nothing becomes infinite.
    sure = TopK(ids, torch.tensor([[0.0] + [-20.0] * (K - 1)]).repeat(N, 1).half())
    value = loss(student, target, objective, sure)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


@pytest.mark.parametrize("objective", [Objective(labels=1.0), Objective(divergence="jsd", labels=1.0)])
def test_labels_alone(logits, objective: Objective) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    distribution = teacher if objective.divergence else None
    assert_equal_with_gradients(
        loss(student, target, objective, distribution), cross_entropy(student, target, reduction="sum"), student
    )


def test_divergences_are_zero_for_equal_distributions_and_jsd_equals_scipys(logits) -> None:  # type: ignore[no-untyped-def]
    student, teacher, _ = logits
    log_p, log_q = teacher.log_softmax(-1), student.detach().log_softmax(-1)
    for kind in KINDS:
        objective = Objective.model_validate({"divergence": kind})
        torch.testing.assert_close(divergence(log_p, log_p, objective), torch.zeros(N).double(), rtol=0, atol=1e-12)
        assert (divergence(log_p, log_q, objective) > 0.01).all()
    square_root = jensenshannon(log_p.exp().numpy(), log_q.exp().numpy(), axis=-1)
    torch.testing.assert_close(divergence(log_p, log_q, Objective(divergence="jsd")), torch.from_numpy(square_root**2))


def test_every_divergence_of_the_schema_has_a_function_and_a_formula(logits) -> None:  # type: ignore[no-untyped-def]
    """All but "chunks", which compares texts: limbeck.distill.losses.text_chunks."""
    assert {*get_args(schema.Divergence)} == {*DIVERGENCES, "chunks"}
    probabilities = logits[1].softmax(-1)
    assert set(formulas(Objective(labels=1.0), probabilities, probabilities)) == set(DIVERGENCES)


def test_an_unknown_divergence_is_an_error_that_lists_the_names(logits) -> None:  # type: ignore[no-untyped-def]
    log_p = logits[1].log_softmax(-1)
    with pytest.raises(ValueError, match=r"'hellinger': the names are forward_kl, reverse_kl, jsd"):
        divergence(log_p, log_p, Objective.model_construct(divergence="hellinger"))


@pytest.mark.parametrize("kind", KINDS)
def test_probability_of_the_students_padding_costs_loss(logits, kind: str) -> None:  # type: ignore[no-untyped-def]
    """A student may have more logits than the tokenizer has tokens: they count as one token that never comes."""
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": kind})
    never = torch.full((N, 1), 1e-6, dtype=torch.float64)
    p = torch.cat([teacher[:, :30].softmax(-1), never], dim=-1)
    q = student.softmax(-1)
    q = torch.cat([q[:, :30], q[:, 30:].sum(-1, keepdim=True)], dim=-1)
    got = loss(student, target, objective, teacher[:, :30])
    assert_equal_with_gradients(got, plain(objective, p, q), student, tolerance=1e-4)
    [gradient] = torch.autograd.grad(loss(student, target, objective, teacher[:, :30]), student)
    assert (gradient[:, 30:].sum(-1) > 0).all()  # descent takes probability from the padding


def test_log_softmax_at_chosen_tokens(logits) -> None:  # type: ignore[no-untyped-def]
    student, _, _ = logits
    ids = torch.tensor([[1, 5, 5]]).repeat(N, 1)  # a token may be listed twice
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    actual = (log_softmax_at(student, ids) * weights).sum()
    wanted = (student.log_softmax(-1).gather(-1, ids) * weights).sum()
    assert_equal_with_gradients(actual, wanted, student)


def test_the_most_likely_token_of_each_form(logits) -> None:  # type: ignore[no-untyped-def]
    _, teacher, _ = logits
    values, ids = teacher.log_softmax(-1).topk(K, dim=-1)
    backwards = TopK(ids.flip(-1), values.flip(-1))
    samples = Samples(ids, values.exp(), torch.zeros(N))
    for distribution in (teacher, backwards, samples):
        assert likeliest(distribution).tolist() == teacher.argmax(-1).tolist()
