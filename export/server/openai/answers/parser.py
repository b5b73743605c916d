"""The parts of an answer: text, reasoning and tool calls, while it is generated."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from limbeck.export.server.openai.answers.reasoning import ReasoningSplitter, Thinking
from limbeck.export.server.openai.answers.tool_calls import CallPart, ToolCallParser
from limbeck.export.server.openai.tools import ToolFormat


@dataclass(frozen=True)
class AnswerPart:
    """What one new token adds to an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()


class AnswerParser:
    """Splits the text of one answer into its parts.

    Args:
        thinking: whether the answer begins with reasoning.
        tool_format: how the model writes calls; None: it calls nothing.
        names: of the functions that it may call.
    """

    def __init__(self, thinking: Thinking, tool_format: ToolFormat | None, names: Collection[str]) -> None:
        self._reasoning = ReasoningSplitter(thinking)
        self._calls = ToolCallParser(tool_format, names) if tool_format else None

    @property
    def has_calls(self) -> bool:
        """Whether a call was found."""
        return self._calls is not None and self._calls.call_count > 0

    def add(self, text: str, is_last: bool = False) -> AnswerPart:
        """Append text, and return what is certain now; the rest with `is_last`."""
        reasoning: list[str] = []
        answer: list[str] = []
        for is_reasoning, piece in self._reasoning.add(text, is_last):
            (reasoning if is_reasoning else answer).append(piece)
        found: list[str | CallPart] = list(answer)
        if self._calls:
            found = [item for piece in answer for item in self._calls.add(piece)]
            found += self._calls.finish() if is_last else []
        calls = join_calls(item for item in found if isinstance(item, CallPart))
        return AnswerPart("".join(item for item in found if isinstance(item, str)), "".join(reasoning), calls)


def join_calls(parts: Iterable[CallPart]) -> tuple[CallPart, ...]:
    """Join the parts of each call of an answer."""
    joined: dict[int, CallPart] = {}
    for part in parts:
        first = joined.get(part.index, CallPart(part.index))
        arguments = first.arguments + part.arguments
        joined[part.index] = CallPart(part.index, first.id or part.id, first.name or part.name, arguments)
    return tuple(joined.values())
