"""The prompts that a teacher answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.distill.data import prompts
from limbeck.distill.recipe.schema import Data, Generate
from limbeck.registry.core.errors import BadInput


def test_the_prompt_of_plain_text_is_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten " * 4)
    (tmp_path / "b.txt").write_text("short")
    found = prompts.load_prompts(Data(path="."), Generate(), tmp_path)
    assert {prompt.path: prompt.text for prompt in found if prompt.path == "a.txt"} == {
        "a.txt": "one two three four five six seven eight nine ten one two three four five six seven eight nine ten"
    }
    [short] = prompts.load_prompts(Data(path=".", max_length=8), Generate(max_prompts=1), tmp_path)
    assert len(short.text) <= 16


def test_the_prompt_of_a_conversation_ends_with_the_last_user_turn(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"m": m}) + "\n" for m in ([user, answer, user, answer], [user])))
    found = prompts.load_prompts(Data(path="chats.jsonl", messages_column="m"), Generate(), tmp_path)
    assert sorted(len(prompt.messages) for prompt in found) == [1, 3]
    assert {prompt.messages[-1]["role"] for prompt in found} == {"user"}
    path.write_text(json.dumps({"m": [answer]}) + "\n")
    with pytest.raises(BadInput, match=r"chats.jsonl:0000000: the last message is not the user's"):
        prompts.load_prompts(Data(path="chats.jsonl", messages_column="m"), Generate(), tmp_path)
