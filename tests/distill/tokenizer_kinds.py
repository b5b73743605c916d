"""Tokenizers of several kinds, and texts that they split differently."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, processors, trainers
from tokenizers import models as kinds
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.distill.data.blocks import train_tokenizer
from limbeck.distill.data.document import Document
from tests.conftest import TEXT
from tests.distill.conftest import lines_of_text

UNICODE = (
    "na\u00efve \u65e5\u672c\u8a9e\u306e\u6587 \U0001f9ea\U0001f469\u200d\U0001f52c\u2028e\u0301 \u00df\t\n  "
    "\u0928\u092e\u0938\u094d\u0924\u0947!\r\n"
)
TEXTS = [*TEXT, UNICODE, lines_of_text(12, 3), " leading and trailing  ", "x" * 30]


def sentencepiece_tokenizer() -> PreTrainedTokenizerBase:
    """As Llama 2's: spaces are letters, a space is put before a text, and unknown characters become bytes."""
    tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=[], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator([lines_of_text(100, 5), *TEXT], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    whole = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def trimming_tokenizer() -> PreTrainedTokenizerBase:
    """As GPT-2's: byte-level, offsets without spaces; its merges come from other text."""
    tokenizer = train_tokenizer([Document("", "".join(TEXT[2:] * 3) + lines_of_text(50, 8))], 420, 10_000)
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def make_tokenizers(tokenizer_folder: Path) -> dict[str, PreTrainedTokenizerBase]:
    """A tokenizer of each kind, by name."""
    return {
        "small": AutoTokenizer.from_pretrained(tokenizer_folder),
        "other merges": trimming_tokenizer(),
        "bytes": train_tokenizer([Document("", "a")], 257, 10_000),
        "sentencepiece": sentencepiece_tokenizer(),
    }
