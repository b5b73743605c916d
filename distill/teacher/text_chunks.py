"""A teacher with another tokenizer: both read the same text, and its chunks that both begin and end are compared.

Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083): where both have a token end at the same byte of
the text, a chunk ends. A chunk's log-probability is the sum of those of its tokens, and what is matched is whether it
comes or not: the divergence of two outcomes, since nobody can sum over all other strings. It needs nothing of the
teacher but its log-probability of each token of the text. Equal tokenizers make each token a chunk of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from limbeck.distill.cache.teacher_cache import Capture
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.models import loading
from limbeck.distill.models.alignment import TextSpan, document_spans, span_logits, token_bytes, tokenize_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SpanLogprobs(NamedTuple):
    """How a teacher read a piece: where its tokens end, in bytes of the text from 0, and their log-probabilities.

    The first token of all, with nothing before it, has none: NaN. The end of a document is a token that ends one
    byte after the text.
    """

    ends: np.ndarray
    logprobs: np.ndarray


Reader = Callable[[Sequence[TextSpan]], list[SpanLogprobs]]
TokensAndLogprobs = tuple[list[str], list[float]]  # the tokens of a text, and their log-probabilities


def local_reader(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bf16: bool) -> Reader:
    """A teacher that runs here reads pieces by its own tokenizer; what exceeds its context is not read.

    Args:
        bf16: run under autocast.
    """
    torch.nn.Module.to(model, loading.device()).eval()
    texts, vocab_size = token_bytes(tokenizer), loading.vocabulary_size(tokenizer)

    def read(asked: Sequence[TextSpan]) -> list[SpanLogprobs]:
        reads = [SpanLogprobs(np.zeros(0, dtype=np.int64), np.zeros(0)) for _ in asked]
        encoded = tokenize_spans(asked, tokenizer, texts)
        for number, logits in span_logits(model, encoded, vocab_size, bf16):
            ids = torch.from_numpy(encoded[number].ids[1 : len(logits), None]).to(logits.device)
            said = logits[:-1].gather(-1, ids)[:, 0] - logits[:-1].logsumexp(-1)
            reads[number] = SpanLogprobs(encoded[number].ends[: len(logits)], np.append(np.nan, said.cpu().numpy()))
        return reads

    return read


def endpoint_reader(token_logprobs: Callable[[Sequence[str]], Iterable[tuple[int, TokensAndLogprobs]]]) -> Reader:
    """A teacher behind an endpoint that echoes a text with its tokens and their log-probabilities.

    Where a document begins and ends it is not told: the first token has no log-probability, and the end none.

    Args:
        token_logprobs: (number, (tokens, log-probabilities)) of each text, in any order.
    """

    def read(asked: Sequence[TextSpan]) -> list[SpanLogprobs]:
        reads = [SpanLogprobs(np.zeros(0, dtype=np.int64), np.zeros(0)) for _ in asked]
        wanted = [number for number, piece in enumerate(asked) if piece.text]
        for place, (tokens, logprobs) in token_logprobs([asked[number].text for number in wanted]):
            ends = np.cumsum([len(token.encode()) for token in tokens])
            ends[ends == 0] = -4  # the first part of a character: nothing is told of it, so no chunk begins with it
            reads[wanted[place]] = SpanLogprobs(ends, np.array(logprobs, dtype=float))
        return reads

    return read


def align(own: np.ndarray, read: SpanLogprobs) -> tuple[np.ndarray, np.ndarray]:
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
        found = [document_spans(blocks, int(number), tokenizer, texts) for number in indices]
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
