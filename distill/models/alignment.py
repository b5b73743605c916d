"""The text that a block holds of each document, and how a teacher with other tokens reads it, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from limbeck.distill.data.blocks import Blocks, document_slices, start_token_id
from limbeck.distill.models import loading
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_LOGITS = 2**26  # of a batch of the teacher


class TextSpan(NamedTuple):
    """A stretch of text that a block holds of one document.

    Attributes:
        text: without the bytes of a character that the block's edge cuts.
        skipped: bytes of the block's tokens before `text`.
        begins, ends: whether the document begins and ends here.
    """

    text: str
    skipped: int
    begins: bool
    ends: bool


class TokenizedSpan(NamedTuple):
    """A piece in a teacher's tokens, one that starts a text first and one that ends it last, where it has them.

    Attributes:
        ends: (n,) where they end, in bytes of the piece from 0, the end of a document one byte later; empty where
            the tokens do not stand for the text, since a normalizer changed it.
        spaced: whether a space was put before the text, as SentencePiece does; it counts no byte.
    """

    ids: np.ndarray
    ends: np.ndarray
    has_added_space: bool


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of text that each token id stands for; special tokens stand for none.

    Raises BadInput for a tokenizer whose tokens are no bytes of the text (WordPiece, say).
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    written = json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    texts = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    found: list[bytes] = [b""] * (texts[-1][1] + 1)
    of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for token, number in texts:
        if token in special:
            added = tokenizer.added_tokens_decoder.get(number)
            found[number] = b"" if added is None or added.special else token.encode()
        elif '"ByteLevel"' in written:
            found[number] = bytes(of_letter[letter] for letter in token)
        elif "\u2581" in json.dumps(state.get("decoder"), ensure_ascii=False):
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            found[number] = bytes([int(token[3:5], 16)]) if is_byte else token.replace("\u2581", " ").encode()
        else:
            raise BadInput(
                "a tokenizer's tokens are no bytes of the text: it is neither byte-level nor of SentencePiece's kind",
                fix="let the teacher write text instead ([generate]) and learn from that alone (labels = 1.0)",
            )
    return found


def document_spans(
    blocks: Blocks, number: int, tokenizer: PreTrainedTokenizerBase, bytes_of_token: Sequence[bytes]
) -> list[tuple[slice, np.ndarray, TextSpan]]:
    """Of each document in a block: its places, where its tokens end in bytes from 0, and its text.

    Args:
        tokenizer: of the blocks; it says which tokens begin and end a document.
        bytes_of_token: the bytes of each of its tokens.
    """
    ids, segments = blocks.ids[number], blocks.segments[number]
    start = start_token_id(tokenizer)
    found = []
    for places in document_slices(segments):
        own = ids[places]
        begins, ends = own[0] == start, len(own) > 1 and own[-1] == tokenizer.eos_token_id
        sizes = np.array([len(bytes_of_token[token]) for token in own])
        sizes[-1] += ends
        raw = b"".join(bytes_of_token[token] for token in own)
        skipped = next((place for place, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), 0)
        text = raw[skipped:].decode("utf-8", "ignore")
        found.append((places, np.cumsum(sizes), TextSpan(text, skipped, bool(begins), bool(ends))))
    return found


def tokenize_spans(
    spans: Sequence[TextSpan], tokenizer: PreTrainedTokenizerBase, bytes_of_token: Sequence[bytes]
) -> list[TokenizedSpan]:
    """Pieces in the tokens of `tokenizer`, of which `bytes_of_token` are the bytes."""
    start, end = start_token_id(tokenizer), tokenizer.eos_token_id
    encoded = tokenizer([piece.text for piece in spans], add_special_tokens=False)["input_ids"]
    found = []
    for piece, own in zip(spans, encoded, strict=True):
        closed = piece.ends and end is not None
        ids = ([] if start is None else [start]) + own + ([end] if closed else [])
        ends = np.cumsum([0, *(len(bytes_of_token[token]) for token in own)])
        written, text = b"".join(bytes_of_token[token] for token in own), piece.text.encode()
        spaced = written == b" " + text
        ends = np.maximum(ends - spaced, 0)
        ends = np.append(ends, ends[-1] + 1) if closed else ends
        ends = ends if start is not None else ends[1:]
        found.append(
            TokenizedSpan(np.array(ids, dtype=np.int64), ends if spaced or written == text else ends[:0], spaced)
        )
    return found


@torch.inference_mode()
def span_logits(
    model: PreTrainedModel, encoded: Sequence[TokenizedSpan], vocab_size: int, bf16: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """(number, logits (n, vocab_size)) of each piece of two tokens and more, in batches of like lengths.

    What exceeds the model's context is not read, and n is less then. A piece without `ends` is left out.

    Args:
        bf16: run under autocast.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = [piece.ids[:most] for piece in encoded]
    wanted = [number for number, piece in enumerate(encoded) if len(tokens[number]) > 1 and len(piece.ends)]
    order = sorted(wanted, key=lambda number: len(tokens[number]))
    for few in _batches(order, [len(own) * vocab_size for own in tokens]):
        ids = np.zeros((len(few), len(tokens[few[-1]])), dtype=np.int64)
        for row, number in enumerate(few):
            ids[row, : len(tokens[number])] = tokens[number]  # what follows it does not see
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = loading.logits_of(model, {"input_ids": torch.from_numpy(ids)})[..., :vocab_size]
        for row, number in enumerate(few):
            yield number, logits[row, : len(tokens[number])]


def _batches(order: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Numbers in batches of which the greatest size, times how many there are, stays below `MOST_LOGITS`."""
    few: list[int] = []
    for number in order:  # of rising size
        if few and sizes[number] * (len(few) + 1) > MOST_LOGITS:
            yield few
            few = []
        few.append(number)
    if few:
        yield few
