"""Tables: rows as texts, prompts with completions, or conversations; and rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.distill.data import corpus
from limbeck.distill.data.document import Document
from limbeck.distill.recipe.schema import Data
from limbeck.registry.core.errors import BadInput

CHAT = [
    {"role": "user", "content": "add 1 and 2"},
    {"role": "assistant", "content": "return 3"},
    {"role": "user", "content": "return 3 again"},
    {"role": "assistant", "content": "  3, caf\u00e9 "},
    {"role": "user", "content": "thanks"},
]


@pytest.fixture
def write_table(limbeck_home: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to `qa.jsonl`."""

    def write(*rows: object) -> Path:
        path = tmp_path / "qa.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_rows_are_texts_prompts_or_conversations(write_table: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"q": f"question {n}?", "a": f" answer {n}", "chat": CHAT[: 3 + n % 2 * 2]} for n in range(30)]
    write_table(*rows)

    def read(**columns: str) -> list[Document]:
        made = corpus.prepare_corpus(Data(path="qa.jsonl", **columns), tmp_path, "qa")
        documents = [*corpus.read_corpus(made.train), *corpus.read_corpus(made.heldout)]
        assert len(documents) == 30
        return sorted(documents)

    for document, row in zip(read(prompt_column="q", completion_column="a"), rows, strict=True):
        assert (document.prompt, document.completion, document.messages) == (row["q"], row["a"], ())
    for document, row in zip(read(messages_column="chat"), rows, strict=True):
        assert document.messages == row["chat"]
        assert document.text == "\n".join(turn["content"] for turn in CHAT[: len(row["chat"])])  # type: ignore[arg-type]
    assert [d.text for d in read(text_column="a")] == [row["a"] for row in rows]
    assert [d.completion for d in read(prompt_column="q")] == [""] * 30


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({"messages_column": "chat"}, {"chat": "hello"}, r"qa.jsonl, row 2: chat has no messages"),
        ({"messages_column": "chat"}, {"chat": []}, r"row 2: chat has no messages"),
        ({"messages_column": "chat"}, {"chat": [{"role": "bot", "content": "x"}]}, r"row 2: chat, message 1 cannot"),
        ({"messages_column": "chat"}, {"chat": [{"role": "user", "content": None}]}, r"row 2: chat, message 1 cannot"),
        ({"prompt_column": "q", "completion_column": "a"}, {"q": "x", "a": " "}, r"row 2: a is empty"),
        ({"prompt_column": "q", "completion_column": "a"}, {"q": None, "a": "x"}, r"row 2: q is empty"),
        ({"prompt_column": "ask"}, {}, r"has no column 'ask'\n.*prompt_column to one of: q, a, chat"),
    ],
)
def test_an_unusable_row_is_an_error_with_its_number(
    write_table: Callable[..., Path], tmp_path: Path, columns: dict[str, str], row: dict[str, object], message: str
) -> None:
    good = {"q": "question", "a": "answer", "chat": [{"role": "user", "content": "x"}]}
    mixed = isinstance(row.get("chat"), str)  # a column has one type
    write_table(good | ({"chat": "x"} if mixed else {}), good | row)
    with pytest.raises(BadInput, match=message if not mixed else message.replace("row 2", "row 1")):
        corpus.prepare_corpus(Data(path="qa.jsonl", **columns), tmp_path, "qa")  # type: ignore[arg-type]
