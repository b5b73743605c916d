"""Text to tokens: a tokenizer trained on the corpus where asked, and fixed-length blocks of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distill.corpus import Document
from registry.digest import text_digest
from registry.errors import BadInput

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"


class Blocks(NamedTuple):
    """Token ids laid out in blocks, several documents to a block where they are short, and what identifies it all.

    Attributes:
        ids: (N, T) int32.
        segments: (N, T) uint16: which document of its block a token belongs to, counted from 1; 0 is padding.
        targets: (N, T) bool: whether a token is to be predicted from those before it in its segment.
        text_tokens: tokens that stand for text: all but padding and the tokens that start a document.
        text_bytes: bytes of UTF-8 that those stand for.
    """

    ids: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    text_tokens: int
    text_bytes: int
    digest: str

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The blocks at `indices` (n,) as a model takes them.

        Returns:
            `input_ids` (n, T) int64; `labels` (n, T) int64, not shifted, -100 where nothing is to be predicted;
            and, where a block holds more than one document, `position_ids` (n, T) int64 that begin anew with
            each: from them transformers builds an attention mask that no document sees another through.
        """
        import torch

        ids, segments = self.ids[indices].astype(np.int64), self.segments[indices]
        batch = {"input_ids": ids, "labels": np.where(self.targets[indices], ids, -100)}
        if (segments != segments[:, :1]).any():
            batch["position_ids"] = positions(segments)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def positions(segments: np.ndarray) -> np.ndarray:
    """Of each token its place in its segment: (n, T) -> (n, T) int64, from 0."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.ones(segments.shape, dtype=bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def train_tokenizer(documents: Iterable[Document], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `vocab_size` tokens with one special token that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def make_blocks(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, max_length: int, max_tokens: int | None = None
) -> Blocks:
    """Documents, each between a start token and EOS, laid end to end and cut into blocks.

    The start token is BOS, or EOS where the tokenizer has none: what lm-eval gives a model before a text. A
    document that does not end in a block goes on in the next without what came before. The last partial block is
    dropped.

    Args:
        max_length: tokens a block.
        max_tokens: stop after the last whole block within so many.

    Raises:
        BadInput: a tokenizer without EOS, or text that does not fill one block.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise BadInput("the tokenizer has no EOS token", fix="give it one: documents are told apart by it")
    start = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pieces: list[np.ndarray] = []
    sizes: list[int] = []  # bytes of each piece
    count = 0
    for first in range(0, len(documents), 64):
        if max_tokens and count >= max_tokens:
            break
        texts = [document.text for document in documents[first : first + 64]]
        tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        pieces += [np.asarray([start, *piece, end], dtype=np.int32) for piece in tokens]
        sizes += [len(text.encode()) for text in texts]
        count += sum(map(len, tokens)) + 2 * len(tokens)
    used = min(count, max_tokens or count) // max_length * max_length
    if used == 0:
        raise BadInput(
            f"{count} tokens of text do not fill one block of {max_length}",
            fix="give more text or a smaller data.max_length",
        )
    lengths = [len(piece) for piece in pieces]
    ids = np.concatenate(pieces)[:used].reshape(-1, max_length)
    numbers = np.repeat(np.arange(len(pieces)), lengths)[:used].reshape(-1, max_length)
    segments = (numbers - numbers[:, :1] + 1).astype(np.uint16)
    targets = positions(segments) > 0  # the first of a segment follows nothing
    starts = int((np.cumsum([0, *lengths[:-1]]) < used).sum())
    return Blocks(
        ids,
        segments,
        targets,
        used - starts,
        _bytes_within(used, lengths, sizes),
        layout_digest(ids, segments, targets),
    )


def no_blocks(max_length: int) -> Blocks:
    """Of a text that is not written yet."""
    nothing = np.zeros((0, max_length))
    return Blocks(nothing.astype(np.int32), nothing.astype(np.uint16), nothing.astype(bool), 0, 0, "")


def layout_digest(ids: np.ndarray, segments: np.ndarray, targets: np.ndarray) -> str:
    """What identifies blocks: their tokens and how they are laid out."""
    parts = (f"{ids.shape[1]}\n".encode(), ids.tobytes(), segments.tobytes(), targets.tobytes())
    return text_digest(b"".join(parts))


def _bytes_within(used: int, lengths: list[int], sizes: list[int]) -> int:
    """Bytes of text in the first `used` tokens; the bytes of a document that is cut are shared out by its tokens."""
    ends = np.cumsum(lengths)
    whole = int(np.searchsorted(ends, used, side="right"))
    total = sum(sizes[:whole])
    if whole < len(lengths):
        inside = used - (int(ends[whole - 1]) if whole else 0)
        total += round(sizes[whole] * inside / lengths[whole])
    return total
