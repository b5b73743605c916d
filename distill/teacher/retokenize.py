"""What a teacher with other tokens says of the next one, told in the student's tokens.

Each of the teacher's tokens is a string, and the student spells it in tokens of its own. Where both have a token end
at the same byte of the text, the chance of each of the student's tokens is the sum of those of the teacher's tokens
whose spelling it begins. Amid a token of the teacher's, it is their chance among those that are spelt as the text has
gone on since. What is told is a distribution over the student's whole vocabulary: it is stored, and learnt from, as
any other.

That is exact where the student would spell a text as it spells the teacher's tokens one by one (byte-level BPE cuts
text into words before it merges anything, so most are). It is not where the student's tokens are longer than the
teacher's: of the text as it came, the chance of such a token is put right; of others it is not. Where less than half
of the chances can be told, the text's own next token is said to come for certain: there the student learns from
labels. (Phan et al., arXiv 2410.09303 and 2512.14954, work out chances under another tokenizer exactly, with more
passes of the teacher.)
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

MIN_MAPPED_SHARE = 0.5  # share of the teacher's chances that has to be told
SMOOTHING = 1e-4  # of what is told, over all tokens: of some the teacher can say nothing


class Retokenizer:
    """Distributions over one tokenizer's tokens as distributions over another's.

    Attributes:
        spelt: of each of the teacher's tokens, the student's that spell it; empty where none do.
    """

    def __init__(self, teacher_tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase) -> None:
        self.teacher_bytes, self.student_bytes = token_bytes(teacher_tokenizer), token_bytes(student_tokenizer)
        self.vocab_size = loading.vocabulary_size(student_tokenizer)
        self.spellings = _spellings(self.teacher_bytes, student_tokenizer, self.student_bytes)
        if teacher_tokenizer.eos_token_id is not None and student_tokenizer.eos_token_id is not None:
            self.spellings[teacher_tokenizer.eos_token_id] = (student_tokenizer.eos_token_id,)
        first = [spelling[0] if spelling else self.vocab_size for spelling in self.spellings]
        self.first = torch.tensor(first)
        goes_on: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        ends: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for token, spelling in enumerate(self.spellings):
            ends[spelling].append(token)
            for length in range(1, len(spelling)):
                goes_on[spelling[:length]].append((token, spelling[length]))
        # By how a token's spelling begins: those tokens and what comes next in each; those that end there.
        self.continuations = {begun: torch.tensor(pairs).T for begun, pairs in goes_on.items()}
        self.ends = {begun: torch.tensor(ends.get(begun, []), dtype=torch.int64) for begun in self.continuations}

    def probs_at_shared_end(self, probs: torch.Tensor) -> torch.Tensor:
        """Where both have a token end: probs (n, U) of the teacher -> (n, V), of what can be told."""
        said = probs.new_zeros(len(probs), self.vocab_size + 1)
        return said.index_add_(1, self.first.to(probs.device), probs)[:, : self.vocab_size]

    def probs_inside_token(self, probs: torch.Tensor, prefix: tuple[int, ...]) -> torch.Tensor | None:
        """Amid a token of the teacher's: probs (U,) of it -> (V,), given the student's tokens since it began.

        None where none of its tokens is likely to go on so.
        """
        if prefix not in self.continuations:
            return None
        tokens, following = self.continuations[prefix].to(probs.device)
        chances = probs[tokens]
        if chances.sum() < MIN_MAPPED_SHARE * (chances.sum() + probs[self.ends[prefix].to(probs.device)].sum()):
            return None
        return probs.new_zeros(self.vocab_size).index_add_(0, following, chances / chances.sum())

    def span_probs(
        self, logits: torch.Tensor, read: TokenizedSpan, student_ids: np.ndarray, ends: np.ndarray
    ) -> torch.Tensor:
        """What a teacher says of each next token of a piece, told in the student's.

        Args:
            logits: (m, U), of the first m of the tokens that it read.
            student_ids: (n,) the student's tokens, the first and the last too; ends: (n,) where they end.

        Returns:
            (n - 1, V) probabilities, each row a distribution or, where too little can be told, zero.
        """
        probs = logits.softmax(-1)
        place = {int(end): number for number, end in reversed(list(enumerate(read.ends[: len(logits)])))}
        if read.has_added_space:  # of the first token the teacher speaks as if a space had come before it
            place.pop(0, None)
        shared = [number for number, end in enumerate(ends[:-1]) if int(end) in place]
        rows = probs.new_zeros(len(student_ids) - 1, self.vocab_size)
        if shared:
            rows[shared] = self.probs_at_shared_end(probs[[place[int(ends[number])] for number in shared]])
            rows[rows.sum(-1) < MIN_MAPPED_SHARE] = 0.0
        last = -1
        for number in range(len(student_ids) - 1):
            if int(ends[number]) in place:
                last = number
                self._correct_token_prob(
                    rows[number], probs, read, place[int(ends[number])], student_ids[number + 1], ends[number + 1]
                )
            elif last >= 0:
                begun = tuple(student_ids[last + 1 : number + 1].tolist())
                told = self.probs_inside_token(probs[place[int(ends[last])]], begun)
                if told is not None:
                    rows[number] = told
        return rows / rows.sum(-1, keepdim=True).clamp_min(1e-9)

    def _correct_token_prob(
        self, row: torch.Tensor, probs: torch.Tensor, read: TokenizedSpan, place: int, token: int, end: int
    ) -> None:
        """A token of the text that the teacher spells in several: their chance is its own, not its beginning's."""
        until = int(np.searchsorted(read.ends, end))
        if until <= place + 1 or until >= len(read.ends) or until > len(probs) or not row.any():
            return
        others = torch.arange(place, until, device=probs.device)
        chance = probs[others, torch.from_numpy(read.ids[place + 1 : until + 1]).to(probs.device)].prod()
        spelling = self.spellings[read.ids[place + 1]]
        if spelling and spelling[0] != token:
            moved = torch.minimum(chance, row[spelling[0]])
            row[spelling[0]] -= moved
            row[token] += moved


def _spellings(
    teacher_bytes: Sequence[bytes], student_tokenizer: PreTrainedTokenizerBase, texts: Sequence[bytes]
) -> list[tuple[int, ...]]:
    """How the student spells each string; empty where it spells none so.

    What is no text alone, as half of a character, is spelt as a token of the same bytes, or byte by byte.
    """
    found: list[tuple[int, ...]] = [()] * len(teacher_bytes)
    for before in ("", "\n"):  # SentencePiece puts a space before a text, and what follows a line keeps its own
        wanted = [number for number, raw in enumerate(teacher_bytes) if raw and not found[number] and _is_text(raw)]
        if not wanted:
            break
        asked = [before + teacher_bytes[number].decode() for number in wanted]
        for number, ids in zip(wanted, student_tokenizer(asked, add_special_tokens=False)["input_ids"], strict=True):
            skipped = next((k for k in range(len(ids)) if _joined(ids[k:], texts) == teacher_bytes[number]), None)
            if skipped is not None and _joined(ids[:skipped], texts) in (before.encode(), b" " + before.encode()):
                found[number] = tuple(ids[skipped:])
    of_bytes = {raw: token for token, raw in reversed(list(enumerate(texts))) if raw}
    for number, raw in enumerate(teacher_bytes):
        if raw and not found[number] and not _is_text(raw):
            parts = [raw] if raw in of_bytes else [raw[k : k + 1] for k in range(len(raw))]
            found[number] = tuple(of_bytes[part] for part in parts) if all(p in of_bytes for p in parts) else ()
    return found


def _joined(ids: Sequence[int], texts: Sequence[bytes]) -> bytes:
    return b"".join(texts[token] for token in ids)


def _is_text(raw: bytes) -> bool:
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
    """As `teacher.one_pass`, for a teacher with tokens of its own.

    Args:
        teacher_tokenizer: the teacher's tokenizer.
        tokenizer: of the blocks.
        bf16: run under autocast.
    """
    torch.nn.Module.to(model, loading.device()).eval()
    retelling = Retokenizer(teacher_tokenizer, tokenizer)
    vocab_size = loading.vocabulary_size(teacher_tokenizer)

    def of_blocks(indices: np.ndarray) -> Iterator[torch.Tensor]:
        """Logits (T, V) of each block."""
        for start in range(0, len(indices), 8):
            few = [
                document_spans(blocks, int(number), tokenizer, retelling.student_bytes)
                for number in indices[start : start + 8]
            ]
            flat = [(row, *piece) for row, of_block in enumerate(few) for piece in of_block]
            encoded = tokenize_spans([piece for *_, piece in flat], teacher_tokenizer, retelling.teacher_bytes)
            said = torch.zeros(len(few), blocks.ids.shape[1], retelling.vocab_size)
            for number, logits in span_logits(model, encoded, vocab_size, bf16):
                row, places, ends, piece = flat[number]
                read = encoded[number]._replace(ends=encoded[number].ends + piece.skipped)
                own = blocks.ids[indices[start + row], places]
                said[row, places.start : places.stop - 1] = retelling.span_probs(logits, read, own, ends).cpu()
            for number, rows in zip(indices[start : start + 8], said, strict=True):
                following = torch.from_numpy(np.append(blocks.ids[number, 1:], 0).astype(np.int64))
                untold = rows.sum(-1) < MIN_MAPPED_SHARE
                rows[untold, following[untold]] = 1.0
                yield ((1 - SMOOTHING) * rows + SMOOTHING / retelling.vocab_size).log()

    @torch.inference_mode()
    def told(indices: np.ndarray, caches: list[TeacherCache]) -> list[dict[str, np.ndarray]]:
        return arrays_to_store(blocks, indices, of_blocks(indices), caches)

    return told
