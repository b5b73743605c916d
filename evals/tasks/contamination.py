"""How much of the tasks a training text holds: documents of which a run of 13 words occurs in it.

As for GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C) a document is contaminated where any 13-gram of its
words does; case and punctuation do not count, and a run that more than 10 documents of the task share, such as an
instruction, says nothing. A document of fewer words counts where all of them occur in a row, which those of a few
words do by chance. What is looked for is the prompt without examples, with the right answer.

The text is that which a recipe laid by for a version to be trained on, what a teacher wrote included; where
`data.max_tokens` used some of it, this is an upper bound. What a pretrained model had seen before is not known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.registry.core import jsonl
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.records import Contamination, Overlap

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from limbeck.evals.tasks.task_set import TaskSet

NGRAM = 13  # words
MAX_SHARED_DOCUMENTS = 10  # documents
# Scripts without blanks between words go by characters.
_UNSPACED_SCRIPTS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"
WORD = re.compile(rf"[{_UNSPACED_SCRIPTS}]|[^\W_{_UNSPACED_SCRIPTS}]+")
_FACTOR = 0x9E3779B97F4A7C15  # odd; hashes are modulo 2 to the 64


def measure_contamination(
    tasks: TaskSet, data_digest: str, on_progress: Callable[[int, None], None] = lambda done, total: None
) -> Contamination | None:
    """The overlap of tasks with the training text of a digest; None where that is not at hand.

    Kept below `home()`, since reading a large text takes its time.
    """
    train = jsonl.find_training_text(data_digest)
    if train is None:
        return None
    key = json_digest([data_digest, tasks.digest, NGRAM, MAX_SHARED_DOCUMENTS])
    kept = home() / "contamination" / f"{key[:16]}.json"
    if kept.exists():
        return Contamination.model_validate_json(kept.read_text())
    texts = {name: list(_texts(task, tasks)) for name, task in tasks.tasks.items()}
    found = Contamination(data_digest=data_digest, ngram=NGRAM, tasks=overlaps(texts, _training(train, on_progress)))
    with atomic_write(kept) as temporary:
        temporary.write_text(found.model_dump_json())
    return found


def overlaps(tasks: Mapping[str, list[str]], training: Iterable[str]) -> dict[str, Overlap]:
    """Of each task's documents, how many occur in a training text.

    Args:
        tasks: the text of each document, by task; held as hashes of n-grams.
        training: read once, and not held.
    """
    numbers: dict[str, int] = {}
    documents = {
        name: [[numbers.setdefault(word, len(numbers)) for word in split_words(text)] for text in texts]
        for name, texts in tasks.items()
    }
    # 0 is a word of no document.
    codes = np.append(np.random.default_rng(0).integers(1, 2**64, len(numbers), dtype=np.uint64), np.uint64(0))
    wanted = {name: [_document_ngrams(codes[each]) for each in parts] for name, parts in documents.items()}
    sizes = sorted({size for parts in wanted.values() for size, _ in parts if size})
    known = {n: _NgramIndex([h for parts in wanted.values() for size, h in parts if size == n]) for n in sizes}
    for text in training:
        line = codes[[numbers.get(word, -1) for word in split_words(text)]]
        for n, hashes in _ngrams(line, sizes):
            known[n].mark_seen(hashes)
    return {name: _overlap(parts, known) for name, parts in wanted.items()}


class _NgramIndex:
    """The n-grams of documents, and which of them were seen."""

    def __init__(self, hashes: Sequence[np.ndarray]) -> None:
        self.hashes = np.unique(np.concatenate(hashes))
        self.seen = np.zeros(len(self.hashes), dtype=bool)
        self.first_bits_seen = np.zeros(
            2**20, dtype=bool
        )  # by a hash's first bits: most n-grams of a text are none of these
        self.first_bits_seen[self.hashes >> np.uint64(44)] = True

    def indices_of(self, hashes: np.ndarray) -> np.ndarray:
        """Where hashes that are among these stand."""
        return np.searchsorted(self.hashes, hashes)

    def mark_seen(self, hashes: np.ndarray) -> None:
        hashes = hashes[self.first_bits_seen[hashes >> np.uint64(44)]]
        places = np.minimum(self.indices_of(hashes), len(self.hashes) - 1)
        self.seen[places[self.hashes[places] == hashes]] = True


def split_words(text: str) -> list[str]:
    """The words of a text in small letters; in scripts without blanks, its characters."""
    return WORD.findall(text.lower())


def _document_ngrams(codes: np.ndarray) -> tuple[int, np.ndarray]:
    """Of a document: how long its n-grams are, and their hashes."""
    size = min(NGRAM, len(codes))
    return next(_ngrams(codes, [size]), (0, codes)) if size else (0, codes)


def _ngrams(codes: np.ndarray, sizes: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The hashes of all runs of each of `sizes`, ascending, of words whose codes these are."""
    total = np.zeros_like(codes)
    for n in range(1, min(max(sizes, default=0), len(codes)) + 1):
        weight = np.uint64(pow(_FACTOR, n, 2**64))
        total = total[: len(codes) - n + 1] + codes[n - 1 :] * weight
        if n in sizes:
            yield n, total


def _overlap(documents: list[tuple[int, np.ndarray]], index_by_size: dict[int, _NgramIndex]) -> Overlap:
    of = [(size, np.unique(index_by_size[size].indices_of(hashes))) for size, hashes in documents if size]
    holders = {size: np.zeros(len(each.hashes), dtype=int) for size, each in index_by_size.items()}
    for size, places in of:
        holders[size][places] += 1
    dirty = sum(
        bool((index_by_size[size].seen[places] & (holders[size][places] <= MAX_SHARED_DOCUMENTS)).any())
        for size, places in of
    )
    return Overlap(documents=len(documents), contaminated=dirty)


def _training(path: Path, on_progress: Callable[[int, None], None]) -> Iterator[str]:
    for number, row in enumerate(jsonl.read_objects(path), 1):
        yield row["text"]
        on_progress(number, None)


def _texts(task: Task, tasks: TaskSet) -> Iterator[str]:
    """Of each document that is asked: the prompt without examples and the right answer."""
    settings = tasks.settings
    for _, doc in task.doc_iterator(limit=settings.limit, samples=settings.document_numbers(task.task_name)):
        rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
        parts = [task.doc_to_target(doc)] if rolling else [task.doc_to_text(doc), task.doc_to_target(doc)]
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else []
        yield " ".join(str(text) for part in parts for text in _resolve_choices(part, choices))


def _resolve_choices(part: Any, choices: list[Any]) -> list[Any]:
    """A prompt or target as text: the number of a choice stands for the choice."""
    several = part if isinstance(part, list | tuple) else [part]
    return [choices[one] if isinstance(one, int) and 0 <= one < len(choices) else one for one in several]
