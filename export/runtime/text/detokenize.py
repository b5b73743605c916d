"""Incremental detokenization: whole characters only, cut before a stop string.

The bytes of the tokens go through an incremental UTF-8 decoder. tokenizers' `DecodeStream` (0.23) does the same for
valid text only: it raises if a byte token follows that makes a run of them invalid, holds back all text that ends with
U+FFFD, and returns the whole prompt again if that ends inside a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import partial
from itertools import islice

from limbeck.export.runtime.text.token_bytes import TokenBytes

MAX_PENDING = 3  # bytes of an incomplete character


class Detokenizer:
    """The text of one growing sequence. The strings that `add` and `finish` return join to `text`.

    Holds back a character until all tokens with its bytes are there, and text that may be the start of a stop string.
    A character that begins in the prompt belongs to the text. Unknown ids are left out, and by default special tokens.

    Attributes:
        text: the text so far, held-back text included, cut before a stop string.
        stopped: whether `text` ended at a stop string.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self.stopped = False
        self._token_bytes = token_bytes
        self._is_text = partial(token_bytes.is_text, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._returned_length = 0  # characters of self.text returned so far
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        end = list(islice(filter(self._is_text, reversed(prompt_ids)), MAX_PENDING + 1))[::-1]
        self._at_start = not end
        for token in end:  # the decoder keeps the bytes of a character that the prompt ends in
            self._decoder.decode(token_bytes[token])

    def add(self, token_id: int) -> str:
        """Append a token; return the text that is final now (often "")."""
        if self._is_text(token_id):
            new = self._token_bytes.at_start(token_id) if self._at_start else self._token_bytes[token_id]
            self._at_start = False
            self._append(self._decoder.decode(new))
        return self._return_up_to(len(self.text) if self.stopped else self._certain_length())

    def finish(self) -> str:
        """Return the held-back rest, incomplete characters included; call it after the last token."""
        if not self.stopped:
            self._append(self._decoder.decode(b"", final=True))
        return self._return_up_to(len(self.text))

    def _append(self, new: str) -> None:
        """Append to `text`, and cut it before the first stop string."""
        self.text += new
        found = [self.text.find(stop, self._returned_length) for stop in self._stop] if new else []
        found = [position for position in found if position >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _certain_length(self) -> int:
        """Length of `text` without a tail that could be the start of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for start in range(max(self._returned_length, len(self.text) - longest), len(self.text)):
            if any(stop.startswith(self.text[start:]) for stop in self._stop):
                return start
        return len(self.text)

    def _return_up_to(self, end: int) -> str:
        piece = self.text[self._returned_length : end]
        self._returned_length = max(self._returned_length, end)
        return piece
