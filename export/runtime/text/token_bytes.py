"""The bytes of each token: those that it adds to a text, before they are joined to characters."""

from __future__ import annotations

import re
from functools import cached_property

from tokenizers import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # a decoder's output for bytes that are not valid UTF-8 (yet)
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of byte fallback


def _bytes_of_characters() -> dict[str, int]:
    """The bytes that stand for themselves or for another character in byte-level vocabularies, as GPT-2 chose them."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(moved)}


_BYTE_LEVEL = _bytes_of_characters()


class TokenBytes:
    """The bytes of a tokenizer's tokens, by id. They join to the bytes of the text that the tokenizer decodes.

    It does not parse the tokenizer's decoder, but looks at what each token adds behind another one. Only the bytes of
    a part of a character do not show in a decoded text; they are in the token's name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """The bytes that a token adds to a text that has begun; those of a special token's name too."""
        if token not in self._known:
            ids, before = self._anchor
            text = self._tokenizer.decode([*ids, token], skip_special_tokens=False)
            self._known[token] = self._encode(token, text[len(before) :])
        return self._known[token]

    def at_start(self, token: int) -> bytes:
        """The bytes of the first token of a text: some tokenizers drop the space that it begins with."""
        return self._encode(token, self._tokenizer.decode([token], skip_special_tokens=False))

    def is_text(self, token: int, skip_special_tokens: bool = True) -> bool:
        """False for special tokens and for ids without a token, which are left out of a text."""
        if skip_special_tokens and token in self._special:
            return False
        return self._tokenizer.id_to_token(token) is not None

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(token for token, added in self._tokenizer.get_added_tokens_decoder().items() if added.special)

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token that is whole characters even behind another one, and its text."""
        for token in range(self._tokenizer.get_vocab_size()):
            if token not in self._special:
                once, twice = (self._tokenizer.decode([token] * count) for count in (1, 2))
                if once and len(twice) > len(once) and REPLACEMENT_CHARACTER not in twice:
                    return [token], once
        return [], ""

    def _encode(self, token: int, text: str) -> bytes:
        """The bytes of a token, given its decoded text."""
        if REPLACEMENT_CHARACTER not in text:
            return text.encode()
        name = self._tokenizer.id_to_token(token) or text
        if found := _BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(found[1])
        return bytes(map(_BYTE_LEVEL.__getitem__, name)) if _BYTE_LEVEL.keys() >= set(name) else text.encode()
