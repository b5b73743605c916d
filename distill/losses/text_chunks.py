"""Loss over chunks of text that two tokenizers share: approximate likelihood matching.

Minixhofer et al., arXiv 2503.20083. `limbeck.distill.teacher.text_chunks` finds the chunks and stores the teacher's
log-probability of each.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from limbeck.distill.losses import chunked_head
from limbeck.distill.losses.chunked_head import LazyLogits
from limbeck.distill.recipe.schema import Objective


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence in nats of the student's q from the teacher's p, of "the chunk is next": (K,), (K,) -> (K,).

    KL of the two outcomes (p^(1/t), 1 - p^(1/t)), times t. At t = 1 it mostly weighs the likely chunks. As t grows,
    it approaches b - a - a log(b / a), where a and b are the surprisals of teacher and student: then unlikely chunks
    weigh as much as likely ones, and longer chunks weigh more.

    Args:
        log_p, log_q: log-probabilities of each chunk.
    """
    log_p, log_q = (x.clamp(max=-1e-5) / temperature for x in (log_p, log_q))
    present = log_p.exp() * (log_p - log_q)
    absent = -log_p.expm1() * (_log1mexp(log_p) - _log1mexp(log_q))
    return temperature * (present + absent)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, accurate at both ends."""
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x.clamp(max=-0.5))))


def loss(
    student: LazyLogits,
    labels: torch.Tensor,
    rows: torch.Tensor,
    teacher: Mapping[str, torch.Tensor],
    objective: Objective,
) -> torch.Tensor:
    """Label loss and chunk divergence, mixed as the objective says and summed over tokens, in nats: a scalar.

    Args:
        student: logits at the N targets.
        labels: (N,) int64.
        rows: (B, T) bool, true at the N positions of the batch that have a target.
        teacher: `chunks` and `logprobs` (B, T), as `limbeck.distill.teacher.text_chunks.capture` stores them.
    """
    label_logprobs = torch.empty(len(labels), dtype=torch.float64, device=labels.device)

    def record_logprobs(logits: torch.Tensor, part: slice) -> torch.Tensor:
        label_logprobs[part] = (logits.gather(-1, labels[part, None])[:, 0] - logits.logsumexp(-1)).double()
        return label_logprobs.new_zeros(())

    with torch.no_grad():
        chunked_head.sum_over_chunks(student, record_logprobs)
    chunk_of_target = _batch_chunk_numbers(teacher["chunks"])[rows]
    sums = label_logprobs.new_zeros(2, teacher["chunks"].numel() + 1)
    sums[0].index_add_(0, chunk_of_target, label_logprobs)
    sums[1].index_add_(0, chunk_of_target, teacher["logprobs"][rows].double())
    is_used = torch.zeros_like(sums[0], dtype=torch.bool)
    is_used[chunk_of_target] = True
    is_used[0] = False  # 0 means: in no chunk
    with torch.enable_grad():
        log_q = sums[0].requires_grad_()
        distance = divergence(sums[1][is_used], log_q[is_used], objective.temperature).sum()
        [chunk_gradient] = torch.autograd.grad(distance, log_q)
    # The gradient of the loss by a token's log-probability: that of its chunk's, and the label loss.
    weights = ((1 - objective.labels) * chunk_gradient[chunk_of_target] - objective.labels).float()

    def weighted_logprobs(logits: torch.Tensor, part: slice) -> torch.Tensor:
        logprobs = logits.gather(-1, labels[part, None])[:, 0].float() - logits.float().logsumexp(-1)
        return (weights[part] * logprobs).sum()

    # `surrogate` has the gradient of the loss, and `value` its value.
    surrogate = chunked_head.sum_over_chunks(student, weighted_logprobs)
    value = (1 - objective.labels) * distance.detach() - objective.labels * label_logprobs.sum()
    return surrogate + (value.to(surrogate.dtype) - surrogate.detach())


def _batch_chunk_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """Make chunk numbers (B, T), counted from 1 in each block, unique in the batch; 0 stays 0."""
    offsets = torch.arange(len(numbers), device=numbers.device)[:, None] * numbers.shape[1]
    return torch.where(numbers > 0, numbers + offsets, 0)
