"""Running totals of a comparison of log-probabilities, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from limbeck.export.artifact.quality import Document
from limbeck.export.runtime.sampling import log_softmax

CHUNK = 16  # tokens at a time: (16, V) float64 log-probabilities take little memory


@dataclass
class Totals:
    """Running totals over tokens. `kl` has one entry per token, in nats."""

    documents: list[Document] = field(default_factory=list)
    tokens: int = 0
    max_diff: float = 0.0
    kl: list[float] = field(default_factory=list)
    top1_matches: int = 0
    nats_reference: float = 0.0
    nats: float = 0.0

    def add(self, row: list[int], reference: np.ndarray, logits: np.ndarray) -> None:
        """Add one text: its T token ids, and (T, V) logits of reference and artifact."""
        self.tokens += len(row)
        matches, nats_reference, nats = 0, 0.0, 0.0
        for start, p, q in _log_probabilities(reference, logits):
            self.compare(p, q)
            matches += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            following = row[start + 1 : start + 1 + CHUNK]
            steps = np.arange(len(following))
            nats_reference -= float(p[steps, following].sum())
            nats -= float(q[steps, following].sum())
        self.documents.append(Document(np.array(self.kl[-len(row) :]), matches, nats_reference, nats))
        self.top1_matches += matches
        self.nats_reference += nats_reference
        self.nats += nats

    def compare_logits(self, reference: np.ndarray, logits: np.ndarray) -> None:
        """Add (T, V) logits of reference and artifact."""
        for _, p, q in _log_probabilities(reference, logits):
            self.compare(p, q)

    def compare(self, p: np.ndarray, q: np.ndarray) -> None:
        """Add (T, V) log-probabilities of reference and artifact."""
        # Comparisons with NaN are false: without nan_to_num a broken graph would pass.
        self.max_diff = max(self.max_diff, float(np.nan_to_num(np.abs(p - q), nan=np.inf).max()))
        self.kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()


def _log_probabilities(reference: np.ndarray, logits: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield the first token of each chunk, and the (t, V) float64 log-probabilities of both there."""
    for start in range(0, len(logits), CHUNK):
        p, q = (log_softmax(each[start : start + CHUNK].astype(np.float64)) for each in (reference, logits))
        yield start, p, q
