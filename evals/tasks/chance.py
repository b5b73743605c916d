"""What costs nothing: the best constant answer of a task with answers, and bits per byte without any model.

A score counts from there. Retention above 0 would flatter: a model that always writes the most common answer has
a score, and any compressor removes most of the 8 bits of a byte.
"""

from __future__ import annotations

import bz2
import lzma
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from limbeck.evals.tasks.metrics import Metric

BITS_OF_A_RANDOM_BYTE = 8.0  # a byte drawn from all 256
MAX_ANSWERS = 5  # constant answers that are tried: the most common targets, as they are and as the filter reads them
MAX_DOCUMENTS = 500  # that each is tried on, spread evenly over all
MAX_COMPRESSED = 16 * 2**20  # bytes of text; more would not change the figure
NO_ANSWER = "an empty answer"
WORDS = re.compile(rb"[^\W_]+|\s+|.", re.DOTALL)


class Chance(NamedTuple):
    """The value of a metric that costs nothing.

    Attributes:
        value: in the metric's units; None if guessing has no meaning for it.
        source: what has this value, in a few words.
    """

    value: float | None
    source: str | None = None


def best_constant_answer(task: Task, metric: Metric, docs: Sequence[Any]) -> Chance:
    """The largest mean that one answer gets as the answer to every document, by the task's own filter and metric.

    Tried are the most common targets, as they are and as the filter reads them. A metric that cannot score such an
    answer gives 0.
    """
    if getattr(task, "UNSAFE_CODE", False):  # scoring runs the answer
        return Chance(0.0, NO_ANSWER)
    docs = docs[:: -(-len(docs) // MAX_DOCUMENTS) or 1]
    targets = Counter(text for doc in docs for text in _target_texts(task, doc))
    read = Counter[str]()
    as_read = _filtered(task, metric, [*targets], [docs[0]] * len(targets)) if targets else []
    for count, text in zip(targets.values(), as_read, strict=True):
        read[str(text)] += count
    answers = dict.fromkeys(text for found in (targets, read) for text, _ in found.most_common(MAX_ANSWERS))
    best = 0.0, NO_ANSWER
    for answer in answers:
        try:
            filtered = _filtered(task, metric, [answer] * len(docs), docs)
            pairs = zip(docs, filtered, strict=True)
            scores = [float(task.process_results(doc, [one])[metric.name]) for doc, one in pairs]
        except Exception:  # a task's own code may raise any type on an answer that no model gave
            continue
        best = max(best, (sum(scores) / len(scores), f"always {answer.strip()[-40:]!r}"))
    return Chance(*best)


def _target_texts(task: Task, doc: Any) -> list[str]:
    target = task.doc_to_target(doc)
    several = target if isinstance(target, list | tuple) else [target]
    return [str(one) for one in several]


def _filtered(task: Task, metric: Metric, answers: Sequence[str], docs: Sequence[Any]) -> list[Any]:
    """The answers, as the task's filter reads them."""
    from lm_eval.api.instance import Instance

    instances = [
        Instance(request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[answer])
        for answer, doc in zip(answers, docs, strict=True)
    ]
    [ensemble] = [each for each in task._filters if each.name == metric.filter]
    ensemble.apply(instances)
    return [instance.filtered_resps[metric.filter] for instance in instances]


def free_bits_per_byte(texts: Sequence[str]) -> Chance:
    """Bits per byte of the texts together, by the best of what needs no model: compressors, and words by frequency."""
    data = "\n".join(texts).encode()[:MAX_COMPRESSED]
    if not data:
        return Chance(BITS_OF_A_RANDOM_BYTE, "8 bits")
    codes: dict[str, Callable[[bytes], float]] = {
        "xz": lambda text: 8 * len(lzma.compress(text, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)),
        "bzip2": lambda text: 8 * len(bz2.compress(text)),
        "word frequencies": word_frequency_bits,
        "8 bits": lambda text: BITS_OF_A_RANDOM_BYTE * len(text),
    }
    bits = {name: code(data) / len(data) for name, code in codes.items()}
    best = min(bits, key=lambda name: bits[name])
    return Chance(bits[best], best)


def word_frequency_bits(text: bytes) -> float:
    """Bits of `text` in an adaptive code of its words, which learns their frequencies as it goes.

    A word that was not seen before costs an escape (method C of Moffat 1990, "Implementing the PPM data compression
    scheme") and its bytes, coded the same way.
    """

    def spell(word: bytes) -> Iterator[bytes]:
        return (word[place : place + 1] for place in range(len(word)))

    letters, words = _AdaptiveCode(lambda _: 8.0), _AdaptiveCode(lambda word: letters.bits([*spell(word), b""]))
    return words.bits(WORDS.findall(text))


class _AdaptiveCode:
    """Symbols by their frequency so far; `new_bits` is the cost of a symbol at its first time, beside the escape."""

    def __init__(self, new_bits: Callable[[bytes], float]) -> None:
        self._new_bits, self._counts, self._total = new_bits, Counter[bytes](), 0

    def bits(self, symbols: Sequence[bytes]) -> float:
        """The cost of these symbols, after all before."""
        cost = 0.0
        for symbol in symbols:
            count, distinct = self._counts[symbol], len(self._counts)
            cost -= math.log2((count or distinct or 1) / (self._total + distinct or 1))
            if not count:
                cost += self._new_bits(symbol)
            self._counts[symbol] += 1
            self._total += 1
        return cost
