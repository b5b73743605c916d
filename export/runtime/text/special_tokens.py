"""Special tokens in texts from outside: they are text, so that nobody writes control tokens into a prompt.

`escape` puts a mark into each special token that a text spells out, and `encode` drops the marks after the tokenizer
has looked for special tokens. So a chat template renders escaped messages, and what it writes itself stays special.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

MARK = "\U0010fffe"  # a noncharacter, which no text may contain


class SpecialTokens:
    """Encodes texts in which some special tokens are escaped.

    Args:
        tokenizer: the artifact's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = [token for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._texts = [token.content for token in added if len(token.content) > 1]
        self._beginnings = {text[:size] for text in self._texts for size in range(1, len(text))}
        self._longest = max(map(len, self._texts), default=0)
        self._pattern = _pattern(self._texts)
        normalized = [self._normalize(token.content) for token in added if token.normalized and tokenizer.normalizer]
        self._normalized_pattern = _pattern(normalized) if normalized else None

    def escape(self, value: Any) -> Any:
        """Mark the special tokens in a text, or in all texts of a JSON value, whose texts a template may join."""
        if isinstance(value, str):
            return self._escape_text(value)
        if isinstance(value, list):
            return [self._escape_part(item) for item in value]
        if isinstance(value, dict):
            return {self._escape_part(key): self._escape_part(item) for key, item in value.items()}
        return value

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, whose escaped special tokens are text and whose others are tokens.

        A BOS token that the text brings is not doubled. Raises TypeError for invalid Unicode.
        """
        tokenizer = self._without_marks if MARK in text else self._tokenizer
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and len(ids) > 1 and ids[0] == ids[1]:
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            if plain[:1] == ids[:1] and len(plain) < len(ids):
                return ids[1:]
        return ids

    def _escape_part(self, value: Any) -> Any:
        """`escape`, and mark the beginning of a special token at a text's end: the next text might complete it."""
        escaped = self.escape(value)
        if not isinstance(value, str):
            return escaped
        end = escaped.rstrip()
        for start in range(len(end) - 1, max(-1, len(end) - self._longest), -1):
            if end[start:] in self._beginnings:
                return escaped[: start + 1] + MARK + escaped[start + 1 :]
        return escaped

    def _escape_text(self, text: str) -> str:
        if not self._texts:
            return text
        escaped = self._pattern.sub(rf"\g<1>{MARK}", text)
        if escaped == text and self._normalized_pattern and self._normalized_pattern.search(self._normalize(text)):
            return text[:1] + MARK + text[1:]  # `encode` takes the tokenizer that looks before it normalizes
        return escaped

    def _normalize(self, text: str) -> str:
        try:
            return str(self._tokenizer.normalizer.normalize_str(text))
        except UnicodeEncodeError:  # invalid Unicode, which `encode` refuses
            return ""

    @cached_property
    def _without_marks(self) -> Tokenizer:
        """The tokenizer, but its normalizer drops marks, after the tokenizer has looked for special tokens."""
        tokenizer = self._make_without_marks("")
        ids = tokenizer.encode(" ".join(map(self._escape_text, self._texts)), add_special_tokens=False).ids
        # The vocabulary of a unigram model may contain them as plain tokens: then a space keeps their parts apart.
        return (
            tokenizer if set(ids).isdisjoint(map(tokenizer.token_to_id, self._texts)) else self._make_without_marks(" ")
        )

    def _make_without_marks(self, instead: str) -> Tokenizer:
        config = json.loads(self._tokenizer.to_str())
        replace = {"type": "Replace", "pattern": {"String": MARK}, "content": instead}
        normalizers = [replace, *filter(None, [config["normalizer"]])]
        config["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
        for token in config["added_tokens"]:
            token["normalized"] = token["normalized"] and not token["special"]
        return Tokenizer.from_str(json.dumps(config))


def _pattern(texts: list[str]) -> re.Pattern[str]:
    """Matches the first character of each text; the lookahead finds overlapping ones too."""
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, texts))}))(.)", re.DOTALL)
