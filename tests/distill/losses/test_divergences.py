"""Losses against torch.distributions and plain formulas, values and gradients."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cross_entropy

from limbeck.distill.losses.divergences import Samples, TopK, divergence, likeliest, log_softmax_at, loss
from limbeck.distill.recipe.schema import Objective

N, V, K = 6, 40, 5
KINDS = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits that want a gradient, teacher logits (N, V), labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(V, (N,), generator=generator)


def plain(objective: Objective, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The divergences by torch.distributions, from probabilities (N, V); their sum over N."""

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
    }[str(objective.divergence)]()


def reference(
    student: torch.Tensor, target: torch.Tensor, objective: Objective, p: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    """Labels mixed with the divergence of q from p, at its temperature."""
    total = objective.labels * cross_entropy(student, target, reduction="sum")
    return total + (1 - objective.labels) * objective.temperature**2 * plain(objective, p, q)


def same(ours: torch.Tensor, reference: torch.Tensor, leaf: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
    [ours_gradient] = torch.autograd.grad(ours, leaf)
    [reference_gradient] = torch.autograd.grad(reference, leaf)
    assert reference_gradient.abs().max() > 1e-3
    torch.testing.assert_close(ours_gradient, reference_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "labels": 0.25, "beta": 0.2, "alpha": 0.3}])
def test_the_whole_vocabulary(logits, kind: str, settings: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": kind, **settings})
    p, q = ((each / objective.temperature).softmax(-1) for each in (teacher, student))
    same(loss(student, target, objective, teacher), reference(student, target, objective, p, q), student)


def with_rest(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Probabilities of `ids` (N, k) and of all the others together: (N, k + 1)."""
    chosen = torch.stack([row[index] for row, index in zip(probabilities, ids, strict=True)])
    rest = torch.ones_like(probabilities, dtype=torch.bool).scatter(1, ids, False)
    return torch.cat([chosen, (probabilities * rest).sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"labels": 0.5, "alpha": 0.3}, {"labels": 0.5, "temperature": 2.0}])
def test_stored_top_k_and_the_mass_of_the_rest(logits, kind: str, settings: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    """What is stored is the teacher's distribution at the objective's temperature."""
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": kind, **settings})
    p, q = ((each / objective.temperature).softmax(-1) for each in (teacher, student))
    values, ids = p.log().topk(K, dim=-1)
    wanted = reference(student, target, objective, with_rest(p, ids), with_rest(q, ids))
    same(loss(student, target, objective, TopK(ids, values)), wanted, student)


@pytest.mark.parametrize("settings", [{}, {"labels": 0.3}, {"labels": 0.3, "temperature": 2.0}])
def test_samples_weigh_the_students_log_probabilities(logits, settings: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": "forward_kl", **settings})
    t = objective.temperature
    p, log_q = (teacher / t).softmax(-1), (student / t).log_softmax(-1)
    ids = torch.tensor([[3, 7, 9, 0]]).repeat(N, 1)
    weights = torch.tensor([[0.5, 0.1, 0.7, 0.0]], dtype=torch.float64).repeat(N, 1)  # the last place is not used
    entropy = Categorical(p).entropy()
    by_hand = -entropy.sum() - (0.5 * log_q[:, 3] + 0.1 * log_q[:, 7] + 0.7 * log_q[:, 9]).sum()
    wanted = (
        objective.labels * cross_entropy(student, target, reduction="sum") + (1 - objective.labels) * t * t * by_hand
    )
    same(loss(student, target, objective, Samples(ids, weights, entropy)), wanted, student)


def test_samples_give_forward_kl_on_average(logits) -> None:  # type: ignore[no-untyped-def]
    """Over many draws, the estimate and its gradient are those of the whole distribution."""
    student, teacher, target = logits
    objective, draws = Objective(divergence="forward_kl"), 100_000
    ids = torch.multinomial(teacher.softmax(-1), draws, replacement=True, generator=torch.Generator().manual_seed(1))
    weights = torch.full((N, draws), 1 / draws, dtype=torch.float64)
    entropy = Categorical(logits=teacher).entropy()
    same(
        loss(student, target, objective, Samples(ids, weights, entropy)) / N,
        loss(student, target, objective, teacher) / N,
        student,
        tolerance=0.01,
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_samples_serve_forward_kl_alone(logits, kind: str) -> None:  # type: ignore[no-untyped-def]
    student, _, target = logits
    said = Samples(target[:, None], torch.ones(N, 1), torch.zeros(N))
    with pytest.raises(ValueError, match=kind):
        loss(student, target, Objective.model_validate({"divergence": kind}), said)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_costs_little(logits, kind: str) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    values, ids = teacher.log_softmax(-1).topk(K, dim=-1)
    objective = Objective.model_validate({"divergence": kind})
    exact = loss(student, target, objective, TopK(ids, values))
    stored = loss(student.bfloat16(), target, objective, TopK(ids, values.half()))
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored.double(), exact, rtol=5e-3, atol=5e-3)
    # A teacher that is sure: its mass rounds to 1 and nothing becomes infinite.
    sure = TopK(ids, torch.tensor([[0.0] + [-20.0] * (K - 1)]).repeat(N, 1).half())
    value = loss(student, target, objective, sure)
    assert torch.isfinite(value)
    assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


@pytest.mark.parametrize("objective", [Objective(labels=1.0), Objective(divergence="jsd", labels=1.0)])
def test_labels_alone(logits, objective: Objective) -> None:  # type: ignore[no-untyped-def]
    student, teacher, target = logits
    said = teacher if objective.divergence else None
    same(loss(student, target, objective, said), cross_entropy(student, target, reduction="sum"), student)


def test_divergences_are_zero_for_equals_and_jsd_is_scipys(logits) -> None:  # type: ignore[no-untyped-def]
    student, teacher, _ = logits
    log_p, log_q = teacher.log_softmax(-1), student.detach().log_softmax(-1)
    for kind in KINDS:
        torch.testing.assert_close(divergence(log_p, log_p, kind), torch.zeros(N).double(), rtol=0, atol=1e-12)
        assert (divergence(log_p, log_q, kind) > 0.01).all()
    square_root = jensenshannon(log_p.exp().numpy(), log_q.exp().numpy(), axis=-1)
    torch.testing.assert_close(divergence(log_p, log_q, "jsd"), torch.from_numpy(square_root**2))
    with pytest.raises(ValueError, match="hellinger"):
        divergence(log_p, log_q, "hellinger")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_student_gives_its_padding_is_lost_to_it(logits, kind: str) -> None:  # type: ignore[no-untyped-def]
    """A student may have more entries than the tokenizer has tokens: together they are one that is never right."""
    student, teacher, target = logits
    objective = Objective.model_validate({"divergence": kind})
    never = torch.full((N, 1), 1e-6, dtype=torch.float64)
    p = torch.cat([teacher[:, :30].softmax(-1), never], dim=-1)
    q = student.softmax(-1)
    q = torch.cat([q[:, :30], q[:, 30:].sum(-1, keepdim=True)], dim=-1)
    got = loss(student, target, objective, teacher[:, :30])
    same(got, plain(objective, p, q), student, tolerance=1e-4)
    [gradient] = torch.autograd.grad(loss(student, target, objective, teacher[:, :30]), student)
    assert (gradient[:, 30:].sum(-1) > 0).all()  # downhill is away from the padding


def test_log_softmax_at_chosen_tokens(logits) -> None:  # type: ignore[no-untyped-def]
    student, _, _ = logits
    ids = torch.tensor([[1, 5, 5]]).repeat(N, 1)  # a token may be asked for twice
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    ours = (log_softmax_at(student, ids) * weights).sum()
    wanted = (student.log_softmax(-1).gather(-1, ids) * weights).sum()
    same(ours, wanted, student)


def test_the_teachers_likeliest_token(logits) -> None:  # type: ignore[no-untyped-def]
    _, teacher, _ = logits
    values, ids = teacher.log_softmax(-1).topk(K, dim=-1)
    backwards = TopK(ids.flip(-1), values.flip(-1))
    samples = Samples(ids, values.exp(), torch.zeros(N))
    for said in (teacher, backwards, samples):
        assert likeliest(said).tolist() == teacher.argmax(-1).tolist()
