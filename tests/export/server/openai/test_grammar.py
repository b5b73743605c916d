"""What the grammar of an answer allows, for each format of calls, with and without reasoning."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.text.constraint import GrammarCompiler
from limbeck.export.server.openai.answers.reasoning import Thinking
from limbeck.export.server.openai.errors import APIError
from limbeck.export.server.openai.grammar import AnswerGrammar, Schema, compile_grammar
from limbeck.export.server.openai.tools import HERMES, LLAMA, MISTRAL, MISTRAL_NAME_FIRST, ToolFormat
from limbeck.registry.core.errors import BadInput

END = 0  # the end-of-text token
CALLS = {
    "f": Schema({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}, "f"),
    "gé": Schema({"type": "object"}, "g"),
}
FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "mistral, name first": MISTRAL_NAME_FIRST}
TWO_CALLS = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "gé", "arguments": {"b": "}"}}\n</tool_call>',
    "llama": '{"name": "f", "parameters": {"a": 1}}; {"name": "gé", "parameters": {"b": "}"}}',
    "mistral": '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "gé", "arguments": {"b": "}"}}]',
    "mistral, name first": '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]gé[ARGS]{"b": "}"}',
}


@pytest.fixture(scope="module", params=[False, True], ids=["as text", "as special tokens"])
def compiler(request: pytest.FixtureRequest, runtime: Runtime) -> GrammarCompiler:
    """With a tokenizer that has special tokens for calls, or none."""
    tokenizer = Tokenizer.from_str(runtime.tokenizer.to_str())
    if request.param:
        markers = ("[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "</think>")
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in markers])
    return GrammarCompiler(tokenizer, tokenizer.get_vocab_size(), runtime.eos_token_ids)


def plain_compiler(runtime: Runtime) -> GrammarCompiler:
    return GrammarCompiler(runtime.tokenizer, runtime.vocab_size, runtime.eos_token_ids)


def allows(compiler: GrammarCompiler, grammar: AnswerGrammar, text: str) -> bool:
    """Whether the answer `text` may be generated, and end there."""
    state = compiler.compile(grammar.to_lark(compiler.tokenizer)).start()
    is_complete = False
    for token in compiler.tokenizer.encode(text, add_special_tokens=False).ids:
        if is_complete or not state.allowed_tokens()[token]:
            return False
        is_complete = state.accept(token)
    return is_complete or bool(state.allowed_tokens()[END])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("thinking", "before"),
    [
        (Thinking.NEVER, ""),
        (Thinking.OPENED, "so <tool_call>\n</think>\n\n"),
        (Thinking.POSSIBLE, "<think>\nso\n</think>\n\n"),
        (Thinking.POSSIBLE, ""),
    ],
)
def test_calls(compiler: GrammarCompiler, name: str, thinking: Thinking, before: str) -> None:
    if compiler.tokenizer.get_vocab_size() > 300:
        before = before.replace("<tool_call>", "")  # as a special token it is no text
    settings: dict[str, Any] = dict(thinking=thinking, tool_format=FORMATS[name], calls=CALLS)
    two, required = TWO_CALLS[name], AnswerGrammar(**settings)
    assert allows(compiler, required, before + two)
    assert not allows(compiler, required, before + "Hello")
    assert not allows(compiler, required, before + two.replace("1", '"1"'))
    assert not allows(compiler, required, before + two.replace("gé", "h"))
    assert not allows(compiler, AnswerGrammar(**settings, max_calls=1), before + two)
    answer = AnswerGrammar(**settings, answer=Schema({"type": "integer"}, "x"))
    assert allows(compiler, answer, before + two)
    assert allows(compiler, answer, before + "17")
    if FORMATS[name].opener:
        auto = AnswerGrammar(**settings, has_text=True)
        assert allows(compiler, auto, before + "Hello <tool")
        assert allows(compiler, auto, before + "I call " + two)
        assert not allows(compiler, auto, before + "I call " + two.replace("gé", "h"))


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"type": "foo"}, "s", "foo"),
        ({"properties": {"a": {"items": {"pattern": "("}}}}, "s.properties.a.items", "unclosed group"),
        ({"properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/x"}]}}}, "s.properties.a.anyOf[1]", "#/x"),
        ({"properties": {"a": {"not": {"type": "string"}}}}, "s.properties.a", "not"),
        ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "foo"}}}, "s.properties.a", "foo"),
        ({"properties": 3}, "s", "properties must be an object"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "s", "uniqueItems"),
    ],
)
def test_a_bad_schema_names_the_place(runtime: Runtime, schema: dict[str, Any], place: str, reason: str) -> None:
    given = Schema(schema, "s", strict=True)
    grammar = AnswerGrammar(thinking=Thinking.NEVER, tool_format=HERMES, calls={}, answer=given)
    with pytest.raises(APIError) as refused:
        compile_grammar(plain_compiler(runtime), grammar, [given])
    assert refused.value.message.startswith(f"{place}: ")
    assert reason in refused.value.message
    assert (refused.value.status, refused.value.param) == (400, "s")


def test_without_strict_what_cannot_be_enforced_is_left_out(runtime: Runtime) -> None:
    schema = Schema({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "s")
    grammar = AnswerGrammar(thinking=Thinking.NEVER, tool_format=HERMES, calls={}, answer=schema)
    assert compile_grammar(plain_compiler(runtime), grammar, [schema])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(" * 5000 + ")" * 5000},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "string", "maxLength": 10**9},
        {"type": "array", "items": {"type": "array", "items": {}, "minItems": 10**5}, "minItems": 10**5},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"enum": list(range(20_000))},
        {"properties": {f"p{index}": {"type": "integer"} for index in range(2000)}},
    ],
    ids=lambda schema: str(schema)[:40],
)  # fmt: skip
def test_an_expensive_schema_is_compiled_or_refused(runtime: Runtime, schema: dict[str, Any]) -> None:
    given = Schema(schema, "s", strict=True)
    grammar = AnswerGrammar(thinking=Thinking.NEVER, tool_format=HERMES, calls={}, answer=given)
    with suppress(APIError, BadInput):
        constraint = compile_grammar(plain_compiler(runtime), grammar, [given])
        constraint.start().allowed_tokens()


def test_names_of_functions_may_hold_any_characters(compiler: GrammarCompiler) -> None:
    name = 'a "b"\\\n/é*'
    grammar = AnswerGrammar(thinking=Thinking.NEVER, tool_format=ToolFormat("<tool_call>"), calls={name: CALLS["f"]})
    assert compiler.compile(grammar.to_lark(compiler.tokenizer))
