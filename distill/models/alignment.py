"""Token alignment: the text of each document in a block, and the same text in the tokens of another tokenizer.

Tokens of two tokenizers are compared by the byte of the text where they end.
"""

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

MAX_LOGITS = 2**26  # in one batch of the teacher


class TextSpan(NamedTuple):
    """The text of one document that is in a block.

    Attributes:
        text: without a character that the edge of the block cuts.
        skipped: bytes before `text`, of such a character.
        begins: whether the document begins here.
        ends: whether the document ends here.
    """

    text: str
    skipped: int
    begins: bool
    ends: bool


class TokenizedSpan(NamedTuple):
    """A span in the tokens of a teacher, between its start and end tokens if it has them.

    Attributes:
        ids: (n,) int64.
        ends: (n,) the byte of the text where each token ends; the end of a document counts one byte. Empty if the
            tokens do not spell the text, because a normalizer changed it.
        has_added_space: whether the tokenizer put a space before the text, as SentencePiece does; it counts no byte.
    """

    ids: np.ndarray
    ends: np.ndarray
    has_added_space: bool


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes of text that each token id stands for; none for special tokens.

    Raises BadInput for a tokenizer whose tokens are not bytes of the text, such as WordPiece.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    byte_level = '"ByteLevel"' in json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
    sentencepiece = "\u2581" in json.dumps(state.get("decoder"), ensure_ascii=False)
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    found: list[bytes] = [b""] * (vocabulary[-1][1] + 1)
    byte_of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for token, number in vocabulary:
        if token in special:
            added = tokenizer.added_tokens_decoder.get(number)
            found[number] = b"" if added is None or added.special else token.encode()
        elif byte_level:
            found[number] = bytes(byte_of_letter[letter] for letter in token)
        elif sentencepiece:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            found[number] = bytes([int(token[3:5], 16)]) if is_byte else token.replace("\u2581", " ").encode()
        else:
            raise BadInput(
                "a tokenizer's tokens are not bytes of the text: it is neither byte-level nor SentencePiece",
                fix="let the teacher write text ([generate]) and learn from that text alone (labels = 1.0)",
            )
    return found


def document_spans(
    blocks: Blocks, number: int, tokenizer: PreTrainedTokenizerBase, bytes_of_token: Sequence[bytes]
) -> list[tuple[slice, np.ndarray, TextSpan]]:
    """For each document in a block: its slice, the byte where each of its tokens ends, and its text.

    Args:
        number: of the block.
        tokenizer: of the blocks; has the tokens that begin and end a document.
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
    """Spans in the tokens of `tokenizer`; `bytes_of_token` are the bytes of its tokens."""
    start, end = start_token_id(tokenizer), tokenizer.eos_token_id
    encoded = tokenizer([span.text for span in spans], add_special_tokens=False)["input_ids"]
    found = []
    for span, own in zip(spans, encoded, strict=True):
        has_end = span.ends and end is not None
        ids = ([] if start is None else [start]) + own + ([end] if has_end else [])
        ends = np.cumsum([0, *(len(bytes_of_token[token]) for token in own)])
        spelt, text = b"".join(bytes_of_token[token] for token in own), span.text.encode()
        has_added_space = spelt == b" " + text
        ends = np.maximum(ends - has_added_space, 0)
        if has_end:
            ends = np.append(ends, ends[-1] + 1)
        if start is None:
            ends = ends[1:]
        if not has_added_space and spelt != text:
            ends = ends[:0]
        found.append(TokenizedSpan(np.array(ids, dtype=np.int64), ends, has_added_space))
    return found


@torch.inference_mode()
def span_logits(
    model: PreTrainedModel, encoded: Sequence[TokenizedSpan], vocab_size: int, bf16: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """(number, logits (n, vocab_size)) of each span of at least two tokens, in batches of similar length.

    Reads no more of a span than fits in the model's context: then n is less. Skips spans without `ends`.

    Args:
        encoded: the spans; `number` is an index into them.
        bf16: run under autocast.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = [span.ids[:context] for span in encoded]
    usable = [number for number, span in enumerate(encoded) if len(tokens[number]) > 1 and len(span.ends)]
    order = sorted(usable, key=lambda number: len(tokens[number]))
    for batch in _batches(order, [len(own) * vocab_size for own in tokens]):
        ids = np.zeros((len(batch), len(tokens[batch[-1]])), dtype=np.int64)
        for row, number in enumerate(batch):
            ids[row, : len(tokens[number])] = tokens[number]  # causal: the padding after it changes nothing
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = loading.logits_of(model, {"input_ids": torch.from_numpy(ids)})[..., :vocab_size]
        for row, number in enumerate(batch):
            yield number, logits[row, : len(tokens[number])]


def _batches(order: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Batches of numbers, ordered by size, in which largest size x count is at most `MAX_LOGITS`."""
    batch: list[int] = []
    for number in order:
        if batch and sizes[number] * (len(batch) + 1) > MAX_LOGITS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
