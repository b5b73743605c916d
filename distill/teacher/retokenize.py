"""Maps the next-token distributions of a teacher with another tokenizer to the student's tokens.

Each teacher token is a string that the student's tokenizer spells in one or more of its own tokens. At a byte of the
text where tokens of both end, the probability of a student token is the sum over the teacher tokens whose spelling it
begins. Inside a teacher token, it is the same sum over the teacher tokens whose spelling begins as the text did since
the last shared end, normalized. The result is a distribution over the student's whole vocabulary, which is stored and
learned from like any other.

This is exact if the student spells the text as it spells the teacher's tokens one by one, which holds for most text:
byte-level BPE splits text into words before it merges anything. It is not exact if a student token is longer than the
teacher's tokens: then only the probability of the text's own next token is corrected. Where less than half of the
teacher's probability can be mapped, the text's own next token gets all of it, so that the student learns from the
label. (Phan et al., arXiv 2410.09303 and 2512.14954, compute the probabilities exactly with more teacher passes.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from limbeck.distill.cache.teacher_cache import TeacherCache, TeacherPass, arrays_to_store
from limbeck.distill.data.blocks import Blocks
from limbeck.distill.models import loading
from limbeck.distill.models.alignment import TokenizedSpan, document_spans, span_logits, token_bytes, tokenize_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_MAPPED_SHARE = 0.5  # share of the teacher's probability that must be mapped, else the label is stored
SMOOTHING = 1e-4  # probability spread over all tokens, since the teacher cannot express some of them
BLOCKS_AT_A_TIME = 8


class Retokenizer:
    """Maps distributions over the teacher's U tokens to distributions over the student's V tokens.

    Attributes:
        spellings: for each teacher token, the student tokens that spell it; empty if it has no spelling.
        first: (U,) the first token of each spelling; V for none.
        continuations: for each proper beginning of a spelling, the teacher tokens that go on after it, and the
            student token that is next in each: (2, n) int64.
        ends: for each of these beginnings, the teacher tokens whose whole spelling it is.
    """

    def __init__(self, teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase) -> None:
        self.teacher_bytes, self.student_bytes = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
        self.vocab_size = loading.vocabulary_size(student_tokenizer)
        self.spellings = _spellings(self.teacher_bytes, student_tokenizer, self.student_bytes)
        if teacher_tokenizer.eos_token_id is not None and student_tokenizer.eos_token_id is not None:
            self.spellings[teacher_tokenizer.eos_token_id] = (student_tokenizer.eos_token_id,)
        self.first = torch.tensor([spelling[0] if spelling else self.vocab_size for spelling in self.spellings])
        continuations: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for token, spelling in enumerate(self.spellings):
            ends[spelling].append(token)
            for length in range(1, len(spelling)):
                continuations[spelling[:length]].append((token, spelling[length]))
        self.continuations = {prefix: torch.tensor(pairs).T for prefix, pairs in continuations.items()}
        self.ends = {prefix: torch.tensor(ends.get(prefix, []), dtype=torch.int64) for prefix in self.continuations}

    def probs_at_shared_end(self, probs: torch.Tensor) -> torch.Tensor:
        """Map the teacher's probs (n, U) at shared ends to (n, V); a row sums to the share that could be mapped."""
        mapped = probs.new_zeros(len(probs), self.vocab_size + 1)
        return mapped.index_add_(1, self.first.to(probs.device), probs)[:, : self.vocab_size]

    def probs_inside_token(self, probs: torch.Tensor, prefix: tuple[int, ...]) -> torch.Tensor | None:
        """Map the teacher's probs (U,) inside one of its tokens to a distribution (V,).

        None if the teacher is unlikely to go on inside a token.

        Args:
            probs: at the last shared end.
            prefix: the student's tokens since then.
        """
        if prefix not in self.continuations:
            return None
        tokens, following = self.continuations[prefix].to(probs.device)
        continuing = probs[tokens]
        ending = probs[self.ends[prefix].to(probs.device)].sum()
        if continuing.sum() < MIN_MAPPED_SHARE * (continuing.sum() + ending):
            return None
        return probs.new_zeros(self.vocab_size).index_add_(0, following, continuing / continuing.sum())

    def span_probs(
        self, logits: torch.Tensor, teacher_span: TokenizedSpan, student_ids: np.ndarray, ends: np.ndarray
    ) -> torch.Tensor:
        """Map a teacher's predictions over a text span to the student's tokens.

        Args:
            logits: (m, U), after each of the first m tokens of `teacher_span`.
            teacher_span: the span in the teacher's tokens.
            student_ids: (n,) all tokens of the span in the student's tokens.
            ends: (n,) where the student's tokens end, in bytes.

        Returns:
            (n - 1, V) probabilities after each student token but the last. A row is a distribution, or zero if too
            little could be mapped.
        """
        probs = logits.softmax(-1)
        place_of_end = {int(end): place for place, end in reversed(list(enumerate(teacher_span.ends[: len(logits)])))}
        if teacher_span.has_added_space:  # the teacher predicts the first token as if a space came before it
            place_of_end.pop(0, None)
        shared = [number for number, end in enumerate(ends[:-1]) if int(end) in place_of_end]
        rows = probs.new_zeros(len(student_ids) - 1, self.vocab_size)
        if shared:
            rows[shared] = self.probs_at_shared_end(probs[[place_of_end[int(ends[number])] for number in shared]])
            rows[rows.sum(-1) < MIN_MAPPED_SHARE] = 0.0
        last_shared = -1
        for number in range(len(student_ids) - 1):
            place = place_of_end.get(int(ends[number]))
            if place is not None:
                last_shared = number
                self._correct_token_prob(
                    rows[number], probs, teacher_span, place, student_ids[number + 1], ends[number + 1]
                )
            elif last_shared >= 0:
                prefix = tuple(student_ids[last_shared + 1 : number + 1].tolist())
                mapped = self.probs_inside_token(probs[place_of_end[int(ends[last_shared])]], prefix)
                if mapped is not None:
                    rows[number] = mapped
        return rows / rows.sum(-1, keepdim=True).clamp_min(1e-9)

    def _correct_token_prob(
        self, row: torch.Tensor, probs: torch.Tensor, teacher_span: TokenizedSpan, place: int, token: int, end: int
    ) -> None:
        """Correct the probability of the text's next token if the teacher needs several tokens for it, in place.

        Its probability is the product of those tokens' probabilities; `probs_at_shared_end` gave it to the student
        token that begins the first of them.

        Args:
            row: (V,) the mapped probabilities.
            place: of the teacher's token that ends where `token` begins.
            end: of `token`, in bytes.
        """
        last = int(np.searchsorted(teacher_span.ends, end))
        if last <= place + 1 or last >= len(teacher_span.ends) or last > len(probs) or not row.any():
            return
        places = torch.arange(place, last, device=probs.device)
        ids = torch.from_numpy(teacher_span.ids[place + 1 : last + 1]).to(probs.device)
        product = probs[places, ids].prod()
        spelling = self.spellings[teacher_span.ids[place + 1]]
        if spelling and spelling[0] != token:
            moved = torch.minimum(product, row[spelling[0]])
            row[spelling[0]] -= moved
            row[token] += moved


def _spellings(
    teacher_bytes: Sequence[bytes], student_tokenizer: PreTrainedTokenizerBase, texts: Sequence[bytes]
) -> list[tuple[int, ...]]:
    """The student tokens that spell each teacher token; empty if there are none.

    A teacher token that is not a text alone, such as half of a character, is spelled by a student token of the same
    bytes, or byte by byte.

    Args:
        texts: the bytes of the student's tokens.
    """
    spellings: list[tuple[int, ...]] = [()] * len(teacher_bytes)
    # SentencePiece puts a space before a text, but not after a line break: try the text after one too.
    for before in ("", "\n"):
        numbers = [number for number, raw in enumerate(teacher_bytes) if not spellings[number] and _is_text(raw)]
        if not numbers:
            break
        strings = [before + teacher_bytes[number].decode() for number in numbers]
        encoded = student_tokenizer(strings, add_special_tokens=False)["input_ids"]
        for number, ids in zip(numbers, encoded, strict=True):
            spellings[number] = _suffix_spelling(ids, teacher_bytes[number], before.encode(), texts)
    token_of_bytes = {raw: token for token, raw in reversed(list(enumerate(texts))) if raw}
    for number, raw in enumerate(teacher_bytes):
        if raw and not spellings[number] and not _is_text(raw):
            spellings[number] = _byte_spelling(raw, token_of_bytes)
    return spellings


def _suffix_spelling(ids: Sequence[int], raw: bytes, before: bytes, texts: Sequence[bytes]) -> tuple[int, ...]:
    """The last tokens of `ids` that spell `raw`, if the tokens before them spell `before`; else none."""
    skipped = next((k for k in range(len(ids)) if _joined(ids[k:], texts) == raw), None)
    if skipped is None or _joined(ids[:skipped], texts) not in (before, b" " + before):
        return ()
    return tuple(ids[skipped:])


def _byte_spelling(raw: bytes, token_of_bytes: dict[bytes, int]) -> tuple[int, ...]:
    """The token of these bytes, or else a token for each byte; none if a byte has no token."""
    parts = [raw] if raw in token_of_bytes else [raw[k : k + 1] for k in range(len(raw))]
    if any(part not in token_of_bytes for part in parts):
        return ()
    return tuple(token_of_bytes[part] for part in parts)


def _joined(ids: Sequence[int], texts: Sequence[bytes]) -> bytes:
    return b"".join(texts[token] for token in ids)


def _is_text(raw: bytes) -> bool:
    """Whether the bytes are valid UTF-8 and not empty."""
    try:
        return bool(raw.decode())
    except UnicodeDecodeError:
        return False


def retokenized_pass(
    model: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    blocks: Blocks,
    tokenizer: PreTrainedTokenizerBase,
    bf16: bool,
) -> TeacherPass:
    """As `limbeck.distill.teacher.local.local_pass`, for a teacher whose tokens are not those of the blocks.

    Args:
        tokenizer: of the blocks.
        bf16: run under autocast.
    """
    torch.nn.Module.to(model, loading.device()).eval()
    retokenizer = Retokenizer(teacher_tokenizer, tokenizer)
    vocab_size = loading.vocabulary_size(teacher_tokenizer)

    def log_probs(indices: np.ndarray) -> Iterator[torch.Tensor]:
        """Log-probabilities (T, V) of each block."""
        for start in range(0, len(indices), BLOCKS_AT_A_TIME):
            numbers = indices[start : start + BLOCKS_AT_A_TIME]
            spans = [
                (row, *span)
                for row, number in enumerate(numbers)
                for span in document_spans(blocks, int(number), tokenizer, retokenizer.student_bytes)
            ]
            encoded = tokenize_spans([span for *_, span in spans], teacher_tokenizer, retokenizer.teacher_bytes)
            probs = torch.zeros(len(numbers), blocks.ids.shape[1], retokenizer.vocab_size)
            for number, logits in span_logits(model, encoded, vocab_size, bf16):
                row, places, ends, span = spans[number]
                teacher_span = encoded[number]._replace(ends=encoded[number].ends + span.skipped)
                ids = blocks.ids[numbers[row], places]
                mapped = retokenizer.span_probs(logits, teacher_span, ids, ends)
                probs[row, places.start : places.stop - 1] = mapped.cpu()
            for number, rows in zip(numbers, probs, strict=True):
                labels = torch.from_numpy(np.append(blocks.ids[number, 1:], 0).astype(np.int64))
                unmapped = rows.sum(-1) < MIN_MAPPED_SHARE
                rows[unmapped, labels[unmapped]] = 1.0
                yield ((1 - SMOOTHING) * rows + SMOOTHING / retokenizer.vocab_size).log()

    @torch.inference_mode()
    def run(indices: np.ndarray, caches: list[TeacherCache]) -> list[dict[str, np.ndarray]]:
        return arrays_to_store(blocks, indices, log_probs(indices), caches)

    return run
