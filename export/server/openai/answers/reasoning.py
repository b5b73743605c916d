"""Split the text of an answer into reasoning and answer, for models that think between <think> and </think>."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from limbeck.export.server.openai.answers.tool_calls import held_back

OPEN, CLOSE = "<think>", "</think>"


class Thinking(Enum):
    """Whether an answer begins with reasoning."""

    NEVER = "never"  # the model does not think, or was asked not to
    POSSIBLE = "possible"  # the model opens its reasoning itself
    OPENED = "opened"  # the prompt ends with <think>


def thinking_of_prompt(source: str, prompt: str, is_continued: bool) -> Thinking:
    """Whether the answer to a rendered prompt begins with reasoning.

    Args:
        source: of the chat template.
        prompt: rendered.
        is_continued: the prompt ends within an answer.
    """
    if CLOSE not in source and OPEN not in source:
        return Thinking.NEVER
    if is_continued:
        return Thinking.OPENED if prompt.rfind(OPEN) > prompt.rfind(CLOSE) else Thinking.NEVER
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return Thinking.OPENED
    return Thinking.NEVER if end.endswith(CLOSE) else Thinking.POSSIBLE


class ReasoningSplitter:
    """Splits text that arrives in parts. White space around the reasoning is dropped.

    Attributes:
        thinking: OPENED within the reasoning; NEVER in the answer.
    """

    def __init__(self, thinking: Thinking) -> None:
        self.thinking = thinking
        self._text = ""  # unread
        self._drops_space = thinking is Thinking.OPENED  # at the beginning of the reasoning or the answer

    def add(self, text: str, is_last: bool = False) -> Iterator[tuple[bool, str]]:
        """Append text; yield what is certain now, as (is reasoning, text)."""
        self._text += text
        if self.thinking is Thinking.POSSIBLE:
            start = self._text.lstrip()
            if start.startswith(OPEN):
                self._begin(Thinking.OPENED, start[len(OPEN) :])
            elif is_last or not OPEN.startswith(start):
                self.thinking = Thinking.NEVER
            else:
                return
        if self._drops_space:
            self._text = self._text.lstrip()
            self._drops_space = not self._text
        if self.thinking is Thinking.OPENED:
            before, found, after = self._text.partition(CLOSE)
            if not found and not is_last:
                before = before[: len(before) - held_back(before, CLOSE)]
            visible = before.rstrip()
            if visible:
                yield True, visible
            if not found:
                self._text = self._text[len(visible) :]
                return
            self._begin(Thinking.NEVER, after.lstrip())
            self._drops_space = not self._text
        if self._text:
            yield False, self._text
            self._text = ""

    def _begin(self, thinking: Thinking, text: str) -> None:
        self.thinking, self._text, self._drops_space = thinking, text.lstrip(), not text.strip()
