"""What the student learns from: a divergence between two log-distributions, mixed with the labels.

A divergence is a function of two log-distributions over the same outcomes. Those outcomes are the whole
vocabulary (teacher run online) or the teacher's top-k tokens and one bucket for all the rest (teacher cache).
Forward KL alone also has an unbiased estimate from samples, since it is linear in the teacher's probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from limbeck.distill.recipe.schema import Objective


class TopK(NamedTuple):
    """The teacher's most likely tokens at each position: ids (..., k) int64 and log-probabilities (..., k)."""

    ids: torch.Tensor
    logprobs: torch.Tensor


class Samples(NamedTuple):
    """An unbiased sparse estimate of the teacher's distribution at each position.

    Attributes:
        ids: (..., m) int64; unused places hold any id with weight 0.
        weights: (..., m) float: what the estimate gives each id; over the draws, its mean is the probability.
        entropy: (...) float: of the teacher's whole distribution, in nats.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor


StoredDistribution = TopK | Samples
TeacherDistribution = (
    torch.Tensor | StoredDistribution
)  # what the teacher said: logits (..., V), or a stored form of them


def stored_distribution(arrays: Mapping[str, torch.Tensor]) -> StoredDistribution:
    """A stored form from its arrays by name."""
    form = TopK if "logprobs" in arrays else Samples
    return form(**arrays)


def divergence(
    log_p: torch.Tensor, log_q: torch.Tensor, kind: str, beta: float = 0.5, alpha: float = 0.1
) -> torch.Tensor:
    """Divergence in nats of q (student) from p (teacher) over the last axis: (..., V), (..., V) -> (...).

    Args:
        kind: `forward_kl` KL(p || q) (Hinton et al., arXiv 1503.02531); `reverse_kl` KL(q || p) (MiniLLM,
            arXiv 2306.08543); `jsd`, the generalized Jensen-Shannon divergence
            beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649);
            `skew_kl` KL(p || alpha p + (1 - alpha) q) and `skew_reverse_kl` KL(q || (1 - alpha) p + alpha q)
            (DistiLLM, arXiv 2402.03898); `total_variation`, half the sum of |p - q|, which is no number of nats.
    """
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "jsd":
        log_m = _mixture(log_p, log_q, beta)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    if kind == "skew_kl":
        return _kl(log_p, _mixture(log_p, log_q, alpha))
    if kind == "skew_reverse_kl":
        return _kl(log_q, _mixture(log_p, log_q, 1 - alpha))
    if kind == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    raise ValueError(f"unknown divergence {kind!r}")


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))


def with_tail(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some outcomes (..., k) and of everything else: (..., k + 1)."""
    mass = logprobs.exp().sum(-1, keepdim=True)
    # Half-precision rounding can bring the mass to 1 or above; the rest keeps a floor with a finite logarithm.
    return torch.cat([logprobs, torch.log((1 - mass).clamp_min(1e-6))], dim=-1)


def loss(
    logits: torch.Tensor, labels: torch.Tensor, objective: Objective, teacher: TeacherDistribution | None
) -> torch.Tensor:
    """The objective's sum over tokens, in nats.

    Args:
        logits: student logits (N, V) float; half precision is raised to float32.
        labels: the tokens that came next (N,) int64.
        teacher: teacher logits (N, U) with U <= V, entry by entry the same tokens; or a stored form (N, ...) of
            its distribution at the objective's temperature; None for an objective of labels alone.

    Raises:
        ValueError: a divergence that the stored form cannot serve.
    """
    logits = _at_least_float32(logits)
    if teacher is None or objective.divergence is None or objective.labels == 1:
        return -log_softmax_at(logits, labels.unsqueeze(-1)).sum()
    t = objective.temperature
    # t * t keeps the gradient's size independent of the temperature (Hinton et al.).
    weight = (1 - objective.labels) * t * t
    if isinstance(teacher, torch.Tensor):
        log_q, log_p = (F.log_softmax(_at(each, t), dim=-1) for each in (logits, _at_least_float32(teacher)))
        said = log_q.gather(-1, labels.unsqueeze(-1)) if objective.labels and t == 1 else None
        distance = _from_all(log_p, log_q, objective)
    else:
        # Only some entries are needed of log q; the labels' are found with them.
        joined = bool(objective.labels) and t == 1
        wanted = torch.cat([teacher.ids, labels.unsqueeze(-1)], dim=-1) if joined else teacher.ids
        log_q = log_softmax_at(_at(logits, t), wanted)
        said = log_q[..., -1] if joined else None
        distance = _from_stored(log_q[..., : teacher.ids.shape[-1]], teacher, objective)
    if not objective.labels:
        return weight * distance
    if said is None:
        said = log_softmax_at(logits, labels.unsqueeze(-1))
    return weight * distance - objective.labels * said.sum()


def _at(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits / temperature


def _from_all(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """The divergence, summed over tokens, of all entries: the teacher's log p (N, U), the student's log q (N, V)."""
    assert objective.divergence is not None
    if log_q.shape[-1] > log_p.shape[-1]:
        # The student's padding is one outcome more: what is lost to it costs something under every divergence.
        log_p, log_q = with_tail(log_p), with_tail(log_q[..., : log_p.shape[-1]])
    return divergence(log_p, log_q, objective.divergence, objective.beta, objective.alpha).sum()


def _from_stored(log_q: torch.Tensor, teacher: StoredDistribution, objective: Objective) -> torch.Tensor:
    """The divergence, summed over tokens, from a stored form (N, ...) and the student's log q (N, k) at its ids."""
    assert objective.divergence is not None
    if isinstance(teacher, TopK):
        log_p = with_tail(_at_least_float32(teacher.logprobs))
        return divergence(log_p, with_tail(log_q), objective.divergence, objective.beta, objective.alpha).sum()
    if objective.divergence != "forward_kl":
        raise ValueError(f"samples give no unbiased estimate of {objective.divergence}, of forward_kl alone")
    return -(teacher.entropy.sum() + (teacher.weights * log_q).sum())


def likeliest(teacher: TeacherDistribution) -> torch.Tensor:
    """The teacher's likeliest token at each position, as far as what is stored tells: (N,) int64."""
    if isinstance(teacher, torch.Tensor):
        return teacher.argmax(-1)
    worth = teacher.logprobs if isinstance(teacher, TopK) else teacher.weights
    return teacher.ids.gather(-1, worth.argmax(-1, keepdim=True)).squeeze(-1)


def log_softmax_at(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens `ids` (..., k) int64 under `logits` (..., V): (..., k).

    As `log_softmax` and `gather`, with one array of the logits' size where their gradients take three. Its
    gradient can be taken once.
    """
    return _LogSoftmaxAt.apply(logits, ids)


class _LogSoftmaxAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        log_q = F.log_softmax(logits, dim=-1)
        ctx.save_for_backward(log_q, ids)
        return log_q.gather(-1, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_q, ids = ctx.saved_tensors
        # In place: autograd refuses to hand out what was changed, should the gradient be asked for again.
        whole = log_q.exp_().mul_(-gradient.sum(-1, keepdim=True))
        return whole.scatter_add_(-1, ids, gradient), None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
