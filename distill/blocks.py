"""Text to tokens: a tokenizer trained on the corpus where asked, and fixed-length blocks of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from distill.corpus import Document
from registry.digest import text_digest
from registry.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"


class Blocks(NamedTuple):
    """Token ids (N, max_length) int32, the bytes of text they stand for, and what identifies them."""

    ids: np.ndarray
    text_bytes: int
    digest: str


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
    """Documents, each ended by EOS, laid end to end and cut into blocks; the last partial block is dropped.

    Args:
        max_length: tokens a block.
        max_tokens: stop after the last whole block within so many.

    Raises:
        BadInput: a tokenizer without EOS, or text that does not fill one block.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise BadInput("the tokenizer has no EOS token", fix="give it one: documents are told apart by it")
    pieces: list[np.ndarray] = []
    sizes: list[int] = []  # bytes of each piece
    count = 0
    for start in range(0, len(documents), 64):
        if max_tokens and count >= max_tokens:
            break
        texts = [document.text for document in documents[start : start + 64]]
        tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        pieces += [np.asarray([*piece, end], dtype=np.int32) for piece in tokens]
        sizes += [len(text.encode()) for text in texts]
        count += sum(map(len, tokens)) + len(tokens)
    used = min(count, max_tokens or count) // max_length * max_length
    if used == 0:
        raise BadInput(
            f"{count} tokens of text do not fill one block of {max_length}",
            fix="give more text or a smaller data.max_length",
        )
    ids = np.concatenate(pieces)[:used].reshape(-1, max_length)
    identity = text_digest(f"{max_length}\n".encode() + ids.tobytes())
    return Blocks(ids, _bytes_within(used, [len(piece) for piece in pieces], sizes), identity)


def _bytes_within(used: int, lengths: list[int], sizes: list[int]) -> int:
    """Bytes of text in the first `used` tokens; the bytes of a document that is cut are shared out by its tokens."""
    ends = np.cumsum(lengths)
    whole = int(np.searchsorted(ends, used, side="right"))
    total = sum(sizes[:whole])
    if whole < len(lengths):
        inside = used - (int(ends[whole - 1]) if whole else 0)
        total += round(sizes[whole] * inside / lengths[whole])
    return total
