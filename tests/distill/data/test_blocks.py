"""Blocks of concatenated texts, the bytes they stand for, and training a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from limbeck.distill.data.blocks import make_blocks, train_tokenizer
from limbeck.distill.data.document import Document
from tests.distill.conftest import lines_of_text


def test_blocks_are_cut_from_the_concatenated_texts(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = [Document(str(n), lines_of_text(5, seed=n)) for n in range(150)]
    blocks = make_blocks(documents, tokenizer, 16)
    assert blocks.ids.dtype == np.int32
    assert blocks.ids.shape[1] == 16
    end = tokenizer.eos_token  # without BOS, EOS also starts a document
    whole = "".join(f"{end}{document.text}{end}" for document in documents)
    text = tokenizer.decode(blocks.ids.flatten())
    assert whole.startswith(text)
    # Exact except for the one cut document.
    size = len(text.replace(tokenizer.eos_token, "").encode())
    assert abs(blocks.text_bytes - size) < len(documents[0].text)
    assert abs(blocks.text_bytes - size) / size < 0.001

    fewer = make_blocks(documents, tokenizer, 16, max_tokens=330)
    assert (fewer.ids == blocks.ids[:20]).all()
    size = len(tokenizer.decode(fewer.ids.flatten()).replace(tokenizer.eos_token, "").encode())
    assert abs(fewer.text_bytes - size) < 10
    assert len({blocks.digest, fewer.digest, make_blocks(documents, tokenizer, 16).digest}) == 2


def test_the_digest_depends_on_the_block_length(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = [Document(str(n), lines_of_text(5, seed=n)) for n in range(10)]
    short, long = (make_blocks(documents, tokenizer, length, max_tokens=64) for length in (8, 16))
    assert (short.ids.flatten() == long.ids.flatten()).all()
    assert short.digest != long.digest


def test_training_a_tokenizer_is_deterministic_and_its_tokens_are_lossless() -> None:
    documents = [Document("a", lines_of_text(400))]
    tokenizer, again = (train_tokenizer(documents, 280, 64) for _ in range(2))
    assert len(tokenizer) == 280
    assert tokenizer.get_vocab() == again.get_vocab()
    odd = "caf\u00e9\u2003\t \U0001f600 don't  stop\r\n"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    assert tokenizer.eos_token_id == tokenizer.pad_token_id
