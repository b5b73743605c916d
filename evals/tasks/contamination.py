"""Measures contamination: how many documents of a task share a run of 13 words with a training text.

As for GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C), a document is contaminated if any 13-gram of its
words occurs in the text. Case and punctuation do not count. An n-gram that more than 10 documents of the task share,
such as an instruction, is ignored. A document of fewer than 13 words is contaminated if all its words occur in a row;
for a document of a few words that happens by chance. The document's text is the prompt without few-shot examples, with
the right answer.

The training text is the one that a recipe prepared for a version, including what a teacher wrote. If `data.max_tokens`
used only a part of it, the result is an upper bound. What a pretrained model saw before is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from limbeck.evals.tasks.documents import document_text, split_words
from limbeck.registry.core import jsonl
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.records import Contamination, Overlap

if TYPE_CHECKING:
    from limbeck.evals.tasks.task_set import TaskSet

NGRAM = 13  # words
MAX_SHARED_DOCUMENTS = 10  # of one n-gram that still counts
_FACTOR = 0x9E3779B97F4A7C15  # of the polynomial hash, modulo 2**64; any odd number


def measure_contamination(
    tasks: TaskSet, data_digest: str, on_progress: Callable[[int, None], None] = lambda done, total: None
) -> Contamination | None:
    """The overlap of tasks with the training text that has this digest; None if the text is not on this machine.

    The result is cached in `home()/contamination`, since a large text takes long to read.

    Args:
        on_progress: called after each line with the number of lines read and None (the total is unknown).

    Raises:
        BadInput: a line of the training text that is not a JSON object; a task of an unknown output type.
    """
    train = jsonl.find_training_text(data_digest)
    if train is None:
        return None
    key = json_digest([data_digest, tasks.digest, NGRAM, MAX_SHARED_DOCUMENTS])
    cache_file = home() / "contamination" / f"{key[:16]}.json"
    if cache_file.exists():
        return Contamination.model_validate_json(cache_file.read_text())
    texts = {
        name: [document_text(task, doc) for doc in tasks.documents(name).values()] for name, task in tasks.tasks.items()
    }
    by_task = overlaps(texts, _training_texts(train, on_progress))
    contamination = Contamination(data_digest=data_digest, ngram=NGRAM, tasks=by_task)
    with atomic_write(cache_file) as temporary:
        temporary.write_text(contamination.model_dump_json())
    return contamination


def overlaps(tasks: Mapping[str, list[str]], training: Iterable[str]) -> dict[str, Overlap]:
    """How many documents of each task occur in a training text.

    Args:
        tasks: task -> the text of each of its documents. Memory holds 8 bytes for each n-gram.
        training: texts; read once and not kept in memory.
    """
    numbers: dict[str, int] = {}
    documents = {
        name: [[numbers.setdefault(word, len(numbers)) for word in split_words(text)] for text in texts]
        for name, texts in tasks.items()
    }
    # The last code, 0, is that of all words that no document has.
    codes = np.append(np.random.default_rng(0).integers(1, 2**64, len(numbers), dtype=np.uint64), np.uint64(0))
    ngrams = {name: [_document_ngrams(codes[each]) for each in parts] for name, parts in documents.items()}
    sizes = sorted({size for parts in ngrams.values() for size, _ in parts if size})
    indexes = {n: _NgramIndex([h for parts in ngrams.values() for size, h in parts if size == n]) for n in sizes}
    for text in training:
        line = codes[[numbers.get(word, -1) for word in split_words(text)]]
        for n, hashes in _ngrams(line, sizes):
            indexes[n].mark_seen(hashes)
    return {name: _overlap(parts, indexes) for name, parts in ngrams.items()}


class _NgramIndex:
    """The hashes of the documents' n-grams of one size, and which of them the training text has."""

    def __init__(self, hashes: Sequence[np.ndarray]) -> None:
        self.hashes = np.unique(np.concatenate(hashes))
        self.seen = np.zeros(len(self.hashes), dtype=bool)
        # A filter on the first 20 bits of a hash: most n-grams of a training text are in no document.
        self.first_bits = np.zeros(2**20, dtype=bool)
        self.first_bits[self.hashes >> np.uint64(44)] = True

    def indices_of(self, hashes: np.ndarray) -> np.ndarray:
        """The indices in `hashes` and `seen` of hashes that the index has."""
        return np.searchsorted(self.hashes, hashes)

    def mark_seen(self, hashes: np.ndarray) -> None:
        """Mark those of any hashes that the index has."""
        hashes = hashes[self.first_bits[hashes >> np.uint64(44)]]
        places = np.minimum(self.indices_of(hashes), len(self.hashes) - 1)
        self.seen[places[self.hashes[places] == hashes]] = True


def _document_ngrams(codes: np.ndarray) -> tuple[int, np.ndarray]:
    """The size of a document's n-grams, at most NGRAM, and their hashes."""
    size = min(NGRAM, len(codes))
    return next(_ngrams(codes, [size]), (0, codes)) if size else (0, codes)


def _ngrams(codes: np.ndarray, sizes: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(size, hashes) of all n-grams of each of `sizes`, ascending, of a text given as word codes."""
    total = np.zeros_like(codes)
    for n in range(1, min(max(sizes, default=0), len(codes)) + 1):
        weight = np.uint64(pow(_FACTOR, n, 2**64))
        total = total[: len(codes) - n + 1] + codes[n - 1 :] * weight
        if n in sizes:
            yield n, total


def _overlap(documents: list[tuple[int, np.ndarray]], indexes: dict[int, _NgramIndex]) -> Overlap:
    """How many of one task's documents have an n-gram that was seen and that few of them share."""
    of_documents = [(size, np.unique(indexes[size].indices_of(hashes))) for size, hashes in documents if size]
    document_counts = {size: np.zeros(len(index.hashes), dtype=int) for size, index in indexes.items()}
    for size, indices in of_documents:
        document_counts[size][indices] += 1
    contaminated = sum(
        bool((indexes[size].seen[indices] & (document_counts[size][indices] <= MAX_SHARED_DOCUMENTS)).any())
        for size, indices in of_documents
    )
    return Overlap(documents=len(documents), contaminated=contaminated)


def _training_texts(path: Path, on_progress: Callable[[int, None], None]) -> Iterator[str]:
    for number, row in enumerate(jsonl.read_objects(path), 1):
        yield row["text"]
        on_progress(number, None)
