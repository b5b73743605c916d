"""Files of JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.jsonl import corpus_digest_in, find_training_text, read_objects, read_rows


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three texts."""
    file = tmp_path / "train.jsonl"
    lines = (json.dumps({"path": name, "text": f"caf\u00e9 {name}", "more": 1}) for name in "abc")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_lines_are_read_in_order_up_to_a_limit(corpus: Path) -> None:
    assert list(read_rows(corpus, limit=2)) == [("a", "caf\u00e9 a"), ("b", "caf\u00e9 b")]
    assert [row["more"] for row in read_objects(corpus, ("more",))] == [1, 1, 1]


@pytest.mark.parametrize("line", ["[1]", "{", '{"path": "a"}'])
def test_an_invalid_line_is_named(corpus: Path, line: str) -> None:
    with corpus.open("a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(BadInput, match=r"train\.jsonl, line 4: not a JSON object with a path and a text"):
        list(read_rows(corpus))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        list(read_rows(tmp_path / "missing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(BadInput, match="cannot be read"):
        list(read_rows(tmp_path / "latin.jsonl"))


def test_a_training_text_is_found_by_its_digest(limbeck_home: Path) -> None:
    folder = limbeck_home / "data" / "still"
    folder.mkdir(parents=True)
    assert corpus_digest_in(folder) is None
    (folder / "corpus.json").write_text('{"digest": "d1"}')
    assert find_training_text("d1") == folder / "train.jsonl"
    assert find_training_text("d2") is None
