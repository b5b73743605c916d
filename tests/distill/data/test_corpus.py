"""The text of a recipe: documents of text files, and the split into training and held-out text on disk."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from limbeck.distill.data import corpus
from limbeck.distill.data.document import Document
from limbeck.distill.recipe.schema import Data
from limbeck.registry.core import jsonl
from limbeck.registry.core.errors import BadInput
from tests.distill.conftest import lines_of_text


def test_a_text_file_is_cut_at_blank_lines(text_file: Path) -> None:
    documents = list(corpus.text_documents(text_file))
    assert len(documents) > 10
    assert "".join(document.text for document in documents) == text_file.read_text()
    assert all(document.text.endswith("\n\n") and len(document.text) >= 2000 for document in documents[:-1])
    assert documents[3].path == "text.txt:00003"


def test_a_text_file_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "dense.txt"
    path.write_text("one line after the other\n" * 2000)
    documents = list(corpus.text_documents(path))
    assert len(documents) == 7
    assert "".join(document.text for document in documents) == path.read_text()


def test_added_text_does_not_change_the_split(limbeck_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()

    def heldout() -> set[str]:
        made = corpus.prepare_corpus(Data(path="texts", heldout=0.3), tmp_path, "split")
        train, held = ({d.path for d in corpus.read_corpus(path)} for path in (made.train, made.heldout))
        assert not train & held
        assert (len(train), len(held)) == (made.train_documents, made.heldout_documents)
        return held

    for number in range(40):
        (folder / f"{number}.txt").write_text(f"text {number}")
    before = heldout()
    assert 5 < len(before) < 20
    for number in range(40, 60):
        (folder / f"{number}.txt").write_text(f"text {number}")
    (folder / "0.txt").write_text("another text")
    assert before <= heldout()


def test_at_least_one_of_a_few_documents_is_held_out(limbeck_home: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for number in range(3):
        (tmp_path / "few" / str(number)).write_text("text")
    made = corpus.prepare_corpus(Data(path="few", heldout=1e-6), tmp_path, "few")
    assert (made.train_documents, made.heldout_documents) == (2, 1)


def test_the_digest_depends_on_text_and_split(limbeck_home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(lines_of_text(2000))
    digests = [
        corpus.prepare_corpus(Data(path="a.txt", heldout=share), tmp_path, "a").digest for share in (0.2, 0.2, 0.5)
    ]
    (tmp_path / "a.txt").write_text(lines_of_text(2000, seed=1))
    digests.append(corpus.prepare_corpus(Data(path="a.txt", heldout=0.2), tmp_path, "a").digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_the_standard_library_without_its_tests() -> None:
    paths = {document.path for document in corpus.stdlib_documents()}
    assert {"argparse.py", "json/decoder.py"} <= paths
    assert not any(path.startswith(("test/", "idlelib/", "site-packages/")) for path in paths)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "not UTF-8"), (b"too little\n", "leaves no"), (b"", "leaves no")],
)
def test_unusable_text_is_an_error(limbeck_home: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        corpus.prepare_corpus(Data(path="a.txt"), tmp_path, "a")
    assert not (limbeck_home / "data" / "a").exists()


def test_replaced_text_is_kept_for_the_versions_made_from_it(limbeck_home: Path, tmp_path: Path) -> None:
    def prepared(seed: int) -> corpus.Corpus:
        (tmp_path / "a.txt").write_text(lines_of_text(2000, seed))
        return corpus.prepare_corpus(Data(path="a.txt"), tmp_path, "a")

    first, second = prepared(0), prepared(1)
    assert jsonl.find_training_text(second.digest) == second.train == first.train
    kept = jsonl.find_training_text(first.digest)
    assert kept is not None
    assert kept != first.train
    assert next(corpus.read_corpus(kept)).text in lines_of_text(2000, 0)
    assert prepared(0).digest == first.digest  # and back again
    assert prepared(1).digest == second.digest
    assert jsonl.find_training_text(first.digest) == kept
    assert jsonl.find_training_text("0" * 64) is None


def test_documents_of_one_path_stay_together_and_in_order(limbeck_home: Path) -> None:
    documents = [Document(f"file{n % 7}", f"text {n}") for n in range(70)]
    made = corpus.write_corpus(iter(documents), "parts", 0.3, "the text")
    train, held = (list(corpus.read_corpus(path)) for path in (made.train, made.heldout))
    assert not {d.path for d in train} & {d.path for d in held}
    for part in (train, held):
        for path in {d.path for d in part}:
            assert [d.text for d in part if d.path == path] == [d.text for d in documents if d.path == path]
    assert sorted(train + held) == sorted(documents)


def test_a_large_corpus_is_never_in_memory_at_once(limbeck_home: Path) -> None:
    text = lines_of_text(2000)
    tracemalloc.start()
    made = corpus.write_corpus((Document(str(n), f"{n} {text}") for n in range(100)), "large", 0.1, "the text")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.train_bytes > 4e6
    assert peak < made.train_bytes / 5
