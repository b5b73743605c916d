"""From text to blocks: documents, the split, the tokenizer, the bytes that blocks stand for."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from limbeck.distill.data import corpus
from limbeck.distill.data.blocks import make_blocks, train_tokenizer
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


def test_a_text_file_without_blank_lines_is_cut_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "dense.txt"
    path.write_text("one line after the other\n" * 2000)
    documents = list(corpus.text_documents(path))
    assert len(documents) == 7
    assert "".join(document.text for document in documents) == path.read_text()


def test_the_split_holds_when_text_is_added(limbeck_home: Path, tmp_path: Path) -> None:
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


def test_of_a_few_documents_one_is_held_out(limbeck_home: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for number in range(3):
        (tmp_path / "few" / str(number)).write_text("text")
    made = corpus.prepare_corpus(Data(path="few", heldout=1e-6), tmp_path, "few")
    assert (made.train_documents, made.heldout_documents) == (2, 1)


def test_the_digest_is_of_text_and_split(limbeck_home: Path, tmp_path: Path) -> None:
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


def test_blocks_are_the_documents_end_to_end(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = [Document(str(n), lines_of_text(5, seed=n)) for n in range(150)]
    blocks = make_blocks(documents, tokenizer, 16)
    assert blocks.ids.dtype == np.int32
    assert blocks.ids.shape[1] == 16
    end = tokenizer.eos_token  # there is no BOS: it starts a document too
    whole = "".join(f"{end}{document.text}{end}" for document in documents)
    text = tokenizer.decode(blocks.ids.flatten())
    assert whole.startswith(text)
    # Exact but for the one document that is cut.
    size = len(text.replace(tokenizer.eos_token, "").encode())
    assert abs(blocks.text_bytes - size) < len(documents[0].text)
    assert abs(blocks.text_bytes - size) / size < 0.001

    fewer = make_blocks(documents, tokenizer, 16, max_tokens=330)
    assert (fewer.ids == blocks.ids[:20]).all()
    size = len(tokenizer.decode(fewer.ids.flatten()).replace(tokenizer.eos_token, "").encode())
    assert abs(fewer.text_bytes - size) < 10
    assert len({blocks.digest, fewer.digest, make_blocks(documents, tokenizer, 16).digest}) == 2


def test_the_block_length_is_part_of_the_digest(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = [Document(str(n), lines_of_text(5, seed=n)) for n in range(10)]
    short, long = (make_blocks(documents, tokenizer, length, max_tokens=64) for length in (8, 16))
    assert (short.ids.flatten() == long.ids.flatten()).all()
    assert short.digest != long.digest


def test_a_tokenizer_is_trained_alike_and_loses_nothing() -> None:
    documents = [Document("a", lines_of_text(400))]
    tokenizer, again = (train_tokenizer(documents, 280, 64) for _ in range(2))
    assert len(tokenizer) == 280
    assert tokenizer.get_vocab() == again.get_vocab()
    odd = "caf\u00e9\u2003\t \U0001f600 don't  stop\r\n"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    assert tokenizer.eos_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "not UTF-8"), (b"too little\n", "leaves no"), (b"", "leaves no")],
)
def test_text_that_cannot_be_used(limbeck_home: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(BadInput, match=message):
        corpus.prepare_corpus(Data(path="a.txt"), tmp_path, "a")
    assert not (limbeck_home / "data" / "a").exists()


def test_other_text_of_the_same_name_is_kept_for_the_versions_made_from_it(limbeck_home: Path, tmp_path: Path) -> None:
    def prepared(seed: int) -> corpus.Corpus:
        (tmp_path / "a.txt").write_text(lines_of_text(2000, seed))
        return corpus.prepare_corpus(Data(path="a.txt"), tmp_path, "a")

    first, second = prepared(0), prepared(1)
    assert jsonl.find_training_text(second.digest) == second.train == first.train
    kept = jsonl.find_training_text(first.digest)
    assert kept is not None
    assert kept != first.train
    assert next(corpus.read_corpus(kept)).text in lines_of_text(2000, 0)
    assert prepared(0).digest == first.digest  # and back, and forth
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


def test_a_large_corpus_is_not_held_in_memory(limbeck_home: Path) -> None:
    text = lines_of_text(2000)
    tracemalloc.start()
    made = corpus.write_corpus((Document(str(n), f"{n} {text}") for n in range(100)), "large", 0.1, "the text")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.train_bytes > 4e6
    assert most < made.train_bytes / 5
