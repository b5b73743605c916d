"""Incremental detokenization: whole characters only, cut before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT_CHARACTER = "\ufffd"  # a decoder's output for bytes that are not valid UTF-8 (yet)
CONTEXT = 5  # preceding tokens to decode too, since some decoders treat the first token differently


class Detokenizer:
    """The text of one growing sequence. The strings that `add` and `finish` return join to `text`.

    Holds back a character until all tokens with its bytes are there, and text that may be the start of a stop string.

    Attributes:
        text: the text so far, held-back text included, cut before a stop string.
        stopped: whether `text` ended at a stop string.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self.text = ""
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)
        self._returned_length = 0  # characters of self.text returned so far
        self._window = list(prompt_ids[-CONTEXT:])  # the tokens decoded again with each new token
        self._known_length = len(
            decode(self._window)
        )  # characters of the decoded window that are already in the prompt or self.text

    def add(self, token_id: int) -> str:
        """Append a token; return the text that is final now (often "")."""
        self._window.append(token_id)
        decoded = self._decode(self._window)
        whole = decoded.rstrip(REPLACEMENT_CHARACTER)
        self._append(decoded[self._known_length : len(whole)])
        self._known_length = max(self._known_length, len(whole))
        if len(whole) == len(decoded) and len(self._window) > 2 * CONTEXT:
            self._window = self._window[-CONTEXT:]
            self._known_length = len(self._decode(self._window))
        return self._return_up_to(len(self.text) if self.stopped else self._certain_length())

    def finish(self) -> str:
        """Return the held-back rest, incomplete characters included; call it after the last token."""
        if not self.stopped:
            self._append(self._decode(self._window)[self._known_length :])
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
