"""Blocks: documents as token ids in blocks of a fixed length; and training a tokenizer."""

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

END_OF_TEXT = "<|endoftext|>"


class Blocks(NamedTuple):
    """N blocks of T token ids. Short documents share a block.

    Attributes:
        ids: (N, T) int32.
        segments: (N, T) uint16: the document of its block that a token belongs to, counted from 1; 0 is padding.
        targets: (N, T) bool: whether a token is predicted from those before it in its segment.
        text_tokens: tokens of text: not padding, nor the start token of a document. For prompts with completions and
            for conversations, the tokens of the answers alone.
        text_bytes: UTF-8 bytes of those tokens.
        digest: of ids, segments and targets.
        too_long: documents that do not fit in a block, and were dropped.
    """

    ids: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    text_tokens: int
    text_bytes: int
    digest: str
    too_long: int = 0

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The blocks at `indices` (n,) as inputs of a model.

        Returns:
            `input_ids` (n, T) int64; `labels` (n, T) int64, not shifted, -100 for tokens that are not targets; and,
            if a block has several documents, `position_ids` (n, T) int64, which restart at 0 with each document.
            From them transformers builds an attention mask that separates the documents.
        """
        import torch

        ids, segments = self.ids[indices].astype(np.int64), self.segments[indices]
        batch = {"input_ids": ids, "labels": np.where(self.targets[indices], ids, -100)}
        if segments.max(initial=0) > 1:
            batch["position_ids"] = position_ids(segments)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def position_ids(segments: np.ndarray) -> np.ndarray:
    """The position of each token in its segment, from 0: (n, T) -> (n, T) int64."""
    columns = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.ones(segments.shape, dtype=bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)


def document_slices(segments: np.ndarray) -> list[slice]:
    """The slice of each document in a block, given the block's segments (T,); without padding."""
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    return [slice(start, end) for start, end in pairwise(edges) if segments[start] != 0]


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token before a text, as in lm-eval: BOS, or EOS if the tokenizer has no BOS."""
    start: int | None = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return start


def train_tokenizer(documents: Iterable[Document], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of `vocab_size` tokens, with one special token that ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
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
    """Lay documents out in blocks.

    Plain texts are concatenated, each between the start token and EOS, and cut into blocks. A text that does not fit
    continues in the next block, without its earlier tokens as context. The last partial block is dropped.

    Prompts with completions and conversations stay whole. Several share a block if they fit; those longer than a block
    are dropped.

    Args:
        documents: all of one kind; the first one decides which.
        max_length: tokens per block.
        max_tokens: stop after this many tokens.
        one_document_per_block: for a model that would attend to other documents in its block (see `packing`).

    Raises:
        BadInput: a tokenizer without EOS, too little text, no document that fits, or one without an answer.
    """
    start, end = start_token_id(tokenizer), tokenizer.eos_token_id
    if start is None or end is None:
        raise BadInput("the tokenizer has no EOS token", fix="give it one: it separates the documents")
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
    encoded = _encode_texts(documents, tokenizer, start, end)
    if one_document_per_block:
        parts = (part for text in encoded for part in _cut(text, max_length))
        return _pack_blocks(parts, max_length, max_tokens, end, one_document_per_block)
    return _concatenate_blocks(encoded, max_length, max_tokens)


def _encode_texts(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, start: int, end: int
) -> Iterator[EncodedDocument]:
    for texts in _text_batches(document.text for document in documents):
        tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for text, text_ids in zip(texts, tokens, strict=True):
            ids = np.asarray([start, *text_ids, end], dtype=np.int32)
            yield EncodedDocument(ids, np.arange(len(ids)) > 0, len(text.encode()))


def _text_batches(texts: Iterable[str], characters: int = 2**19) -> Iterator[list[str]]:
    """Texts in lists of about this many characters. The tokenizer's output takes a hundred times as much memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cut(text: EncodedDocument, max_length: int) -> Iterator[EncodedDocument]:
    """A text in parts of at most `max_length` tokens. Drops a last part of one token, which has no target."""
    count = len(text.ids)
    for begin in range(0, count - 1, max_length):
        part = slice(begin, begin + max_length)
        text_bytes = round(text.text_bytes * len(text.ids[part]) / count)
        yield EncodedDocument(text.ids[part], text.targets[part], text_bytes)


def _concatenate_blocks(texts: Iterator[EncodedDocument], max_length: int, max_tokens: int | None) -> Blocks:
    """Blocks cut from the concatenated texts."""
    ids_of: list[np.ndarray] = []
    sizes: list[int] = []
    count = 0
    for text in texts:
        ids_of.append(text.ids)
        sizes.append(text.text_bytes)
        count += len(text.ids)
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
    targets = np.zeros(ids.shape, dtype=bool)  # the first token of a segment has no context
    targets[:, 1:] = segments[:, 1:] == segments[:, :-1]
    started_documents = int((np.cumsum(lengths) - lengths < used).sum())
    size = _bytes_within(used, lengths, sizes)
    return Blocks(ids, segments, targets, used - started_documents, size, layout_digest(ids, segments, targets))


def _pack_blocks(
    documents: Iterator[EncodedDocument],
    max_length: int,
    max_tokens: int | None,
    padding: int,
    one_document_per_block: bool,
) -> Blocks:
    """Blocks of whole documents; `padding` is the id that fills them up."""
    fitting: list[EncodedDocument] = []
    count = too_long = shortest = 0
    for document in documents:
        length = len(document.ids)
        if length > max_length:
            too_long += 1
            shortest = min(shortest or length, length)
            continue
        count += length
        if max_tokens and count > max_tokens:
            break
        fitting.append(document)
    if not fitting:
        problem = f"data.max_tokens {max_tokens} is less than the first document has"
        if too_long:
            problem = f"all {too_long} documents are longer than {max_length} tokens: the shortest has {shortest}"
        raise BadInput(
            problem, fix="a prompt with its answer stays whole: give a greater data.max_length or data.max_tokens"
        )
    layout = first_fit([len(document.ids) for document in fitting], max_length)
    if one_document_per_block:
        layout = [[number] for number in range(len(fitting))]
    shape = (len(layout), max_length)
    ids, segments = np.full(shape, padding, dtype=np.int32), np.zeros(shape, dtype=np.uint16)
    targets = np.zeros(shape, dtype=bool)
    for row, numbers in enumerate(layout):
        start = 0
        for segment, document in enumerate((fitting[number] for number in numbers), 1):
            part = slice(start, start + len(document.ids))
            ids[row, part], segments[row, part], targets[row, part] = document.ids, segment, document.targets
            targets[row, start] = False  # the first token of a segment has no context
            start = part.stop
    tokens = sum(int(document.targets.sum()) for document in fitting)
    text_bytes = sum(document.text_bytes for document in fitting)
    return Blocks(ids, segments, targets, tokens, text_bytes, layout_digest(ids, segments, targets), too_long)


def empty_blocks(max_length: int) -> Blocks:
    """No blocks, before the text is written."""
    nothing = np.zeros((0, max_length))
    return Blocks(nothing.astype(np.int32), nothing.astype(np.uint16), nothing.astype(bool), 0, 0, "")


def layout_digest(ids: np.ndarray, segments: np.ndarray, targets: np.ndarray) -> str:
    """The digest of the tokens and their layout in blocks."""
    digest = hashlib.sha256(f"{ids.shape[1]}\n".encode())
    for array in (ids, segments, targets):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _bytes_within(used: int, lengths: np.ndarray, sizes: list[int]) -> int:
    """Bytes of text in the first `used` tokens. A cut document counts in proportion to its tokens."""
    ends = np.cumsum(lengths)
    whole = int(np.searchsorted(ends, used, side="right"))
    total = sum(sizes[:whole])
    if whole < len(lengths):
        inside = used - (int(ends[whole - 1]) if whole else 0)
        total += round(sizes[whole] * inside / lengths[whole])
    return total
