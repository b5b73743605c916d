"""What the student learns from: a divergence between two log-distributions, mixed with the labels.

A divergence is a function of two log-distributions over the same outcomes. Those outcomes are the whole
vocabulary (teacher run online) or the teacher's top-k tokens and one bucket for all the rest (teacher cache).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from distill.recipe import Objective


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


Said = torch.Tensor | TopK | Samples  # what the teacher said: logits (..., V), or a stored form of them


def stored(arrays: Mapping[str, torch.Tensor]) -> TopK | Samples:
    """A stored form from its arrays by name."""
    form = TopK if "logprobs" in arrays else Samples
    return form(**arrays)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, beta: float = 0.5) -> torch.Tensor:
    """Divergence in nats of q (student) from p (teacher) over the last axis: (..., V), (..., V) -> (...).

    Args:
        kind: `forward_kl` KL(p || q) (Hinton et al., arXiv 1503.02531); `reverse_kl` KL(q || p) (MiniLLM,
            arXiv 2306.08543); `jsd`, the generalized Jensen-Shannon divergence
            beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649).
    """
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "jsd":
        weights = torch.tensor([beta, 1 - beta], dtype=log_p.dtype, device=log_p.device).log()
        log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
        return beta * divergence(log_p, log_m, "forward_kl") + (1 - beta) * divergence(log_q, log_m, "forward_kl")
    raise ValueError(f"unknown divergence {kind!r}")


def with_tail(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some outcomes (..., k) and of everything else: (..., k + 1)."""
    mass = logprobs.exp().sum(-1, keepdim=True)
    # Half-precision rounding can bring the mass to 1 or above; the rest keeps a floor with a finite logarithm.
    return torch.cat([logprobs, torch.log((1 - mass).clamp_min(1e-6))], dim=-1)


def loss(logits: torch.Tensor, labels: torch.Tensor, objective: Objective, teacher: Said | None) -> torch.Tensor:
    """The objective's sum over tokens, in nats.

    Args:
        logits: student logits (N, V) float.
        labels: the tokens that came next (N,) int64.
        teacher: teacher logits (N, U) with U <= V, entry by entry the same tokens; or its stored TopK (N, k);
            None for an objective of labels alone.
    """
    logits = logits.float()
    if objective.divergence is None or teacher is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    t = 1.0
    if isinstance(teacher, TopK):
        # Only k + 1 entries are needed of log q: a logsumexp and a gather write no second (N, V).
        wanted = torch.cat([teacher.ids, labels.unsqueeze(-1)], dim=-1)
        log_q = logits.gather(-1, wanted) - logits.logsumexp(-1, keepdim=True)
        cross_entropy = -log_q[..., -1].sum()
        log_q = with_tail(log_q[..., :-1])
        log_p = with_tail(teacher.logprobs.float())
    elif isinstance(teacher, Samples):
        raise NotImplementedError
    else:
        t = objective.temperature
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        log_q = F.log_softmax(logits / t, dim=-1)[..., : teacher.shape[-1]]
        log_p = F.log_softmax(teacher.float() / t, dim=-1)
    # t * t keeps the gradient's size independent of the temperature (Hinton et al.).
    distance = divergence(log_p, log_q, objective.divergence, objective.beta).sum() * t * t
    return objective.labels * cross_entropy + (1 - objective.labels) * distance
