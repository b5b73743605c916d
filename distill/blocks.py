"""Text to tokens: a tokenizer trained on the corpus where asked, and fixed-length blocks of token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
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

    Raises BadInput where the text does not fill one block.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise BadInput("the tokenizer has no EOS token", fix="give it one: documents are told apart by it")
    ids: list[int] = []
    lengths: list[tuple[int, int]] = []  # (tokens so far, bytes so far) after each document
    size = 0
    for start in range(0, len(documents), 64):
        texts = [document.text for document in documents[start : start + 64]]
        for text, tokens in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            ids.extend(tokens)
            ids.append(end)
            size += len(text.encode())
            lengths.append((len(ids), size))
        if max_tokens and len(ids) >= max_tokens + max_length:
            break
    count = min(len(ids), max_tokens or len(ids)) // max_length
    if count == 0:
        raise BadInput(
            f"{len(ids)} tokens of text do not fill one block of {max_length}",
            fix="give more text or a smaller data.max_length",
        )
    used = count * max_length
    tokens_there, bytes_there = next((pair for pair in lengths if pair[0] >= used), lengths[-1])
    array = np.asarray(ids[:used], dtype=np.int32).reshape(count, max_length)
    # Bytes of a document that is cut are shared out by its tokens: exact up to that one document.
    return Blocks(array, round(bytes_there * used / tokens_there), text_digest(array.tobytes()))


def tokenizer_digest(folder: Path) -> str:
    """What identifies a tokenizer: its `tokenizer.json`, or its slow vocabulary files."""
    names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt")
    found = [folder / name for name in names if (folder / name).exists()]
    return text_digest(b"".join(path.read_bytes() for path in found[:1] or found))
