"""Chat templates: render the messages of a conversation into the text of a prompt, as transformers does.

A template is a program from the model's folder, so it runs in jinja2's sandbox with limits on time and output size.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from limbeck.export.runtime.text.special_tokens import MARK
from limbeck.registry.core.errors import BadInput, DamagedArtifact

RENDER_S = 5.0  # the longest that a template may run
MAX_TEXT = 2**24  # characters
# Appended to the message to continue; the rendered text is cut there.
CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        templates: source by name: "default", and "tool_use" if the model has a separate template for tools.
        special_tokens: variables of the template, such as `bos_token`.
    """

    def __init__(self, templates: dict[str, str], special_tokens: dict[str, Any]) -> None:
        self._templates, self._special_tokens = templates, special_tokens
        self._compiled: dict[str, Template] = {}

    @property
    def source(self) -> str:
        """The source of the default template."""
        return self._templates["default"]

    @property
    def source_with_tools(self) -> str:
        """The source of the template that renders conversations with tools."""
        return self._templates.get("tool_use", self.source)

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """Read the template of an artifact's folder; None if its tokenizer has none.

        Raises DamagedArtifact if a configuration file is not JSON.
        """
        config = _json(folder / "tokenizer_config.json")
        templates = config.get("chat_template") or {}
        if (folder / "chat_template.jinja").is_file():  # takes precedence, as in transformers
            templates = (folder / "chat_template.jinja").read_text()
        if isinstance(templates, list):
            templates = {item["name"]: item["template"] for item in templates}
        elif isinstance(templates, str):
            templates = {"default": templates}
        if "default" not in templates:
            return None
        tokens = config | _json(folder / "special_tokens_map.json")
        special: dict[str, Any] = {name: _token_text(tokens[name]) for name in SPECIAL_TOKENS if tokens.get(name)}
        additional = tokens.get("additional_special_tokens")
        if additional:
            special["additional_special_tokens"] = [_token_text(token) for token in additional]
        return cls(templates, special)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        settings: Mapping[str, Any] | None = None,
        escape: Callable[[Any], Any] = copy.deepcopy,
    ) -> str:
        """Render a conversation. The text contains its special tokens: encode it without adding any.

        Args:
            messages: objects with `role` and a text as `content`.
            tools, documents: passed to the template.
            add_generation_prompt: end with the header of an answer.
            continue_final_message: end inside the last message, for the model to continue it.
            settings: other variables of the template.
            escape: of all that comes from outside, before it is rendered: `SpecialTokens.escape`, so that the special
                tokens in messages are text. By default they are tokens.

        Raises:
            BadInput: the template rejects these messages, fails, or exceeds its limits of time or size.
        """
        outside = {**(settings or {}), "messages": list(messages), "tools": tools, "documents": documents}
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        limits = _RenderLimits()
        try:
            values = self._special_tokens | escape(outside) | {"add_generation_prompt": add_generation_prompt}
            last_turn = values["messages"][-1]
            last = str(last_turn.get("content") or "")
            if continue_final_message:
                last_turn["content"] = last + CONTINUE_MARK
            if name not in self._compiled:
                self._compiled[name] = _environment().from_string(self._templates[name])
            text = limits.join(self._compiled[name].generate(values | {"range": partial(_Range, limits)}))
        except _LimitExceeded as error:
            raise BadInput(f"the chat template exceeds its limit of {error}") from None
        except TemplateError as error:  # also from `raise_exception` in a template
            raise BadInput(f"the chat template rejects these messages: {_unmarked(error.message)}") from None
        except Exception as error:  # a template is a program: it may raise anything
            reason = f"{type(error).__name__}: {error}"[:200]
            raise BadInput(f"the chat template fails on these messages: {_unmarked(reason)}") from None
        if continue_final_message:
            return _cut_at_continue_mark(text, last)
        return text


class _LimitExceeded(Exception):
    """A template exceeds a limit; the message names the limit."""


class _RenderLimits:
    """Stops a template that runs too long or writes too much; checked at each output and each step of a range."""

    def __init__(self) -> None:
        self._end = time.monotonic() + RENDER_S

    def check(self, size: int = 0) -> None:
        """Raise _LimitExceeded if the time is up or `size` characters are too many."""
        if size > MAX_TEXT:
            raise _LimitExceeded(f"{MAX_TEXT} characters")
        if time.monotonic() > self._end:
            raise _LimitExceeded(f"{RENDER_S:g} s")

    def join(self, outputs: Iterator[str]) -> str:
        """Join a template's outputs, checking the limits after each."""
        parts, size = [], 0
        for output in outputs:
            size += len(output)
            self.check(size)
            parts.append(output)
        return "".join(parts)

    def check_each(self, items: range) -> Iterator[int]:
        """Yield the items, checking the limits before each."""
        for item in items:
            self.check()
            yield item


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with limits on repeated texts and powers, whose operators run without a check."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [side for side in (left, right) if isinstance(side, int)]
        texts = [side for side in (left, right) if not isinstance(side, (int, float))]
        length = max((len(text) for text in texts), default=1)
        if operator == "*" and texts and numbers and length * max(numbers) > MAX_TEXT:
            raise _LimitExceeded(f"{MAX_TEXT} characters")
        if operator == "**" and any(abs(number) > 1000 for number in numbers):
            raise SecurityError("a power with an operand above 1000 is not allowed")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} marks an assistant's text for training; here it only renders its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> _Sandbox:
    """The jinja2 environment of transformers' `_compile_jinja_template`."""

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Range:
    """`range` with a check of the limits at each step."""

    def __init__(self, limits: _RenderLimits, *bounds: int) -> None:
        self._limits, self._range = limits, range(*bounds)

    def __iter__(self) -> Iterator[int]:
        return self._limits.check_each(self._range)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> int:
        return self._range[index]

    def __contains__(self, item: object) -> bool:
        return item in self._range


def _cut_at_continue_mark(text: str, last: str) -> str:
    """Cut the rendered text at the end of its last message, as transformers does.

    Raises BadInput if the template dropped a part of the message.
    """
    end = text.rfind(CONTINUE_MARK.strip())
    if end < 0 or last.strip() not in text:
        raise BadInput("the chat template drops a part of the last message, so it cannot be continued")
    # The mark ends with a space: a template that strips it would also strip the message's trailing space.
    return text[:end] if text[end:].startswith(CONTINUE_MARK) else text[:end].rstrip()


def _unmarked(message: str | None) -> str:
    return (message or "").replace(MARK, "")


def _token_text(token: str | dict[str, Any]) -> str:
    """The text of a special token, which tokenizers save as a text or as an object."""
    return token if isinstance(token, str) else str(token["content"])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise DamagedArtifact(path.parent, [f"{path.name} is not JSON: {error}"]) from None
    return value if isinstance(value, dict) else {}
