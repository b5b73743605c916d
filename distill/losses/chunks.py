"""Losses over chunks of text that two tokenizers share (Minixhofer et al., arXiv 2503.20083)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from limbeck.distill.losses import chunked_head
from limbeck.distill.losses.chunked_head import LazyLogits
from limbeck.distill.recipe.schema import Objective


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence of whether a chunk comes or not, student q from teacher p, in nats: (K,), (K,) -> (K,).

    KL of the outcomes (p^(1/t), 1 - p^(1/t)), times t. At t = 1 it tells apart the likely chunks; as t grows it
    comes near to b - a - a log(b / a), where a and b are the surprisals of teacher and student: unlikely chunks tell
    as much as likely ones, and longer ones more.
    """
    log_p, log_q = (x.clamp(max=-1e-5) / temperature for x in (log_p, log_q))
    comes = log_p.exp() * (log_p - log_q)
    misses = -log_p.expm1() * (_log1mexp(log_p) - _log1mexp(log_q))
    return temperature * (comes + misses)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, exact on both ends."""
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x.clamp(max=-0.5))))


def loss(
    student: LazyLogits,
    labels: torch.Tensor,
    rows: torch.Tensor,
    teacher: Mapping[str, torch.Tensor],
    objective: Objective,
) -> torch.Tensor:
    """Labels and chunks mixed as the objective says, summed over tokens, in nats.

    Args:
        student: logits of the N targets.
        labels: (N,) int64.
        rows: (B, T) bool, N of them true: where in the batch the targets are.
        teacher: `chunks` and `logprobs` (B, T), as `capture` stores them.
    """
    own = torch.empty(len(labels), dtype=torch.float64, device=labels.device)

    def look(logits: torch.Tensor, part: slice) -> torch.Tensor:
        own[part] = (logits.gather(-1, labels[part, None])[:, 0] - logits.logsumexp(-1)).double()
        return own.new_zeros(())

    with torch.no_grad():
        chunked_head.sum_over_chunks(student, look)
    # Chunks are numbered by block: no two of a batch have one number.
    numbers = teacher["chunks"]
    unlike = torch.where(
        numbers > 0, numbers + torch.arange(len(numbers), device=numbers.device)[:, None] * numbers.shape[1], 0
    )
    which = unlike[rows]
    sums = own.new_zeros(2, numbers.numel() + 1)
    sums[0].index_add_(0, which, own)
    sums[1].index_add_(0, which, teacher["logprobs"][rows].double())
    there = torch.zeros_like(sums[0], dtype=torch.bool)
    there[which] = True
    there[0] = False
    with torch.enable_grad():
        log_q = sums[0].requires_grad_()
        distance = divergence(sums[1][there], log_q[there], objective.temperature).sum()
        [by_chunk] = torch.autograd.grad(distance, log_q)
    # A token's log-probability counts by how the loss of its chunk changes with it.
    weights = ((1 - objective.labels) * by_chunk[which] - objective.labels).float()

    def weighted(logits: torch.Tensor, part: slice) -> torch.Tensor:
        logprobs = logits.gather(-1, labels[part, None])[:, 0].float() - logits.float().logsumexp(-1)
        return (weights[part] * logprobs).sum()

    towards = chunked_head.sum_over_chunks(student, weighted)
    total = (1 - objective.labels) * distance.detach() - objective.labels * own.sum()
    return towards + (total.to(towards.dtype) - towards.detach())
