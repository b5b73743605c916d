"""A teacher with another tokenizer: both read the same text, and its chunks that both begin and end are compared.

Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083): where both have a token end at the same byte of
the text, a chunk ends. A chunk's log-probability is the sum of those of its tokens, and what is matched is whether it
comes or not: the divergence of two outcomes, since nobody can sum over all other strings. It needs nothing of the
teacher but its log-probability of each token of the text. Equal tokenizers make each token a chunk of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from limbeck.distill.cache.teacher_cache import Capture
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.losses import chunked_head
from limbeck.distill.losses.chunked_head import Logits
from limbeck.distill.models import loading
from limbeck.distill.models.alignment import Piece, encode, pieces, run, token_bytes
from limbeck.distill.recipe.schema import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Read(NamedTuple):
    """How a teacher read a piece: where its tokens end, in bytes of the text from 0, and their log-probabilities.

    The first token of all, with nothing before it, has none: NaN. The end of a document is a token that ends one
    byte after the text.
    """

    ends: np.ndarray
    logprobs: np.ndarray


Reader = Callable[[Sequence[Piece]], list[Read]]
Echo = tuple[list[str], list[float]]  # the tokens of a text, and their log-probabilities


def local(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bf16: bool) -> Reader:
    """A teacher that runs here reads pieces by its own tokenizer; what exceeds its context is not read.

    Args:
        bf16: run under autocast.
    """
    torch.nn.Module.to(model, loading.device()).eval()
    texts, vocab_size = token_bytes(tokenizer), loading.vocabulary(tokenizer)

    def read(asked: Sequence[Piece]) -> list[Read]:
        reads = [Read(np.zeros(0, dtype=np.int64), np.zeros(0)) for _ in asked]
        encoded = encode(asked, tokenizer, texts)
        for number, logits in run(model, encoded, vocab_size, bf16):
            ids = torch.from_numpy(encoded[number].ids[1 : len(logits), None]).to(logits.device)
            said = logits[:-1].gather(-1, ids)[:, 0] - logits[:-1].logsumexp(-1)
            reads[number] = Read(encoded[number].ends[: len(logits)], np.append(np.nan, said.cpu().numpy()))
        return reads

    return read


def at_endpoint(token_logprobs: Callable[[Sequence[str]], Iterable[tuple[int, Echo]]]) -> Reader:
    """A teacher behind an endpoint that echoes a text with its tokens and their log-probabilities.

    Where a document begins and ends it is not told: the first token has no log-probability, and the end none.

    Args:
        token_logprobs: (number, (tokens, log-probabilities)) of each text, in any order.
    """

    def read(asked: Sequence[Piece]) -> list[Read]:
        reads = [Read(np.zeros(0, dtype=np.int64), np.zeros(0)) for _ in asked]
        wanted = [number for number, piece in enumerate(asked) if piece.text]
        for place, (tokens, logprobs) in token_logprobs([asked[number].text for number in wanted]):
            ends = np.cumsum([len(token.encode()) for token in tokens])
            ends[ends == 0] = -4  # the first part of a character: nothing is told of it, so no chunk begins with it
            reads[wanted[place]] = Read(ends, np.array(logprobs, dtype=float))
        return reads

    return read


def align(own: np.ndarray, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """Chunks of a text that two tokenizations share.

    Args:
        own: (n,) where the student's tokens end, not falling.

    Returns:
        numbers (n,) int64: the chunk of each of the student's tokens, counted from 1, 0 where it is in none; and the
        teacher's log-probability of each chunk.
    """
    numbers = np.zeros(len(own), dtype=np.int64)
    common = np.intersect1d(own, read.ends)
    if len(common) < 2:
        return numbers, np.zeros(0)
    # Of several tokens that end at one byte the first: the others are of no bytes, and belong to what follows.
    mine, theirs = np.searchsorted(own, common), np.searchsorted(read.ends, common)
    until = np.concatenate([[0.0], np.cumsum(np.nan_to_num(read.logprobs))])
    logprobs = until[theirs[1:] + 1] - until[theirs[:-1] + 1]
    for chunk, (first, last) in enumerate(pairwise(mine), start=1):
        numbers[first + 1 : last + 1] = chunk
    return numbers, logprobs


def capture(blocks: Blocks, tokenizer: PreTrainedTokenizerBase, reader: Reader) -> Capture:
    """What a cache stores of blocks: at each place (T,) what it says of the token after it.

    `chunks` uint16 is the number of its chunk in the block, from 1, 0 for none; `logprobs` float16 the teacher's
    log-probability of the chunk, where it ends, and 0 elsewhere. A chunk counts where all its tokens are targets.
    """
    texts = token_bytes(tokenizer)

    def stored(indices: np.ndarray) -> dict[str, np.ndarray]:
        found = [pieces(blocks, int(number), tokenizer, texts) for number in indices]
        reads = iter(reader([piece for of_block in found for _, _, piece in of_block]))
        shape = (len(indices), blocks.ids.shape[1])
        chunks, logprobs = np.zeros(shape, dtype=np.uint16), np.zeros(shape, dtype=np.float16)
        for row, (number, of_block) in enumerate(zip(indices, found, strict=True)):
            count = 0
            for places, ends, piece in of_block:
                read = next(reads)
                numbers, said = align(ends, read._replace(ends=read.ends + piece.skipped))
                targets = blocks.targets[number, places]
                for chunk in np.unique(numbers[~targets]):
                    numbers[numbers == chunk] = 0
                kept = np.unique(numbers[numbers > 0])
                for chunk in kept:
                    count += 1
                    of_chunk = np.flatnonzero(numbers == chunk) + places.start - 1
                    chunks[row, of_chunk] = count
                    logprobs[row, of_chunk[-1]] = max(said[chunk - 1], -60000)
        return {"chunks": chunks, "logprobs": logprobs}

    return stored


# --- the loss


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
    student: Logits, labels: torch.Tensor, rows: torch.Tensor, said: Mapping[str, torch.Tensor], objective: Objective
) -> torch.Tensor:
    """Labels and chunks mixed as the objective says, summed over tokens, in nats.

    Args:
        student: logits of the N targets.
        labels: (N,) int64.
        rows: (B, T) bool, N of them true: where in the batch the targets are.
        said: `chunks` and `logprobs` (B, T), as `capture` stores them.
    """
    own = torch.empty(len(labels), dtype=torch.float64, device=labels.device)

    def look(logits: torch.Tensor, part: slice) -> torch.Tensor:
        own[part] = (logits.gather(-1, labels[part, None])[:, 0] - logits.logsumexp(-1)).double()
        return own.new_zeros(())

    with torch.no_grad():
        chunked_head.summed(student, look)
    # Chunks are numbered by block: no two of a batch have one number.
    numbers = said["chunks"]
    unlike = torch.where(
        numbers > 0, numbers + torch.arange(len(numbers), device=numbers.device)[:, None] * numbers.shape[1], 0
    )
    which = unlike[rows]
    sums = own.new_zeros(2, numbers.numel() + 1)
    sums[0].index_add_(0, which, own)
    sums[1].index_add_(0, which, said["logprobs"][rows].double())
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

    towards = chunked_head.summed(student, weighted)
    total = (1 - objective.labels) * distance.detach() - objective.labels * own.sum()
    return towards + (total.to(towards.dtype) - towards.detach())
