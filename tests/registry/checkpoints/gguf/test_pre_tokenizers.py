"""The pieces that each name of a pre-tokenizer splits a text into, as its original does."""

from __future__ import annotations

import pytest
from tokenizers import decoders

from limbeck.registry.checkpoints.gguf.pre_tokenizers import RULES, pre_tokenizer_of_rules

TEXT = "DON'T  pay 12345\u00e9x\n\n HelloWorld.com ..."
DIGITS_APART = [
    "DON",
    "'",
    "T",
    " ",
    " pay",
    " ",
    "1",
    "2",
    "3",
    "4",
    "5",
    "\u00e9x",
    "\n\n",
    " HelloWorld",
    ".",
    "com",
]
LLAMA3 = ["DON", "'T", " ", " pay", " ", "123", "45", "\u00e9x", "\n\n", " HelloWorld", ".com", " ..."]
QWEN2 = ["DON", "'T", " ", " pay", " ", "1", "2", "3", "4", "5", "\u00e9x", "\n\n", " HelloWorld", ".com", " ..."]
PIECES = {
    ("smollm", "starcoder", "refact", "command-r"): [*DIGITS_APART, " ..."],
    ("gpt-2", "olmo"): ["DON", "'", "T", " ", " pay", " 12345", "\u00e9x", "\n\n", " HelloWorld", ".", "com", " ..."],
    ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "lfm2"): LLAMA3,
    ("qwen2", "qwen35", "deepseek-r1-qwen"): QWEN2,
    ("tekken",): [
        "DON", "'T", " ", " pay", " ", "1", "2", "3", "4", "5", "\u00e9x", "\n\n", " Hello", "World", ".com", " ...",
    ],
    ("gpt-4o", "llama4"): [
        "DON'T", " ", " pay", " ", "123", "45", "\u00e9x", "\n\n", " Hello", "World", ".com", " ...",
    ],
    ("falcon",): [
        "DON", "'", "T", " ", " pay", " ", "123", "45", "\u00e9x", "\n\n", " HelloWorld", ".", "com", " ", "...",
    ],
    ("deepseek-llm",): [  # its range of punctuation, ":-~", has the letters
        "DON", "'", "T", " ", " pay", " ", "1", "2", "3", "4", "5", "\u00e9", "x", "\n", "\n", " HelloWorld", ".",
        "com", " ...",
    ],
    ("deepseek-coder",): [
        "DON", "'", "T", " ", " pay", " ", "1", "2", "3", "4", "5", "\u00e9x", "\n", "\n", " HelloWorld", ".", "com",
        " ...",
    ],
    ("deepseek-v3",): [
        "DON", "'T", " ", " pay", " ", "123", "45", "\u00e9x", "\n\n", " HelloWorld", ".com", " ...",
    ],
}  # fmt: skip


@pytest.mark.parametrize("names", PIECES, ids=lambda names: names[0])
def test_pieces(names: tuple[str, ...]) -> None:
    for name in names:
        pieces = pre_tokenizer_of_rules(RULES[name]).pre_tokenize_str(TEXT)
        assert [decoders.ByteLevel().decode([piece]) for piece, _ in pieces] == PIECES[names], name


def test_every_name_is_tried() -> None:
    assert {name for names in PIECES for name in names} == set(RULES)


def test_scripts_without_spaces() -> None:
    """DeepSeek's rules list them by code points, which an editor may normalize."""
    rules = {name: pre_tokenizer_of_rules(RULES[name]) for name in ("deepseek-llm", "deepseek-v3")}
    text = "\u4f60\u597d\u3001K\u212b\u1f71x\uff01"  # Han, a wide comma, the Angstrom sign, a Greek accent, wide "!"
    found = {name: [end for _, (_, end) in rule.pre_tokenize_str(text)] for name, rule in rules.items()}
    assert found == {"deepseek-llm": [2, 3, 4, 6, 7, 8], "deepseek-v3": [2, 3, 7, 8]}
