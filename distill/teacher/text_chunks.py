"""A teacher with another tokenizer: stores its log-probabilities of the text chunks that both tokenizers share.

Approximate likelihood matching (Minixhofer et al., arXiv 2503.20083). A chunk ends at each byte of the text at which
tokens of both end, and its log-probability is the sum of those of its tokens. The loss
(`limbeck.distill.losses.text_chunks`) compares two outcomes, "this chunk is next" and "it is not", since nobody can
sum over all other strings. So the teacher has to give only its log-probability of each token of the text. If both
tokenizers are equal, each token is a chunk.
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
    """A teacher's tokens of a text span, empty if it could not read the span.

    Attributes:
        ends: (n,) where each token ends, in bytes of the text from 0. A token that ends the document ends one byte
            after the text.
        logprobs: (n,) float; NaN for a first token with nothing before it.
    """

    ends: np.ndarray
    logprobs: np.ndarray


Reader = Callable[[Sequence[TextSpan]], list[SpanLogprobs]]
TokensAndLogprobs = tuple[list[str], list[float]]  # the tokens of a text, and their log-probabilities


def local_reader(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bf16: bool) -> Reader:
    """Read spans with a local teacher and its own tokenizer, up to its context length.

    Args:
        bf16: run under autocast.
    """
    torch.nn.Module.to(model, loading.device()).eval()
    texts, vocab_size = token_bytes(tokenizer), loading.vocabulary_size(tokenizer)

    def read(spans: Sequence[TextSpan]) -> list[SpanLogprobs]:
        results = [SpanLogprobs(np.zeros(0, dtype=np.int64), np.zeros(0)) for _ in spans]
        encoded = tokenize_spans(spans, tokenizer, texts)
        for number, logits in span_logits(model, encoded, vocab_size, bf16):
            ids = torch.from_numpy(encoded[number].ids[1 : len(logits), None]).to(logits.device)
            logprobs = logits[:-1].gather(-1, ids)[:, 0] - logits[:-1].logsumexp(-1)
            ends = encoded[number].ends[: len(logits)]
            results[number] = SpanLogprobs(ends, np.append(np.nan, logprobs.cpu().numpy()))
        return results

    return read


def endpoint_reader(token_logprobs: Callable[[Sequence[str]], Iterable[tuple[int, TokensAndLogprobs]]]) -> Reader:
    """Read spans with a teacher behind an endpoint that returns prompt logprobs.

    It does not see where a document begins or ends: the first token has no log-probability, and no token ends the
    document.

    Args:
        token_logprobs: (number, (tokens, log-probabilities)) of each text, in any order.
    """

    def read(spans: Sequence[TextSpan]) -> list[SpanLogprobs]:
        results = [SpanLogprobs(np.zeros(0, dtype=np.int64), np.zeros(0)) for _ in spans]
        numbers = [number for number, span in enumerate(spans) if span.text]
        for place, (tokens, logprobs) in token_logprobs([spans[number].text for number in numbers]):
            ends = np.cumsum([len(token.encode()) for token in tokens])
            ends[ends == 0] = -4  # the first part of a character has no log-probability: no chunk may begin after it
            results[numbers[place]] = SpanLogprobs(ends, np.array(logprobs, dtype=float))
        return results

    return read


def align(student_ends: np.ndarray, teacher: SpanLogprobs) -> tuple[np.ndarray, np.ndarray]:
    """Find the chunks of a text that two tokenizations share.

    Args:
        student_ends: (n,) where the student's tokens end, in bytes, ascending.

    Returns:
        numbers (n,) int64: the chunk of each of the student's tokens, counted from 1, 0 if it is in none; and the
        teacher's log-probability of each chunk.
    """
    numbers = np.zeros(len(student_ends), dtype=np.int64)
    shared_ends = np.intersect1d(student_ends, teacher.ends)
    if len(shared_ends) < 2:
        return numbers, np.zeros(0)
    # If several tokens end at the same byte, take the first: the others have no bytes, and belong to the next chunk.
    student_places = np.searchsorted(student_ends, shared_ends)
    teacher_places = np.searchsorted(teacher.ends, shared_ends)
    cumulative = np.concatenate([[0.0], np.cumsum(np.nan_to_num(teacher.logprobs))])
    logprobs = cumulative[teacher_places[1:] + 1] - cumulative[teacher_places[:-1] + 1]
    for chunk, (first, last) in enumerate(pairwise(student_places), start=1):
        numbers[first + 1 : last + 1] = chunk
    return numbers, logprobs


def capture(blocks: Blocks, tokenizer: PreTrainedTokenizerBase, reader: Reader) -> Capture:
    """A function of block numbers that returns the arrays of a chunk cache, (n, T) each.

    The entry at a position is about the token after it: `chunks` uint16 is the number of that token's chunk in the
    block, counted from 1, 0 for none; `logprobs` float16 is the teacher's log-probability of the chunk at its last
    token, and 0 elsewhere. A chunk is stored only if all its tokens are targets.
    """
    texts = token_bytes(tokenizer)

    def stored_arrays(indices: np.ndarray) -> dict[str, np.ndarray]:
        blocks_spans = [document_spans(blocks, int(number), tokenizer, texts) for number in indices]
        results = iter(reader([span for spans in blocks_spans for _, _, span in spans]))
        shape = (len(indices), blocks.ids.shape[1])
        chunks, logprobs = np.zeros(shape, dtype=np.uint16), np.zeros(shape, dtype=np.float16)
        for row, (number, spans) in enumerate(zip(indices, blocks_spans, strict=True)):
            count = 0
            for places, ends, span in spans:
                read = next(results)
                numbers, chunk_logprobs = align(ends, read._replace(ends=read.ends + span.skipped))
                targets = blocks.targets[number, places]
                for chunk in np.unique(numbers[~targets]):
                    numbers[numbers == chunk] = 0
                for chunk in np.unique(numbers[numbers > 0]):
                    count += 1
                    positions = np.flatnonzero(numbers == chunk) + places.start - 1
                    chunks[row, positions] = count
                    logprobs[row, positions[-1]] = max(chunk_logprobs[chunk - 1], -60000)
        return {"chunks": chunks, "logprobs": logprobs}

    return stored_arrays
