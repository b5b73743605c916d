"""Tests whether a model gives the same numbers when requests share prefixes.

A list of architectures would never be complete: attention windows, positions taken from the index in the row and
recurrent states all break the scores of shared prefixes without an error. So each model is tested before it shares
anything: a small random tree with a trunk and with early and late forks is scored with sharing and without. The rows
are as long as those to come, since some differences depend on the length.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from limbeck.evals.engines import batches

if TYPE_CHECKING:
    from limbeck.evals.engines.batches import Forward, TokenPair

PREDICTED_TOKENS = 3  # at the end of each text
TOLERANCE = 1e-4  # nats, of the log-probability of these tokens
HALF_PRECISION_TOLERANCE = 0.02  # if the model itself rounds to 16 bits: such a model is off by this without sharing
MIN_ROW_TOKENS = 32  # a model that fails with rows of this size shares nothing
NEVER = 2**62  # more tokens than any row has


class SharingProbe:
    """Tests one model, once for each row size.

    Args:
        model: returns the model; called for each size, so that a model made for the test alone is not kept.
        tolerance: the largest allowed difference, in nats.
    """

    def __init__(self, model: Callable[[], Forward], tolerance: float = TOLERANCE) -> None:
        self.model, self.tolerance = model, tolerance
        self._passed, self._failed = 0, NEVER

    def max_shared_tokens(self, tokens: int) -> int:
        """See `batches.Forward.max_shared_tokens`. A power of two, or 0."""
        size = max(MIN_ROW_TOKENS, 1 << (tokens - 1).bit_length())
        while size >= MIN_ROW_TOKENS and size > self._passed:
            if size < self._failed and self._agrees(size):
                self._passed = size
            else:
                self._failed = min(self._failed, size)
            size //= 2
        return self._passed

    def _agrees(self, size: int) -> bool:
        """Whether rows of `size` tokens, below a trunk and without one, give the numbers of plain rows."""
        forward = self.model()
        pairs = random_requests(size, forward.max_length, forward.vocab_size)
        requests = batches.Requests(pairs, forward.max_length)
        max_row_tokens = min(size + MIN_ROW_TOKENS, isqrt(batches.MAX_ATTENTION_PAIRS))
        work, forward.work = forward.work, batches.TokenCounter()  # the test does not count
        try:
            expected = dict(batches.run_groups(forward, requests, requests.inputs.chains(), size))
            for min_below, min_trunk in ((NEVER, NEVER), (size // 4, 2)):
                groups = requests.inputs.forest(max_row_tokens, NEVER, min_below, min_trunk)
                shared = dict(batches.run_groups(forward, requests, groups, size))
                if any(abs(shared[pair][0] - score) > self.tolerance for pair, (score, _) in expected.items()):
                    return False
        except Exception:  # a model that accepts no masks, positions or cache raises any type
            return False
        finally:
            forward.work = work
        return True


def random_requests(size: int, max_length: int, vocab_size: int) -> list[TokenPair]:
    """Random (context, continuation) pairs whose tree has about `size` tokens.

    The first text is as long as possible. The others fork from it near its end, in its middle and near its beginning,
    and come late in a row of the tree. The last is a prefix of the first.
    """
    random = np.random.default_rng(0)
    low, high = (0, vocab_size // 2 + 1), (vocab_size // 2, vocab_size)  # tokens of `high` sort last
    length = min(size, max_length)
    first = random.integers(*low, length + 1).tolist()
    texts = [first, first[:-4] + random.integers(*high, 4).tolist()]
    texts.append(first[: length // 2] + random.integers(*high, 8).tolist())
    early_fork = min(size // 16 + 1, length // 2)
    room = size - length
    while True:
        new = min(max(room, 8), length - early_fork)
        texts.append(first[:early_fork] + random.integers(*high, new + 1).tolist())
        room -= new
        if room <= 0:
            break
    texts.append(first[: length // 4 + PREDICTED_TOKENS])
    return [(text[:-PREDICTED_TOKENS], text[-PREDICTED_TOKENS:]) for text in texts]
