"""The grammar of an answer: JSON by a schema, tool calls, and the reasoning before either."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import MaxLen
from tokenizers import Tokenizer

from limbeck.export.runtime.text.constraint import CompiledGrammar, GrammarCompiler
from limbeck.export.server.openai.answers.reasoning import CLOSE, OPEN, Thinking
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.tools import Tool, ToolFormat
from limbeck.registry.core.errors import BadInput

JsonObject = dict[str, Any]
MAX_CALLS = 16  # of an answer whose calls are constrained; a small model may repeat itself
MAX_SCHEMAS = 500  # parts of a schema that are tried to name the place of its fault
# Between the tokens of JSON: nothing, a space, or a new line with its indentation, so that no model writes blanks only.
WHITE_SPACE = r"[ ]?|\n[ ]{0,20}"
BEFORE_ANSWER = {
    Thinking.NEVER: "",
    Thinking.OPENED: "think BLANK ",
    Thinking.POSSIBLE: f'("{OPEN}" think)? BLANK ',
}


@dataclass(kw_only=True)
class JsonSchema:
    """The schema of an answer."""

    name: Annotated[str, MaxLen(256)]
    schema: JsonObject | None = None  # default: any object
    description: str | None = None
    strict: bool | None = None  # refuse a schema of which a part cannot be enforced


@dataclass(kw_only=True)
class TextFormat:
    """An answer of plain text."""

    type: Literal["text"]


@dataclass(kw_only=True)
class JsonObjectFormat:
    """An answer that is a JSON object."""

    type: Literal["json_object"]


@dataclass(kw_only=True)
class JsonSchemaFormat:
    """An answer that is JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


@dataclass(frozen=True)
class Schema:
    """A JSON schema of a request."""

    schema: JsonObject
    place: str  # in the request
    strict: bool = False

    def terminal(self, part: JsonObject | None = None) -> str:
        """The schema as a part of a grammar; or `part`, one of its parts."""
        schema = self.schema if part is None else part
        options = {"whitespace_pattern": WHITE_SPACE, "lenient": not self.strict}
        return f"%json {json.dumps(schema | {'x-guidance': options})}"


def schema_of_format(response_format: ResponseFormat | None, place: str) -> Schema | None:
    """The schema of a response format; None for plain text."""
    if isinstance(response_format, JsonObjectFormat):
        return Schema({"type": "object"}, place)
    if isinstance(response_format, JsonSchemaFormat):
        given = response_format.json_schema
        schema = {"type": "object"} if given.schema is None else given.schema
        return Schema(schema, f"{place}.json_schema.schema", bool(given.strict))
    return None


def schemas_of_tools(tools: Sequence[Tool]) -> dict[str, Schema]:
    """The schema of each function's arguments, by name."""
    schemas = {}
    for index, tool in enumerate(tools):
        place = f"tools[{index}].function.parameters"
        schema = tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
        schemas[tool.function.name] = Schema({"type": "object"} | schema, place, bool(tool.function.strict))
    return schemas


@dataclass(frozen=True, kw_only=True)
class AnswerGrammar:
    """What an answer may be: calls, JSON or text, after reasoning.

    Args:
        thinking: whether the answer begins with reasoning.
        tool_format: how the model writes its calls.
        calls: the schema of the arguments of each function that may be called; {}: none.
        max_calls: the most calls.
        answer: the schema of an answer without calls; None: there is no such answer.
        has_text: an answer may also be text with calls in it.
    """

    thinking: Thinking
    tool_format: ToolFormat
    calls: dict[str, Schema]
    max_calls: int = MAX_CALLS
    answer: Schema | None = None
    has_text: bool = False  # only for a format with an opener

    def to_lark(self, tokenizer: Tokenizer) -> str:
        """The grammar in llguidance's dialect of Lark."""
        special = _special_tokens(tokenizer)
        alternatives = ["answer"] if self.answer else []
        alternatives += ["calls"] if self.calls else []
        alternatives += ["TEXT", "text_with_calls"] if self.has_text else []
        rules = [f"start: {BEFORE_ANSWER[self.thinking]}({' | '.join(alternatives)})", r"BLANK: /[ \n]{0,4}/"]
        if self.thinking is not Thinking.NEVER:
            rules.append(_text_until("think", CLOSE, special))
        if self.answer:
            rules.append(f"answer: {self.answer.terminal()}")
        if self.calls:
            rules += self._call_rules(special)
        if self.has_text:
            rules += self._text_rules(special)
        return "\n".join(rules)

    def _call_rules(self, special: dict[str, int]) -> Iterator[str]:
        """The rules `calls`, `body` (what follows an opener) and those that they need."""
        form = self.tool_format
        opener, closer = (_terminal(text, special) for text in (form.opener, form.closer))
        names = " | ".join(f"call_{index}" for index in range(len(self.calls)))
        if form.is_list:
            yield f'body: "[" call {self._repeated(json.dumps(form.separator) + " call")} "]"'
            yield f"call: {names}"
            yield f"calls: {opener} body"
        else:
            blank = json.dumps("\n") if closer else ""
            yield f"body: {blank} ({names}) {blank} {closer}"
            more = self._repeated(f"{_terminal(form.separator, special)} {opener} body")
            yield f"calls: {opener} body {more}"
        for index, (name, schema) in enumerate(self.calls.items()):
            if form.name_first:
                yield f"call_{index}: {json.dumps(name)} {_terminal(form.name_first, special)} args_{index}"
            else:
                head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{form.arguments}": '
                yield f'call_{index}: {json.dumps(head)} args_{index} "}}"'
            yield f"args_{index}: {schema.terminal()}"

    def _repeated(self, more: str) -> str:
        """What may follow the first call."""
        return f"({more}){{0,{self.max_calls - 1}}}" if self.max_calls > 1 else ""

    def _text_rules(self, special: dict[str, int]) -> Iterator[str]:
        """The rules `TEXT`, without a call, and `text_with_calls`."""
        opener, is_special = self.tool_format.opener, self.tool_format.opener in special
        starts = [] if self.thinking is Thinking.NEVER else [OPEN]  # reasoning is no text
        yield r"PLAIN: /(.|\n)*/" + "".join(rf" & ~/{re.escape(text)}(.|\n)*/" for text in starts)
        yield "TEXT: PLAIN" + ("" if is_special else rf" & ~/(.|\n)*{re.escape(opener)}(.|\n)*/")
        yield _text_until("text_to_call", opener, special, "PLAIN")
        yield f"text_with_calls: (text_to_call body){{1,{self.max_calls}}} TEXT"


def compile_grammar(compiler: GrammarCompiler, grammar: AnswerGrammar, schemas: Sequence[Schema]) -> CompiledGrammar:
    """Compile a grammar. Raises APIError, naming the place of the fault if it is in one of `schemas`."""
    try:
        return compiler.compile(grammar.to_lark(compiler.tokenizer))
    except BadInput as error:
        for schema in schemas:
            fault = _find_fault(compiler, schema)
            if fault:
                place, reason = fault
                raise APIError(400, f"{place}: {reason}", place.partition(".")[0].partition("[")[0]) from None
        raise APIError(400, error.message) from None


def _find_fault(compiler: GrammarCompiler, schema: Schema) -> tuple[str, str] | None:
    """The innermost part of a schema that cannot be compiled: its place and the reason; None if all can."""
    definitions = {key: schema.schema[key] for key in ("$defs", "definitions") if key in schema.schema}

    def reason(part: JsonObject) -> str | None:
        try:
            compiler.compile(f"start: {schema.terminal(definitions | part)}")
        except BadInput as error:
            return error.message
        return None

    part, place, tried = schema.schema, schema.place, 0
    found = reason(part)
    if found is None:
        return None
    while True:
        for path, inner in _parts(part):
            tried += 1
            message = reason(inner) if tried <= MAX_SCHEMAS else None
            if message is not None:
                part, place, found = inner, f"{place}.{path}", message
                break
        else:
            return place, found


def _parts(schema: JsonObject) -> Iterator[tuple[str, JsonObject]]:
    """The schemas within a schema, with the path to each."""
    for key, value in schema.items():
        if isinstance(value, list):
            yield from ((f"{key}[{index}]", item) for index, item in enumerate(value) if isinstance(item, dict))
        elif key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            yield from ((f"{key}.{name}", item) for name, item in value.items() if isinstance(item, dict))
        elif key in ("items", "additionalProperties", "additionalItems") and isinstance(value, dict):
            yield key, value


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Text -> id of the special tokens, which a text in a grammar does not match."""
    return {added.content: token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}


def has_special_token(tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Whether one of these texts is a special token, which is left out of a decoded text by default."""
    return not _special_tokens(tokenizer).keys().isdisjoint(texts)


def _terminal(text: str, special: dict[str, int]) -> str:
    """A text in a grammar; "" for none."""
    if text in special:
        return f"<[{special[text]}]>"
    return json.dumps(text) if text else ""


def _text_until(rule: str, end: str, special: dict[str, int], text: str = r"/(.|\n)*/") -> str:
    """A rule: text up to and with `end`."""
    if end in special:
        return f"{rule}: {text} <[{special[end]}]>"
    return f"{rule}[suffix={json.dumps(end)}]: {text}"
