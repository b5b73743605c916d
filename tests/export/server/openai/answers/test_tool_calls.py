"""Calls found in answers of each format, however the answer is cut into parts."""

from __future__ import annotations

import pytest

from limbeck.export.server.openai.answers.parser import AnswerParser, join_calls
from limbeck.export.server.openai.answers.reasoning import Thinking
from limbeck.export.server.openai.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAME_FIRST,
    ToolFormat,
    format_of_template,
)

NAMES = {"f", "gé"}
F, G = ("f", '{"a": 1}'), ("gé", '{"b": "}]\\" </tool_call>"}')
Calls = list[tuple[str, str]]


def parse(text: str, tool_format: ToolFormat, step: int) -> tuple[str, Calls]:
    """The text of an answer and its calls, if it arrives in parts of `step` characters."""
    parser = AnswerParser(Thinking.NEVER, tool_format, NAMES)
    parts = [parser.add(text[start : start + step]) for start in range(0, len(text), step)]
    parts.append(parser.add("", is_last=True))
    calls = join_calls(call for part in parts for call in part.calls)
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    assert all(call.id for call in calls)
    assert parser.has_calls == bool(calls)
    return "".join(part.text for part in parts), [(call.name, call.arguments) for call in calls]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (HERMES, hermes(*F), "", [F]),
    (HERMES, f"\n{hermes(*F)}\n{hermes(*G)}\n", "", [F, G]),
    (HERMES, f"I will.\n{hermes(*F)}\nDone. ", "I will.\nDone.", [F]),
    (HERMES, f"a <tool {hermes('h', '{}')} b\n", f"a <tool {hermes('h', '{}')} b\n", []),
    (HERMES, f"{hermes('h', '{}')}{hermes(*F)}", hermes("h", "{}"), [F]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    (HERMES, '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
    (HERMES, '<tool_call>{"name": "f" "b"}</tool_call>', '<tool_call>{"name": "f" "b"}</tool_call>', []),
    (HERMES, "<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "=", []),
    (HERMES, "<tool_c", "<tool_c", []),
    (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    (LLAMA, f'<|python_tag|>{{"name": "f", "parameters": {F[1]}}}; {{"name": "gé", "parameters": {G[1]}}}', "", [F, G]),
    (LLAMA, '{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
    (LLAMA, '{"size": 1} is JSON', '{"size": 1} is JSON', []),
    (LLAMA, 'A call: {"name": "f", "parameters": {}}', 'A call: {"name": "f", "parameters": {}}', []),
    (LLAMA, " <|python_tag|>print(1)", " <|python_tag|>print(1)", []),
    (MISTRAL, f'[TOOL_CALLS][{{"name": "f", "arguments": {F[1]}}}, {{"name": "gé", "arguments": {G[1]}}}]', "", [F, G]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "x[}"}] ok', " ok", [F]),
    (MISTRAL, '[TOOL_CALLS][{"name": "h", "arguments": {}}]', '[TOOL_CALLS][{"name": "h", "arguments": {}}]', []),
    (MISTRAL_NAME_FIRST, f"[TOOL_CALLS]f[ARGS]{F[1]}[TOOL_CALLS]gé[CALL_ID]x1[ARGS]{G[1]}", "", [F, G]),
    (MISTRAL_NAME_FIRST, "[TOOL_CALLS]h[ARGS]{}", "[TOOL_CALLS]h[ARGS]{}", []),
]


@pytest.mark.parametrize(("tool_format", "answer", "text", "calls"), CASES, ids=[case[1] for case in CASES])
def test_calls_and_text(tool_format: ToolFormat, answer: str, text: str, calls: Calls) -> None:
    for step in (1, 2, 7, len(answer)):
        assert parse(answer, tool_format, step) == (answer if text == "=" else text, calls)


def test_ids_have_the_form_that_templates_ask_for() -> None:
    assert all(len(MISTRAL.new_id()) == 9 and MISTRAL.new_id().isalnum() for _ in range(20))
    assert HERMES.new_id().startswith("call_")


def test_the_format_is_read_from_the_template() -> None:
    sources = {
        "{{ '<tool_call>' }} within <tool_call></tool_call>": HERMES,
        "{{ tools }}": HERMES,
        'Respond in the format {"name": function name, "parameters": dictionary of argument names}.': LLAMA,
        "{{ '<|python_tag|>' }}": LLAMA,
        "{{ '[TOOL_CALLS]' }}": MISTRAL,
        "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}": MISTRAL_NAME_FIRST,
    }
    assert {source: format_of_template(source) for source in sources} == sources
