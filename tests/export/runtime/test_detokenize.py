"""Incremental detokenization: whole characters, cut before stop strings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from limbeck.export.runtime.detokenize import REPLACEMENT_CHARACTER, Detokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


TEXT = "naïve café: 猫が寝ている 🐱👩‍👩‍👧 def f(x):\n\treturn x  # Ünïcödé " * 3


def test_characters_of_several_tokens_are_returned_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) > len(TEXT)  # many characters have two tokens or more
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.encode("# ").ids)
    pieces = [detokenizer.add(token) for token in ids]
    assert all(REPLACEMENT_CHARACTER not in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == TEXT == detokenizer.text


def test_the_returned_texts_of_any_tokens_join_to_their_text(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for _ in range(50):
        prompt = [draw.randrange(1, 300) for _ in range(draw.randrange(1, 8))]
        # The prompt ends in a letter, since a character split between prompt and completion belongs to neither.
        prompt += tokenizer.encode("a").ids
        ids = [draw.randrange(1, 300) for _ in range(60)]
        detokenizer = Detokenizer(tokenizer.decode, prompt)
        text = "".join(detokenizer.add(token) for token in ids) + detokenizer.finish()
        assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + ids)


@pytest.mark.parametrize("stop", ["return", "\n\t", "猫が", "🐱", "x):", "café: 猫"])
def test_text_ends_before_a_stop_string_and_no_part_of_it_is_returned(tokenizer: Tokenizer, stop: str) -> None:
    detokenizer = Detokenizer(tokenizer.decode, [], ["never this", stop])
    returned = ""
    for token in tokenizer.encode(TEXT).ids:
        returned += detokenizer.add(token)
        assert TEXT[: TEXT.index(stop)].startswith(returned)
        if detokenizer.stopped:
            break
    assert detokenizer.stopped
    assert returned + detokenizer.finish() == TEXT[: TEXT.index(stop)]


def test_the_earliest_of_several_stop_strings_ends_the_text() -> None:
    detokenizer = Detokenizer(lambda ids: "".join("abcdef"[i] for i in ids), [], ["def", "cd"])
    assert [detokenizer.add(token) for token in range(3)] == ["a", "b", ""]
    assert detokenizer.add(3) + detokenizer.finish() == ""
    assert (detokenizer.text, detokenizer.stopped) == ("ab", True)


def test_the_start_of_a_stop_string_is_returned_by_finish(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer.decode, [], ["return x  # No"])
    ids = tokenizer.encode("so return x  # N").ids
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == "so "
    assert detokenizer.finish() == "return x  # N"
