"""The bytes of text that a tokenizer's tokens stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.distill.models import alignment
from limbeck.registry.core.errors import BadInput
from tests.distill.tokenizer_kinds import TEXTS, make_tokenizers


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    return make_tokenizers(tokenizer_folder)


@pytest.mark.parametrize("name", ["small", "other merges", "bytes", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_make_the_text(tokenizers: dict[str, Any], name: str, text: str) -> None:
    texts = alignment.token_bytes(tokenizers[name])
    ids = tokenizers[name](text, add_special_tokens=False)["input_ids"]
    before = b" " if name == "sentencepiece" else b""
    assert b"".join(texts[token] for token in ids) == before + text.encode()
    assert texts[tokenizers[name].eos_token_id] == b""


def test_a_wordpiece_tokenizer_is_bad_input() -> None:
    backend = Tokenizer(kinds.WordPiece({"[UNK]": 0, "word": 1, "##s": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(BadInput, match="not bytes of the text"):
        alignment.token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
