"""Find the tool calls in the text of an answer, while it is generated."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from limbeck.export.server.openai.tools import PYTHON_TAG, ToolFormat

NAME_FIRST = re.compile(r"\s*([^\s\[\]{}]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class CallPart:
    """A part of a tool call: its beginning, with the id and the name, or more of its arguments."""

    index: int  # of the call in the answer
    id: str = ""
    name: str = ""
    arguments: str = ""  # a part of a JSON text


def held_back(text: str, marker: str) -> int:
    """The number of characters at the end of `text` that may be the beginning of `marker`."""
    lengths = range(min(len(text), len(marker) - 1), 0, -1)
    return next((length for length in lengths if marker.startswith(text[-length:])), 0)


class JsonEnd:
    """Finds where a JSON object ends that arrives in parts; what is in it is not checked."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def find(self, text: str) -> int:
        """The number of characters of `text` up to and with the closing bracket; -1 if it is not there yet."""
        for place, character in enumerate(text, 1):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place
        return -1


class ToolCallParser:
    """Splits the text of an answer into plain text and calls of known functions.

    Arguments are returned as they arrive, as the model writes them. Whatever is no call of a known function stays text.
    White space before a call and after the last one is dropped.

    Args:
        tool_format: how the model writes its calls.
        names: of the known functions.
    """

    def __init__(self, tool_format: ToolFormat, names: Collection[str]) -> None:
        self._format, self._names = tool_format, names
        self._state = self._start_text if tool_format.opener else self._start_of_answer
        self._text = ""  # unread
        self._opener = ""  # what stands before the call that is being read
        self._space = ""  # white space that is text only if more text follows
        self._end = JsonEnd()
        self._is_last = False
        self.call_count = 0

    def add(self, text: str) -> Iterator[str | CallPart]:
        """Append text; yield what is certain now."""
        self._text += text
        while True:
            before = (self._state, self._text)
            yield from self._state()
            if not self._text or (self._state, self._text) == before:
                return

    def finish(self) -> Iterator[str | CallPart]:
        """Yield the rest, after the last text."""
        self._is_last = True
        yield from self.add("")
        if self._state == self._call:
            yield from self._as_text(self._opener + self._text)
        if not self.call_count and self._space:
            yield self._space

    # The states. Each consumes some of `_text` and may change the state; if it does neither, it needs more text.

    def _start_of_answer(self) -> Iterator[str | CallPart]:
        """Without an opener: the answer is calls from its beginning, or text."""
        stripped = self._text.lstrip()
        start = stripped.removeprefix(PYTHON_TAG).lstrip()
        if start.startswith("{"):
            self._opener, self._text = self._text[: len(self._text) - len(start)], start
            self._begin_call()
        elif not self._is_last and (not start or PYTHON_TAG.startswith(stripped)):
            return
        else:
            self._state = self._plain_text
        yield from ()

    def _plain_text(self) -> Iterator[str | CallPart]:
        text, self._text = self._text, ""
        yield from self._as_text(text)

    def _start_text(self) -> Iterator[str | CallPart]:
        """Text up to the next opener."""
        before, found, after = self._text.partition(self._format.opener)
        if found:
            yield from self._as_text(before)
            self._opener, self._text = found, after
            self._begin_call()
            return
        certain = len(self._text) - (0 if self._is_last else held_back(self._text, self._format.opener))
        text, self._text = self._text[:certain], self._text[certain:]
        yield from self._as_text(text)

    def _begin_call(self) -> None:
        self._state = self._call

    def _call(self) -> Iterator[str | CallPart]:
        """The head of a call, up to its arguments; or a whole call whose arguments stand first."""
        body = self._text.lstrip()
        if self._format.is_list and not self._separator_was_read():
            body = body.removeprefix("[").lstrip()
        head = (NAME_FIRST if self._format.name_first else _HEAD).match(body)
        if head:
            name = head[1] if self._format.name_first else _loads(f'"{head[1]}"')
            if name in self._names:
                self._text = body[head.end() :]
                yield self._new_call(name)
                self._end, self._state = JsonEnd(), self._arguments
                return
            yield from self._reject()
            return
        if self._format.name_first:
            if not re.fullmatch(r"[^\s{}]*", body):
                yield from self._reject()
            return
        if body and not body.startswith("{"):
            yield from self._reject()
            return
        end = JsonEnd().find(body)
        if end < 0:
            return
        call = _loads(body[:end])
        name = call.get("name") if isinstance(call, dict) else None
        arguments = _arguments_text(call, self._format.arguments) if name in self._names else None
        if arguments is None:
            yield from self._reject()
            return
        self._text = body[end:]
        yield self._new_call(str(name), arguments)
        self._state = self._after_call

    def _arguments(self) -> Iterator[str | CallPart]:
        end = self._end.find(self._text)
        piece, self._text = (self._text, "") if end < 0 else (self._text[:end], self._text[end:])
        if piece:
            yield CallPart(self.call_count - 1, arguments=piece)
        if end >= 0:
            self._end, self._state = JsonEnd(1), self._after_call if self._format.name_first else self._rest_of_object

    def _rest_of_object(self) -> Iterator[str | CallPart]:
        """What stands behind the arguments in a call's object, such as an id of Mistral's: dropped."""
        end = self._end.find(self._text)
        self._text = "" if end < 0 else self._text[end:]
        if end >= 0:
            self._state = self._after_call
        yield from ()

    def _after_call(self) -> Iterator[str | CallPart]:
        """The closer, or the separator of another call."""
        rest = self._text.lstrip()
        if self._format.is_list or not self._format.opener:
            separator = self._format.separator.strip()
            if rest.startswith(separator):
                self._opener, self._text = self._text[: len(self._text) - len(rest) + 1], rest[1:]
                self._begin_call()
            elif rest:
                self._text = rest.removeprefix("]") if self._format.is_list else self._text
                self._end_calls()
            return
        closer = self._format.closer
        if closer and rest.startswith(closer):
            self._text = rest[len(closer) :]
            self._end_calls()
        elif (rest and not closer.startswith(rest)) or not closer:
            self._end_calls()
        yield from ()

    def _end_calls(self) -> None:
        self._opener = ""
        self._state = self._start_text if self._format.opener else self._plain_text

    def _separator_was_read(self) -> bool:
        return self._opener.strip() == self._format.separator.strip()

    def _new_call(self, name: str, arguments: str = "") -> CallPart:
        self.call_count += 1
        self._space = ""
        return CallPart(self.call_count - 1, self._format.new_id(), name, arguments)

    def _reject(self) -> Iterator[str]:
        """What was read is no call of a known function: it is text."""
        rejected, self._opener = self._opener, ""
        yield from self._as_text(rejected)
        self._state = self._start_text if self._format.opener else self._plain_text

    def _as_text(self, text: str) -> Iterator[str]:
        """`text` without its trailing white space, which waits until more text follows."""
        whole = self._space + text
        visible = whole.rstrip()
        self._space = whole[len(visible) :]
        if visible:
            yield visible


_HEAD = re.compile(r'\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _arguments_text(call: dict[str, Any], key: str) -> str | None:
    """The arguments of a call as JSON text; "{}" if there are none, None if they are no object."""
    arguments = call.get(key, call.get("arguments", {}))
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    return json.dumps(arguments or {}, ensure_ascii=False) if isinstance(arguments, dict | None) else None
