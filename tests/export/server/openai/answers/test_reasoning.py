"""Reasoning split from answers, however the answer is cut into parts."""

from __future__ import annotations

import pytest

from limbeck.export.server.openai.answers.parser import AnswerParser
from limbeck.export.server.openai.answers.reasoning import Thinking, thinking_of_prompt

CASES = [
    (Thinking.OPENED, "\nLet me </b> see.\n</think>\n\nYes. ", "Let me </b> see.", "Yes. "),
    (Thinking.OPENED, "never ends </thin", "never ends </thin", ""),
    (Thinking.OPENED, "</think>now", "", "now"),
    (Thinking.POSSIBLE, "<think>\na\n\nb\n</think>\n\nYes", "a\n\nb", "Yes"),
    (Thinking.POSSIBLE, "\n<think>\n\n</think>\n\nYes", "", "Yes"),
    (Thinking.POSSIBLE, " <b>Yes</b>", "", " <b>Yes</b>"),
    (Thinking.POSSIBLE, "<thi", "", "<thi"),
    (Thinking.POSSIBLE, "Yes <think> no </think>", "", "Yes <think> no </think>"),
    (Thinking.NEVER, "<think> no </think>", "", "<think> no </think>"),
]


@pytest.mark.parametrize(("thinking", "answer", "reasoning", "text"), CASES, ids=[repr(case[1]) for case in CASES])
def test_reasoning_and_text(thinking: Thinking, answer: str, reasoning: str, text: str) -> None:
    for step in (1, 2, 5, len(answer)):
        parser = AnswerParser(thinking, None, ())
        parts = [parser.add(answer[start : start + step]) for start in range(0, len(answer), step)]
        parts.append(parser.add("", is_last=True))
        assert "".join(part.reasoning for part in parts) == reasoning
        assert "".join(part.text for part in parts) == text


def test_whether_an_answer_begins_with_reasoning() -> None:
    thinks = "{{ '<think>' }}"
    assert thinking_of_prompt("{{ messages }}", "a<think>", False) is Thinking.NEVER
    assert thinking_of_prompt(thinks, "<|assistant|>", False) is Thinking.POSSIBLE
    assert thinking_of_prompt(thinks, "<|assistant|><think>\n", False) is Thinking.OPENED
    assert thinking_of_prompt(thinks, "<|assistant|><think>\n\n</think>\n\n", False) is Thinking.NEVER
    assert thinking_of_prompt(thinks, "<think>so", True) is Thinking.OPENED
    assert thinking_of_prompt(thinks, "<think>so</think>Y", True) is Thinking.NEVER
