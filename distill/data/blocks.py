"""Text to tokens: a tokenizer trained on the corpus where asked, and fixed-length blocks of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from limbeck.distill.data.chat import EncodedDocument, encode_document
from limbeck.distill.data.document import Document
from limbeck.distill.data.packing import first_fit
from limbeck.registry.core.errors import BadInput

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
        text_tokens: tokens that stand for text: all but padding and the tokens that start a document; of prompts
            with completions and conversations those of the answers alone.
        text_bytes: bytes of UTF-8 that those stand for.
        left_out: documents that do not fit into a block.
    """

    ids: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    text_tokens: int
    text_bytes: int
    digest: str
    too_long: int = 0

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
        if segments.max(initial=0) > 1:
            batch["position_ids"] = position_ids(segments)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def position_ids(segments: np.ndarray) -> np.ndarray:
    """Of each token its place in its segment: (n, T) -> (n, T) int64, from 0."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.ones(segments.shape, dtype=bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)


def document_slices(segments: np.ndarray) -> list[slice]:
    """Where each document of a block lies, from the numbers (T,) of its segments; padding left out."""
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    return [slice(start, end) for start, end in pairwise(edges) if segments[start] != 0]


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token before a text: BOS, or EOS where there is none, as lm-eval gives it to a model."""
    start: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return start


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
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_tokens: int | None = None,
    one_document_per_block: bool = False,
) -> Blocks:
    """Documents laid out in blocks.

    Texts, each between a start token and EOS, are laid end to end and cut; one that does not end in a block goes on
    in the next without what came before, and the last partial block is dropped. Prompts with completions and
    conversations stay whole: several share a block where they fit, and those that are too long are left out. The
    start token is BOS, or EOS where the tokenizer has none: what lm-eval gives a model before a text.

    Args:
        documents: the first says which of these they are.
        max_length: tokens a block.
        max_tokens: use only so many, of the first documents.
        one_document_per_block: one document a block, for a model that would see its neighbours (`packing`).

    Raises:
        BadInput: a tokenizer without EOS, too little text, no document that fits, or one without an answer.
    """
    start, end = start_token_id(tokenizer), tokenizer.eos_token_id
    if start is None or end is None:
        raise BadInput("the tokenizer has no EOS token", fix="give it one: documents are told apart by it")
    documents = iter(documents)
    first = next(documents, None)
    if first is None:
        raise BadInput("there is no document", fix="give more text")
    documents = chain([first], documents)
    if first.prompt or first.messages:
        return _pack_blocks(
            (encode_document(each, tokenizer, start, end) for each in documents),
            max_length,
            max_tokens,
            end,
            one_document_per_block,
        )
    pieces = _texts(documents, tokenizer, start, end)
    if one_document_per_block:
        cuts = (cut for piece in pieces for cut in _cut(piece, max_length))
        return _pack_blocks(cuts, max_length, max_tokens, end, one_document_per_block)
    return _concatenate_blocks(pieces, max_length, max_tokens)


def _texts(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, start: int, end: int
) -> Iterator[EncodedDocument]:
    for texts in _text_batches(document.text for document in documents):
        tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for text, piece in zip(texts, tokens, strict=True):
            ids = np.asarray([start, *piece, end], dtype=np.int32)
            yield EncodedDocument(ids, np.arange(len(ids)) > 0, len(text.encode()))


def _text_batches(texts: Iterable[str], characters: int = 2**19) -> Iterator[list[str]]:
    """Texts in lists of about so many characters: what a tokenizer makes of them takes a hundred times as much."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= characters:
            yield some
            some, size = [], 0
    if some:
        yield some


def _cut(piece: EncodedDocument, max_length: int) -> Iterator[EncodedDocument]:
    """A text in parts of `max_length`; a last token alone is left out, nothing would be predicted from it."""
    count = len(piece.ids)
    for begin in range(0, count - 1, max_length):
        part = slice(begin, begin + max_length)
        size = round(piece.text_bytes * len(piece.ids[part]) / count)
        yield EncodedDocument(piece.ids[part], piece.targets[part], size)


def _concatenate_blocks(pieces: Iterator[EncodedDocument], max_length: int, max_tokens: int | None) -> Blocks:
    ids_of: list[np.ndarray] = []
    sizes: list[int] = []
    count = 0
    for piece in pieces:
        ids_of.append(piece.ids)
        sizes.append(piece.text_bytes)
        count += len(piece.ids)
        if max_tokens and count >= max_tokens:
            break
    used = min(count, max_tokens or count) // max_length * max_length
    if used == 0:
        raise BadInput(
            f"{count} tokens of text do not fill one block of {max_length}",
            fix="give more text or a smaller data.max_length",
        )
    lengths = np.array([len(ids) for ids in ids_of])
    ids = np.concatenate(ids_of)[:used].reshape(-1, max_length)
    ids_of.clear()
    numbers = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[:used].reshape(-1, max_length)
    numbers -= numbers[:, :1] - 1
    segments = numbers.astype(np.uint16)
    targets = np.zeros(ids.shape, dtype=bool)  # the first of a segment follows nothing
    targets[:, 1:] = segments[:, 1:] == segments[:, :-1]
    begun = int((np.cumsum(lengths) - lengths < used).sum())
    size = _bytes_within(used, lengths, sizes)
    return Blocks(ids, segments, targets, used - begun, size, layout_digest(ids, segments, targets))


def _pack_blocks(
    pieces: Iterator[EncodedDocument],
    max_length: int,
    max_tokens: int | None,
    padding: int,
    one_document_per_block: bool,
) -> Blocks:
    kept: list[EncodedDocument] = []
    count = left_out = shortest = 0
    for piece in pieces:
        length = len(piece.ids)
        if length > max_length:
            left_out += 1
            shortest = min(shortest or length, length)
            continue
        count += length
        if max_tokens and count > max_tokens:
            break
        kept.append(piece)
    if not kept:
        raise BadInput(
            f"all {left_out} documents are longer than {max_length} tokens: the shortest has {shortest}"
            if left_out
            else f"data.max_tokens {max_tokens} is less than the first document has",
            fix="a prompt with its answer stays whole: give a greater data.max_length or data.max_tokens",
        )
    places = first_fit([len(piece.ids) for piece in kept], max_length)
    if one_document_per_block:
        places = [[number] for number in range(len(kept))]
    shape = (len(places), max_length)
    ids, segments = np.full(shape, padding, dtype=np.int32), np.zeros(shape, dtype=np.uint16)
    targets = np.zeros(shape, dtype=bool)
    for row, numbers in enumerate(places):
        at = 0
        for segment, piece in enumerate((kept[number] for number in numbers), 1):
            part = slice(at, at + len(piece.ids))
            ids[row, part], segments[row, part], targets[row, part] = piece.ids, segment, piece.targets
            targets[row, at] = False  # the first of a segment follows nothing
            at = part.stop
    tokens, size = sum(int(piece.targets.sum()) for piece in kept), sum(piece.text_bytes for piece in kept)
    return Blocks(ids, segments, targets, tokens, size, layout_digest(ids, segments, targets), left_out)


def empty_blocks(max_length: int) -> Blocks:
    """Of a text that is not written yet."""
    nothing = np.zeros((0, max_length))
    return Blocks(nothing.astype(np.int32), nothing.astype(np.uint16), nothing.astype(bool), 0, 0, "")


def layout_digest(ids: np.ndarray, segments: np.ndarray, targets: np.ndarray) -> str:
    """What identifies blocks: their tokens and how they are laid out."""
    digest = hashlib.sha256(f"{ids.shape[1]}\n".encode())
    for array in (ids, segments, targets):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _bytes_within(used: int, lengths: np.ndarray, sizes: list[int]) -> int:
    """Bytes of text in the first `used` tokens; the bytes of a document that is cut are shared out by its tokens."""
    ends = np.cumsum(lengths)
    whole = int(np.searchsorted(ends, used, side="right"))
    total = sum(sizes[:whole])
    if whole < len(lengths):
        inside = used - (int(ends[whole - 1]) if whole else 0)
        total += round(sizes[whole] * inside / lengths[whole])
    return total
