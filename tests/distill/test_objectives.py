"""Losses against torch.distributions and plain formulas, values and gradients."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from distill.objectives import TopK, divergence, loss
from distill.recipe import Objective

N, V, K = 6, 40, 5


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits that want a gradient, teacher logits (N, V), labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(N, V, generator=generator, dtype=torch.float32) * 2
    teacher = torch.randn(N, V, generator=generator) * 2
    return student.requires_grad_(), teacher, torch.randint(V, (N,), generator=generator)


def plain(kind: str, p: torch.Tensor, q: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """The divergences by torch.distributions, from probabilities."""
    if kind == "forward_kl":
        return kl_divergence(Categorical(p), Categorical(q)).mean()
    if kind == "reverse_kl":
        return kl_divergence(Categorical(q), Categorical(p)).mean()
    m = Categorical(beta * p + (1 - beta) * q)
    return (beta * kl_divergence(Categorical(p), m) + (1 - beta) * kl_divergence(Categorical(q), m)).mean()


def mean_loss(logits: torch.Tensor, *rest: object) -> torch.Tensor:
    return loss(logits, *rest) / len(logits)  # type: ignore[arg-type]


def same(ours: torch.Tensor, reference: torch.Tensor, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    [ours_gradient] = torch.autograd.grad(ours, leaf, retain_graph=True)
    [reference_gradient] = torch.autograd.grad(reference, leaf)
    assert reference_gradient.abs().max() > 1e-3
    torch.testing.assert_close(ours_gradient, reference_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("temperature", "labels", "beta"), [(1.0, 0.0, 0.5), (3.0, 0.25, 0.1)])
def test_the_whole_vocabulary(logits, kind: str, temperature: float, labels: float, beta: float) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    objective = Objective(divergence=kind, labels=labels, temperature=temperature, beta=beta)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    reference = labels * cross_entropy(student, target)
    reference = reference + (1 - labels) * temperature**2 * plain(kind, p, q, beta)
    same(mean_loss(student, target, objective, teacher), reference, student)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("labels", [0.0, 0.5])
def test_stored_top_k_and_the_mass_of_the_rest(logits, kind: str, labels: float) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    values, ids = teacher.log_softmax(-1).topk(K, dim=-1)

    def outcomes(logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of the teacher's k tokens and of all the others together."""
        probabilities = logits.softmax(-1)
        chosen = torch.stack([row[index] for row, index in zip(probabilities, ids, strict=True)])
        rest = torch.ones(N, V, dtype=torch.bool).scatter(1, ids, False)
        return torch.cat([chosen, (probabilities * rest).sum(-1, keepdim=True)], dim=-1)

    reference = labels * cross_entropy(student, target)
    reference = reference + (1 - labels) * plain(kind, outcomes(teacher), outcomes(student))
    objective = Objective(divergence=kind, labels=labels)
    same(mean_loss(student, target, objective, TopK(ids, values)), reference, student)


def test_half_precision_storage_costs_little(logits) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    values, ids = teacher.log_softmax(-1).topk(K, dim=-1)
    objective = Objective(divergence="forward_kl")
    exact = mean_loss(student, target, objective, TopK(ids, values))
    stored = mean_loss(student, target, objective, TopK(ids, values.half()))
    torch.testing.assert_close(stored, exact, rtol=2e-3, atol=2e-3)
    # A teacher that is sure: its mass rounds to 1 and nothing becomes infinite.
    sure = mean_loss(
        student, target, objective, TopK(ids, torch.tensor([[0.0] + [-20.0] * (K - 1)]).repeat(N, 1).half())
    )
    assert torch.isfinite(sure)
    assert torch.isfinite(torch.autograd.grad(sure, student)[0]).all()


def test_labels_alone(logits) -> None:  # type: ignore[no-untyped-def]
    student, _, target = logits
    same(mean_loss(student, target, Objective(labels=1.0), None), cross_entropy(student, target), student)


def test_divergences_are_zero_for_equals_and_jsd_is_scipys(logits) -> None:  # type: ignore[no-untyped-def]
    student, teacher, _ = logits
    log_p, log_q = teacher.log_softmax(-1), student.detach().log_softmax(-1)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        torch.testing.assert_close(divergence(log_p, log_p, kind), torch.zeros(N), rtol=0, atol=1e-5)
    square_root = jensenshannon(log_p.exp().numpy(), log_q.exp().numpy(), axis=-1)
    torch.testing.assert_close(
        divergence(log_p, log_q, "jsd").double(), torch.from_numpy(square_root**2).double(), rtol=1e-4, atol=1e-5
    )


def test_a_teacher_without_the_students_padding(logits) -> None:  # type: ignore[no-untyped-def]
    """A student may have more entries than the tokenizer has tokens; what it gives them is lost to it."""
    student, teacher, target = logits
    got = mean_loss(student, target, Objective(divergence="forward_kl"), teacher[:, :30])
    p, log_q = teacher[:, :30].softmax(-1), student.log_softmax(-1)[:, :30]
    torch.testing.assert_close(got, (p * (p.log() - log_q)).sum(-1).mean())
