"""The chat template of a model's tokenizer: turns of a conversation to the text that the model reads.

A template is a program from the model's folder. It runs in jinja2's sandbox, with bounds on time and size; it is
rendered as transformers does.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from limbeck.registry.core.errors import BadInput, DamagedArtifact

RENDER_S = 5.0
MAX_TEXT = 2**24  # characters
# Put at the end of the turn that is to be continued, and found again in what is rendered.
MARK = "CONTINUE_FINAL_MESSAGE_TAG "
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A tokenizer's template.

    Args:
        templates: its source by name; "default" is there, and "tool_use" where tools have one of their own.
        special_tokens: what the template may name, such as `bos_token`.
    """

    def __init__(self, templates: dict[str, str], special_tokens: dict[str, Any]) -> None:
        self._templates, self._special_tokens = templates, special_tokens
        self._compiled: dict[str, Template] = {}

    @property
    def source(self) -> str:
        """The template itself, where no tools are used."""
        return self._templates["default"]

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The template in an artifact's folder; None where its tokenizer has none."""
        config = _json(folder / "tokenizer_config.json")
        given = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():  # it goes before, as in transformers
            given = (folder / "chat_template.jinja").read_text()
        if isinstance(given, list):
            given = {item["name"]: item["template"] for item in given}
        templates = {"default": given} if isinstance(given, str) else given or {}
        if "default" not in templates:
            return None
        tokens = config | _json(folder / "special_tokens_map.json")
        named: dict[str, Any] = {name: _token_text(tokens[name]) for name in SPECIAL_TOKENS if tokens.get(name)}
        more = tokens.get("additional_special_tokens")
        return cls(templates, named | ({"additional_special_tokens": [*map(_token_text, more)]} if more else {}))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **settings: Any,
    ) -> str:
        """The text of a conversation, special tokens written out: encode it without adding any.

        Args:
            messages: `role` and `content`, a text.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: end within the last message, for the model to go on with it.
            **settings: what else the template knows.

        Raises BadInput where the template does not take these messages, or takes too long.
        """
        turns = copy.deepcopy(list(messages))
        if continue_final_message:
            turns[-1]["content"] = (turns[-1].get("content") or "") + MARK
        values = {"messages": turns, "tools": tools, "documents": documents}
        values |= self._special_tokens | settings | {"add_generation_prompt": add_generation_prompt}
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        clock = _RenderLimits()
        try:
            if name not in self._compiled:
                self._compiled[name] = _environment().from_string(self._templates[name])
            text = clock.join(self._compiled[name].generate(values | {"range": partial(_Range, clock)}))
        except _LimitExceeded as error:
            raise BadInput(f"the chat template gives more than {error}") from None
        except TemplateError as error:  # also what a template raises by itself
            raise BadInput(f"the chat template refuses these messages: {error.message}") from None
        except Exception as error:  # a template is a program: it may fail in any way
            told = f"{type(error).__name__}: {error}"[:200]
            raise BadInput(f"the chat template fails on these messages: {told}") from None
        return _cut_at_continue_mark(text, str(messages[-1].get("content") or "")) if continue_final_message else text


class _LimitExceeded(Exception):
    """A template's time or room is used up."""


class _RenderLimits:
    """Ends a template that goes on for too long, wherever it can be asked."""

    def __init__(self) -> None:
        self._end = time.monotonic() + RENDER_S

    def check(self, size: int = 0) -> None:
        if size > MAX_TEXT:
            raise _LimitExceeded(f"{MAX_TEXT} characters")
        if time.monotonic() > self._end:
            raise _LimitExceeded(f"{RENDER_S:g} s of work")

    def join(self, pieces: Iterator[str]) -> str:
        parts, size = [], 0
        for piece in pieces:
            size += len(piece)
            self.check(size)
            parts.append(piece)
        return "".join(parts)

    def check_each(self, items: range) -> Iterator[int]:
        """The items, each looked at."""
        for item in items:
            self.check()
            yield item


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, where no product is larger than a text may be."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [side for side in (left, right) if isinstance(side, int)]
        texts = [side for side in (left, right) if not isinstance(side, (int, float))]
        length = max((len(text) for text in texts), default=1)
        if operator == "*" and texts and numbers and length * max(numbers) > MAX_TEXT:
            raise _LimitExceeded(f"{MAX_TEXT} characters")
        if operator == "**" and any(abs(number) > 1000 for number in numbers):
            raise SecurityError("a power of this size is not computed")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} marks an assistant's words for training; here it shows them."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Scope:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> _Sandbox:
    """As transformers' `_compile_jinja_template` has it."""

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
    """range, whose every step is looked at."""

    def __init__(self, clock: _RenderLimits, *bounds: int) -> None:
        self._clock, self._range = clock, range(*bounds)

    def __iter__(self) -> Iterator[int]:
        return self._clock.check_each(self._range)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, place: int) -> int:
        return self._range[place]

    def __contains__(self, item: object) -> bool:
        return item in self._range


def _cut_at_continue_mark(text: str, last: str) -> str:
    """The rendered text up to the end of its last message, as transformers cuts it."""
    place = text.rfind(MARK.strip())
    if place < 0 or last.strip() not in text:
        raise BadInput("the chat template leaves out a part of the last message, which then cannot be continued")
    # A template that strips what it is given has stripped the mark's blank, and would strip the message's.
    return text[:place] if text[place:].startswith(MARK) else text[:place].rstrip()


def _token_text(token: str | dict[str, Any]) -> str:
    """A special token, which tokenizers save as a text or as an object."""
    return token if isinstance(token, str) else str(token["content"])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise DamagedArtifact(path.parent, [f"{path.name} is not JSON: {error}"]) from None
    return value if isinstance(value, dict) else {}
