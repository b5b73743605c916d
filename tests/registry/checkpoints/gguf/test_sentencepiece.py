"""llama.cpp's sentencepiece algorithm on a vocabulary small enough to follow by hand."""

from __future__ import annotations

from typing import Any

import pytest

from limbeck.registry.checkpoints.gguf.sentencepiece import sentencepiece_ids

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# The higher the score, the earlier the merge.
PIECES = {
    "\u2581": -9,
    "a": -9,
    "b": -9,
    "c": -9,
    "bc": -1,
    "ab": -2,
    "\u2581a": -3,
    "\u2581ab": -4,
    "\u2581\u2581": -5,
}
METADATA: dict[str, Any] = {
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *BYTES, *PIECES],
    "tokenizer.ggml.scores": [0.0] * 259 + [float(score) for score in PIECES.values()],
}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab", ["\u2581ab"]),
        ("abc", ["\u2581a", "bc"]),  # bc comes before ab
        ("aab", ["\u2581a", "ab"]),
        (" ab", ["\u2581", "\u2581ab"]),
        ("  b", ["\u2581\u2581", "\u2581", "b"]),  # the leftmost of equal pairs
        ("ad", ["\u2581a", "<0x64>"]),
        ("\u00e9", ["\u2581", "<0xC3>", "<0xA9>"]),
        ("", []),
    ],
)
def test_pieces(text: str, pieces: list[str]) -> None:
    tokens = METADATA["tokenizer.ggml.tokens"]
    assert [tokens[number] for number in sentencepiece_ids(METADATA, text)] == pieces


def test_no_space_is_added_if_the_file_says_so() -> None:
    metadata = METADATA | {"tokenizer.ggml.add_space_prefix": False}
    assert sentencepiece_ids(metadata, "ab") == [METADATA["tokenizer.ggml.tokens"].index("ab")]
