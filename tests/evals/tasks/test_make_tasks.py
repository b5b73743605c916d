"""Tasks made from held-out text: their answers are right, cannot be guessed from the form, and are made once."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from limbeck.evals.tasks.make_tasks import make_tasks
from limbeck.evals.tasks.minimal_pairs import is_broken, undefined_names
from limbeck.registry.core.errors import BadInput

RULES = ("swapped_bracket", "misplaced_keyword", "undefined_name", "wrong_indentation")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert make_tasks(sources, folder, "std", documents=40) == [
        "std_bits_per_byte",
        "std_next_line",
        "std_minimal_pairs",
    ]
    return folder / "std"


def rows(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def texts(corpus: Path) -> dict[str, str]:
    return {row["path"]: row["text"] for row in map(json.loads, corpus.read_text().splitlines())}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bits_per_byte_takes_the_beginning_of_every_file(made: Path, sources: Path) -> None:
    taken = {row["path"]: row["text"] for row in rows(made, "std_bits_per_byte")}
    assert taken.keys() == texts(sources).keys()
    for path, text in texts(sources).items():
        assert text.startswith(taken[path])
        assert taken[path].endswith("\n")
        assert len(taken[path].encode()) <= 1400
        assert len(taken[path]) > 1000 or taken[path] == text


def test_the_true_next_line_follows_its_context_in_the_file(made: Path, sources: Path) -> None:
    questions = rows(made, "std_next_line")
    assert len(questions) == 40
    for row in questions:
        text = "\n".join(line.rstrip() for line in texts(sources)[row["path"]].splitlines())
        assert row["context"] + row["choices"][row["label"]] + "\n" in text
        lines = [choice.removeprefix("\n") for choice in row["choices"]]
        assert len({line.strip() for line in lines}) == 4
        assert set(lines) <= set(text.splitlines())
        assert not {line.strip() for line in lines} & {line.strip() for line in row["context"].splitlines()}


@pytest.mark.parametrize("guess", [len, lambda text: -len(text), lambda text: text])
def test_the_next_line_cannot_be_guessed_from_its_form(made: Path, guess: Any) -> None:
    questions = rows(made, "std_next_line")
    right = sum(max(row["choices"], key=guess) == row["choices"][row["label"]] for row in questions)
    assert right / len(questions) < 0.45
    assert {row["label"] for row in questions} == {0, 1, 2, 3}
    for row in questions:
        assert len({len(choice) - len(choice.lstrip()) for choice in row["choices"]}) == 1, "one indentation"


def compiles(source: str) -> bool:
    try:
        compile(source, "<pair>", "exec")
    except SyntaxError:
        return False
    return True


@pytest.mark.parametrize("rule", RULES)
def test_one_of_each_pair_is_right_and_the_other_is_broken(made: Path, sources: Path, rule: str) -> None:
    pairs = rows(made, f"std_minimal_pairs_{rule}")
    assert len(pairs) == 40
    assert {row["label"] for row in pairs} == {0, 1}
    for row in pairs:
        good, bad = row["choices"][row["label"]], row["choices"][1 - row["label"]]
        assert len(good) == len(bad)
        assert len(good) <= 280
        assert compiles(good)
        assert all(line.strip() in texts(sources)[row["path"]] for line in good.splitlines())
        if rule == "undefined_name":
            assert compiles(bad)
            assert len(unbound(bad) - unbound(good)) == 1
        else:
            assert not compiles(bad)


def unbound(source: str) -> set[str]:
    """Names that the source reads but binds nowhere, from the syntax tree alone."""
    nodes = list(ast.walk(ast.parse(source)))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {str(node.name) for node in nodes if isinstance(node, ast.ExceptHandler)}
    bound |= {alias.asname or alias.name.split(".")[0] for node in nodes for alias in getattr(node, "names", [])
              if isinstance(alias, ast.alias)}  # fmt: skip
    return read - bound - set(dir(builtins))


def test_the_same_corpus_gives_the_same_tasks(made: Path, sources: Path, tmp_path: Path) -> None:
    make_tasks(sources, made.parent, "other", documents=40)
    for name, content in contents(made.parent / "other").items():
        if name.endswith(".jsonl"):
            assert content == contents(made)[name.replace("other_", "std_")]
    make_tasks(sources, tmp_path, "std", ["next_line"], documents=40, seed=1)
    assert contents(tmp_path / "std")["std_next_line.jsonl"] != contents(made)["std_next_line.jsonl"]


def test_existing_tasks_are_kept_and_moved_ones_are_made_again(sources: Path, tmp_path: Path) -> None:
    def modified(folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    make_tasks(sources, tmp_path / "a", "std", ["bits_per_byte"], documents=2)
    before = modified(tmp_path / "a/std")
    make_tasks(sources, tmp_path / "a", "std", ["bits_per_byte"], documents=2)
    assert modified(tmp_path / "a/std") == before
    make_tasks(sources, tmp_path / "a", "std", ["bits_per_byte"], documents=3)
    assert len(rows(tmp_path / "a/std", "std_bits_per_byte")) == 3
    shutil.move(tmp_path / "a", tmp_path / "b")
    make_tasks(sources, tmp_path / "b", "std", ["bits_per_byte"], documents=3)
    assert str(tmp_path / "b") in (tmp_path / "b/std/std_bits_per_byte.yaml").read_text()


def test_text_that_is_not_python_has_no_minimal_pairs(tmp_path: Path) -> None:
    lines = [f"{who} has {number} good reasons to leave the town\n" for who in "ABCD" for number in range(20)]
    corpus = tmp_path / "plain.jsonl"
    corpus.write_text(json.dumps({"path": "play", "text": "".join(lines)}) + "\n")
    make_tasks(corpus, tmp_path / "tasks", "plain", ["bits_per_byte", "next_line"])
    assert rows(tmp_path / "tasks/plain", "plain_next_line")
    with pytest.raises(BadInput, match="minimal_pairs: no document of the corpus is Python"):
        make_tasks(corpus, tmp_path / "all", "plain")
    assert not list((tmp_path / "all").iterdir()), "nothing is half written"


@pytest.mark.parametrize(
    ("text", "kinds", "message"),
    [
        ('{"path": "a", "text": "x"}\n{"path": "a"}\n', ["bits_per_byte"], "line 2: not a JSON object"),
        ("", ["bits_per_byte"], "has no text"),
        ('{"path": "a", "text": "x"}\n', ["next_lines"], "did you mean next_line"),
        ('{"path": "a", "text": "x"}\n', ["next_line"], "next_line: no document"),
    ],
)
def test_an_unusable_corpus_or_kind_is_reported(tmp_path: Path, text: str, kinds: list[str], message: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(text)
    with pytest.raises(BadInput, match=message):
        make_tasks(corpus, tmp_path / "tasks", "name", kinds)


def test_another_folder_is_not_overwritten(tmp_path: Path, sources: Path) -> None:
    (tmp_path / "std").mkdir()
    (tmp_path / "std/notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds files that are not tasks"):
        make_tasks(sources, tmp_path, "std")
    assert (tmp_path / "std/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("source", "undefined"),
    [
        ("def f(a, *b, c=1, **d):\n    return a, b, c, d, len(a)", set()),
        ("def f(a):\n    return b", {"b"}),
        ("def f():\n    x = 1\n    def g():\n        return x + y\n    return g", {"y"}),
        ("import os.path as p\nfrom sys import argv\nprint(p, argv, os)", {"os"}),
        ("[a for a in range(3)]\nprint(a)", {"a"}),
        ("def f():\n    global n\n    n = 1\ndef g():\n    return n", set()),
        ("class A:\n    x = 1\n    def f(self):\n        return x", {"x"}),
        ("try:\n    pass\nexcept OSError as e:\n    print(e)", set()),
    ],
)
def test_a_name_is_undefined_if_no_scope_binds_it(source: str, undefined: set[str]) -> None:
    assert undefined_names(source) == undefined
    assert is_broken(source, "pass", "undefined_name") == bool(undefined)
