"""Divergences between the teacher's and the student's next-token distributions, mixed with the label loss.

A divergence is a function of two log-distributions over the same outcomes. The outcomes are the whole vocabulary
(the teacher runs online), or the teacher's top-k tokens and one bucket for all the others (teacher cache). Only
forward KL also has an unbiased estimate from samples, because it is linear in the teacher's probabilities.

To add a divergence:
1. Write its function below and list it in `DIVERGENCES`. Its parameters are fields of `Objective`.
2. Add its name to `Divergence` in `limbeck.distill.recipe.schema`.
3. Write its formula in `formulas` of tests/distill/losses/test_divergences.py, which compares values and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from limbeck.distill.recipe.schema import Objective


class TopK(NamedTuple):
    """The teacher's k most likely tokens at each position: ids (..., k) int64 and log-probabilities (..., k)."""

    ids: torch.Tensor
    logprobs: torch.Tensor


class Samples(NamedTuple):
    """An unbiased sparse estimate of the teacher's distribution at each position.

    Attributes:
        ids: (..., m) int64; unused entries hold any id, with weight 0.
        weights: (..., m) float: the estimated probability of each id; its mean over the draws is the probability.
        entropy: (...) float: of the teacher's whole distribution, in nats.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    entropy: torch.Tensor


StoredDistribution = TopK | Samples
TeacherDistribution = torch.Tensor | StoredDistribution  # logits (..., V), or a stored form of them


def stored_distribution(arrays: Mapping[str, torch.Tensor]) -> StoredDistribution:
    """Make a stored form from its arrays by name."""
    form = TopK if "logprobs" in arrays else Samples
    return form(**arrays)


# Each function takes the log-probabilities of the teacher p and the student q, (..., V) float each, and returns the
# divergence at each position, (...), in nats.


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """KL(p || q) (Hinton et al., arXiv 1503.02531)."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """KL(q || p) (MiniLLM, arXiv 2306.08543)."""
    return _kl(log_q, log_p)


def jsd(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649).

    beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q.
    """
    beta = objective.beta
    log_m = _mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898)."""
    return _kl(log_p, _mixture(log_p, log_q, objective.alpha))


def skew_reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898)."""
    return _kl(log_q, _mixture(log_p, log_q, 1 - objective.alpha))


def total_variation(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Half the sum of |p - q|, from 0 to 1: the only divergence here that is not in nats."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


DivergenceFunction = Callable[[torch.Tensor, torch.Tensor, Objective], torch.Tensor]
# By the name that recipes use. The recipe's "chunks" compares texts, not tokens: see `text_chunks`.
DIVERGENCES: dict[str, DivergenceFunction] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """The objective's divergence of q (student) from p (teacher) over the last axis: (..., V), (..., V) -> (...).

    Raises ValueError if no function has the name of the divergence.
    """
    function = DIVERGENCES.get(str(objective.divergence))
    if function is None:
        raise ValueError(f"unknown divergence {objective.divergence!r}: the names are {', '.join(DIVERGENCES)}")
    return function(log_p, log_q, objective)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, share: float) -> torch.Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log(1 - share))


def with_tail(logprobs: torch.Tensor) -> torch.Tensor:
    """Add one entry for all other outcomes: log-probabilities (..., k) -> (..., k + 1)."""
    mass = logprobs.exp().sum(-1, keepdim=True)
    # Half-precision rounding can bring the mass to 1 or above; the floor keeps the logarithm finite.
    return torch.cat([logprobs, torch.log((1 - mass).clamp_min(1e-6))], dim=-1)


def loss(
    logits: torch.Tensor, labels: torch.Tensor, objective: Objective, teacher: TeacherDistribution | None
) -> torch.Tensor:
    """The objective's loss, summed over tokens, in nats: a scalar.

    Args:
        logits: student logits (N, V) float; half precision is raised to float32.
        labels: the next tokens of the text (N,) int64.
        teacher: teacher logits (N, U) with U <= V, where entry i is the same token as the student's entry i; or a
            stored form (N, ...) of its distribution at the objective's temperature; None for labels alone.

    Raises:
        ValueError: the stored form cannot serve the divergence.
    """
    logits = _at_least_float32(logits)
    if teacher is None or objective.divergence is None or objective.labels == 1:
        return -log_softmax_at(logits, labels.unsqueeze(-1)).sum()
    t = objective.temperature
    # t * t keeps the size of the gradient independent of the temperature (Hinton et al.).
    weight = (1 - objective.labels) * t * t
    label_logprobs = None
    if isinstance(teacher, torch.Tensor):
        log_q, log_p = (F.log_softmax(_heat(each, t), dim=-1) for each in (logits, _at_least_float32(teacher)))
        if objective.labels and t == 1:
            label_logprobs = log_q.gather(-1, labels.unsqueeze(-1))
        distance = _dense_divergence(log_p, log_q, objective)
    else:
        # log q is needed at the stored ids only; at temperature 1 the labels are gathered in the same pass.
        with_labels = bool(objective.labels) and t == 1
        ids = torch.cat([teacher.ids, labels.unsqueeze(-1)], dim=-1) if with_labels else teacher.ids
        log_q = log_softmax_at(_heat(logits, t), ids)
        if with_labels:
            label_logprobs = log_q[..., -1]
        distance = _stored_divergence(log_q[..., : teacher.ids.shape[-1]], teacher, objective)
    if not objective.labels:
        return weight * distance
    if label_logprobs is None:
        label_logprobs = log_softmax_at(logits, labels.unsqueeze(-1))
    return weight * distance - objective.labels * label_logprobs.sum()


def _heat(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return logits if temperature == 1 else logits / temperature


def _dense_divergence(log_p: torch.Tensor, log_q: torch.Tensor, objective: Objective) -> torch.Tensor:
    """The divergence over the whole vocabulary, summed over tokens: teacher log p (N, U), student log q (N, V)."""
    if log_q.shape[-1] > log_p.shape[-1]:
        # The student's padding is one more outcome, so that mass lost to it costs something under every divergence.
        log_p, log_q = with_tail(log_p), with_tail(log_q[..., : log_p.shape[-1]])
    return divergence(log_p, log_q, objective).sum()


def _stored_divergence(log_q: torch.Tensor, teacher: StoredDistribution, objective: Objective) -> torch.Tensor:
    """The divergence summed over tokens, from a stored form (N, ...) and the student's log q (N, k) at its ids."""
    if isinstance(teacher, TopK):
        log_p = with_tail(_at_least_float32(teacher.logprobs))
        return divergence(log_p, with_tail(log_q), objective).sum()
    if objective.divergence != "forward_kl":
        raise ValueError(f"samples estimate forward_kl without bias, but not {objective.divergence}")
    return -(teacher.entropy.sum() + (teacher.weights * log_q).sum())


def likeliest(teacher: TeacherDistribution) -> torch.Tensor:
    """The teacher's most likely token at each position, as far as the stored form shows it: (N,) int64."""
    if isinstance(teacher, torch.Tensor):
        return teacher.argmax(-1)
    scores = teacher.logprobs if isinstance(teacher, TopK) else teacher.weights
    return teacher.ids.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)


def log_softmax_at(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens `ids` (..., k) int64 under `logits` (..., V): (..., k).

    Equal to `log_softmax` and `gather`, with one array of the size of the logits instead of the three that their
    gradients need. The gradient can be computed once only.
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
        # In place to save memory: autograd raises if the gradient is requested again.
        whole = log_q.exp_().mul_(-gradient.sum(-1, keepdim=True))
        return whole.scatter_add_(-1, ids, gradient), None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
