"""Incremental detokenization: the text of all tokens decoded at once, in whole characters, cut before stop strings."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from limbeck.export.runtime.text.detokenize import Detokenizer
from limbeck.export.runtime.text.token_bytes import REPLACEMENT_CHARACTER, TokenBytes
from tests.export.tokenizers_for_text import TOKENIZERS

BUILT = {name: make() for name, make in TOKENIZERS.items()}
BYTES = {name: TokenBytes(tokenizer) for name, tokenizer in BUILT.items()}
KINDS = st.sampled_from(list(TOKENIZERS))
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from(" cat\u00e9\u732b\U0001f600\ufffd"), max_size=20
)
ALL_KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


def streamed(kind: str, prompt: list[int], ids: list[int], *stop: str) -> tuple[str, list[str], Detokenizer]:
    """The text of `ids` behind `prompt`, its parts before `finish`, and the detokenizer."""
    detokenizer = Detokenizer(BYTES[kind], prompt, stop)
    parts = []
    for token in ids:
        parts.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    text = "".join(parts) + detokenizer.finish()
    assert text == detokenizer.text
    return text, parts, detokenizer


def decode(kind: str, ids: list[int]) -> str:
    return str(BUILT[kind].decode(ids, skip_special_tokens=True))


@given(KINDS, TEXTS, st.integers(0, 40))
@example("byte-fallback", "Say hi \U0001f600\U0001f600\U0001f600 ok", 8)
@example("byte-fallback", "cat \u0928\u092e\u0938\u094d\u0924\u0947", 2)
@example("byte-level", "\ufffd\ufffd", 3)
def test_a_stream_is_the_text_of_all_tokens_decoded_at_once(kind: str, text: str, cut: int) -> None:
    """Wherever the prompt ends: a character that begins in it belongs to the completion."""
    ids = BUILT[kind].encode(text).ids
    _, parts_of_prompt, _ = streamed(kind, [], ids[:cut])
    completion, parts, _ = streamed(kind, ids[:cut], ids[cut:])
    assert "".join(parts_of_prompt) + completion == decode(kind, ids)
    if REPLACEMENT_CHARACTER not in text:
        assert all(REPLACEMENT_CHARACTER not in part for part in parts)


@given(KINDS, st.lists(st.integers(0, 400), max_size=12), st.lists(st.integers(0, 400), max_size=12))
@example("byte-fallback", [], [*range(3 + 0xE6, 3 + 0xE8), 259, 3 + 0xE6])
def test_the_stream_of_any_tokens_is_their_bytes_as_utf_8(kind: str, prompt: list[int], new: list[int]) -> None:
    """Of invalid bytes too, of which byte fallback's decoder would make the whole run of byte tokens invalid."""
    _, parts, _ = streamed(kind, [], prompt)
    completion, _, _ = streamed(kind, prompt, new)
    plain = list(filter(BYTES[kind].is_text, prompt + new))
    expected = [BYTES[kind].at_start(token) if place == 0 else BYTES[kind][token] for place, token in enumerate(plain)]
    assert "".join(parts) + completion == b"".join(expected).decode("utf-8", "replace")
    if kind != "byte-fallback":
        assert "".join(parts) + completion == decode(kind, prompt + new)


@given(KINDS, TEXTS, st.integers(0, 10), st.lists(TEXTS.filter(bool), max_size=3), st.data())
def test_text_ends_before_a_stop_string_and_no_part_of_it_is_returned(
    kind: str, text: str, cut: int, stops: list[str], data: st.DataObject
) -> None:
    ids = BUILT[kind].encode(text).ids
    whole, _, _ = streamed(kind, ids[:cut], ids[cut:])
    if whole:  # a stop string that occurs, across tokens too
        start = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[start : data.draw(st.integers(start + 1, len(whole)))])
    completion, _, detokenizer = streamed(kind, ids[:cut], ids[cut:], *stops)
    # Generation ends with the token that completes a stop string.
    ends = [end for end in range(len(whole) + 1) if any(stop in whole[:end] for stop in stops)]
    assert detokenizer.stopped == bool(ends)
    if not ends:
        assert completion == whole
    else:
        assert len(completion) <= ends[0]
        assert whole.startswith(completion + next(stop for stop in stops if whole.startswith(stop, len(completion))))
        assert not any(stop in completion for stop in stops)


@ALL_KINDS
def test_special_tokens_are_left_out_also_inside_a_character(kind: str) -> None:
    end = BUILT[kind].token_to_id("</s>")
    ids = list(filter(BYTES[kind].is_text, BUILT[kind].encode("the \u732b cat").ids))
    with_special = [token for pair in zip(ids, [end] * len(ids), strict=True) for token in pair]
    assert streamed(kind, [], with_special)[0] == decode(kind, ids) == decode(kind, with_special)
    detokenizer = Detokenizer(BYTES[kind], [], skip_special_tokens=False)
    kept = "".join(map(detokenizer.add, [*ids, end])) + detokenizer.finish()
    assert kept == decode(kind, ids) + "</s>"


@ALL_KINDS
def test_tokens_have_the_bytes_of_their_texts(kind: str) -> None:
    """Byte tokens too, and the space that a token begins with, except at the start of a text."""
    tokenizer, table = BUILT[kind], BYTES[kind]
    text = "the cat \u732b"
    ids = list(filter(table.is_text, tokenizer.encode(text).ids))
    assert b"".join(map(table.__getitem__, ids)).strip() == text.encode()
    assert table.at_start(ids[0]) + b"".join(map(table.__getitem__, ids[1:])) == decode(kind, ids).encode()


def test_the_earliest_of_several_stop_strings_ends_the_text() -> None:
    ids = BUILT["byte-level"].encode("abcdef").ids
    assert len(ids) == 6
    detokenizer = Detokenizer(BYTES["byte-level"], [], ["def", "cd"])
    assert [detokenizer.add(token) for token in ids[:3]] == ["a", "b", ""]
    assert detokenizer.add(ids[3]) + detokenizer.finish() == ""
    assert (detokenizer.text, detokenizer.stopped) == ("ab", True)


def test_the_start_of_a_stop_string_is_returned_by_finish() -> None:
    text, parts, _ = streamed("byte-level", [], BUILT["byte-level"].encode("so return x  # N").ids, "return x  # No")
    assert "".join(parts) == "so "
    assert text == "so return x  # N"
