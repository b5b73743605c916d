"""Which documents of a task belong together: an error is computed over these clusters, not over documents.

Documents belong together if the task says so (`metadata: {cluster: COLUMN}`), if they are of one file (a column
`path`), if they share a long context such as a passage, or if one repeats the other: the same words, or nearly the
same runs of SHINGLE words (MinHash: Broder 1997, "On the resemblance and containment of documents"). Whatever a model
knows of one it knows of the other, so together they are no more evidence than one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from limbeck.evals.tasks.documents import document_text, split_words
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from lm_eval.api.task import Task

CONTEXT_CHARACTERS = 200  # of a text column: one as long as this is a context, if several documents share it
SHINGLE = 3  # words
MIN_SHINGLES = 8  # a shorter text repeats another only if all words are the same
SIMILARITY = 0.8  # Jaccard's, of the shingles of two texts that repeat each other
PERMUTATIONS = 64


class Clusters(NamedTuple):
    """The clusters of a task's documents.

    Attributes:
        labels: of each document, by its number; equal ones belong together. A label that is a path is shared by tasks.
        repeats: how many documents repeat another.
    """

    labels: dict[int, str]
    repeats: int


def cluster_documents(task: Task, documents: Mapping[int, Any]) -> Clusters:
    """Find which documents of a task belong together.

    Args:
        documents: by their numbers in the task.

    Raises:
        BadInput: the column that the task's metadata names is missing.
    """
    numbers, docs = [*documents.keys()], [*documents.values()]
    joined = _DisjointSets(len(docs))
    for group in _groups(_named_columns(task, documents)):
        joined.join(group)
    for group in _shared_contexts(docs):
        joined.join(group)
    texts = [" ".join(split_words(document_text(task, doc))) for doc in docs]
    repeats = 0
    for group in _repeats(texts):
        repeats += len(group) - 1
        joined.join(group)
    roots = [joined.root(place) for place in range(len(docs))]
    return Clusters(
        {numbers[place]: _label(task, docs[root], numbers[root]) for place, root in enumerate(roots)}, repeats
    )


def _label(task: Task, doc: Any, doc_id: int) -> str:
    path = doc.get("path") if isinstance(doc, dict) else None
    return str(path or f"{task.task_name}:{doc_id}")


def _named_columns(task: Task, documents: Mapping[int, Any]) -> Iterator[Hashable | None]:
    """What each document has in the column that the task names, else in `path`; None: nothing."""
    column = (getattr(task.config, "metadata", None) or {}).get("cluster")
    for number, doc in documents.items():
        if column and (not isinstance(doc, dict) or column not in doc):
            raise BadInput(
                f"task {task.task_name}, document {number}: its metadata clusters by {column!r}, which it has not",
                fix="name a column that each document has",
            )
        value = doc.get(column or "path") if isinstance(doc, dict) else None
        yield None if value in (None, "") else str(value)


def _shared_contexts(docs: Sequence[Any]) -> Iterator[list[int]]:
    """Documents with the same long text in a column; a text that most have is an instruction, not a context."""
    by_text: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, doc in enumerate(docs):
        for column, value in doc.items() if isinstance(doc, dict) else ():
            if isinstance(value, str) and len(value) >= CONTEXT_CHARACTERS:
                by_text[column, value].append(index)
    return (group for group in by_text.values() if 1 < len(group) <= len(docs) / 2)


def _repeats(texts: Sequence[str]) -> Iterator[list[int]]:
    """Groups of texts that repeat one another; empty texts repeat nothing."""
    from datasketch import MinHash, MinHashLSH

    groups = list(_groups((text or None) for text in texts))
    firsts = {text: index for index, text in reversed([*enumerate(texts)]) if text}
    similar = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    shingles = {index: _shingles(text) for text, index in firsts.items()}
    joined = _DisjointSets(len(texts))
    for group in groups:
        joined.join(group)
    for index, own in sorted(shingles.items()):
        if len(own) < MIN_SHINGLES:
            continue
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in own])
        for other in similar.query(sketch):
            if len(own & shingles[other]) >= SIMILARITY * len(own | shingles[other]):
                joined.join([other, index])
        similar.insert(index, sketch)
    return _groups(joined.root(index) if text else None for index, text in enumerate(texts))


def _shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[place : place + SHINGLE]) for place in range(len(words) - SHINGLE + 1)}


def _groups(keys: Iterable[Hashable | None]) -> Iterator[list[int]]:
    """The places of each key that occurs more than once; None is no key."""
    places: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        if key is not None:
            places[key].append(place)
    return (group for group in places.values() if len(group) > 1)


class _DisjointSets:
    """Sets of the numbers below `count` that `join` merges; the root of a set is its smallest number."""

    def __init__(self, count: int) -> None:
        self._parents = list(range(count))

    def root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def join(self, numbers: Sequence[int]) -> None:
        roots = sorted(map(self.root, numbers))
        for root in roots[1:]:
            self._parents[root] = roots[0]
