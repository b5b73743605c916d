"""Whether a model gives the same numbers when requests share prefixes.

Reuse of a prefix has silently broken scores elsewhere, and no list of architectures is complete: a window, a
position taken from the place in the row, a state that runs through it. So each model is asked, before it shares
anything: a small random tree with a trunk and forks near and far is scored with sharing and without. What
depends on lengths shows in a row as long as those to come.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from limbeck.evals.engines import batches

if TYPE_CHECKING:
    from limbeck.evals.engines.batches import Forward, TokenPair

TOLERANCE = 1e-4  # nats, of the log-probability of each text's last tokens
HALF_PRECISION_TOLERANCE = 0.02  # the same where the model itself rounds to 16 bits: what it is off by without sharing
PREDICTED_TOKENS = 3  # of these
MIN_ROW_TOKENS = 32  # tokens of a row: a model that fails there shares nothing
NEVER = 2**62


class SharingProbe:
    """Asks one model, once for each length.

    Args:
        model: gives the model; called again for each length, so that one made for this alone can go.
        tolerance: in nats, how far apart the two may be.
    """

    def __init__(self, model: Callable[[], Forward], tolerance: float = TOLERANCE) -> None:
        self.model, self.tolerance = model, tolerance
        self._passed, self._failed = 0, NEVER

    def max_shared_tokens(self, tokens: int) -> int:
        """See `rows.Forward.reach`. A power of two, or 0."""
        size = max(MIN_ROW_TOKENS, 1 << (tokens - 1).bit_length())
        while size >= MIN_ROW_TOKENS and size > self._passed:
            if size < self._failed:
                if self._agrees(size):
                    self._passed = size
                else:
                    self._failed = size
            size //= 2
        return self._passed

    def _agrees(self, size: int) -> bool:
        """Whether rows of `size` tokens, below a trunk and without one, give what plain rows give."""
        forward = self.model()
        requests = batches.Requests(random_requests(size, forward.max_length, forward.vocab_size), forward.max_length)
        inputs, most = requests.inputs, min(size + MIN_ROW_TOKENS, isqrt(batches.MAX_ATTENTION_PAIRS))
        counted, forward.work = forward.work, batches.TokenCounter()
        try:
            expected = dict(batches.run_groups(forward, requests, inputs.chains(), size))
            for below, shortest in ((NEVER, NEVER), (size // 4, 2)):
                found = dict(batches.run_groups(forward, requests, inputs.forest(most, NEVER, below, shortest), size))
                if any(abs(found[pair][0] - score) > self.tolerance for pair, (score, _) in expected.items()):
                    return False
        except Exception:  # no masks, positions or cache from the caller: each model says so in its own way
            return False
        finally:
            forward.work = counted
        return True


def random_requests(size: int, max_length: int, vocab_size: int) -> list[TokenPair]:
    """Random texts whose tree has about `size` tokens.

    The first is as long as may be. The others leave it near its end, in its middle and near its beginning, and
    stand far behind in a row of the tree. The last is a part of the first.
    """
    random = np.random.default_rng(0)
    low, high = ((0, vocab_size // 2 + 1), (vocab_size // 2, vocab_size))  # `high` sorts behind
    length = min(size, max_length)
    first = random.integers(*low, length + 1).tolist()
    texts = [first, first[:-4] + random.integers(*high, 4).tolist()]
    texts.append(first[: length // 2] + random.integers(*high, 8).tolist())
    near = min(size // 16 + 1, length // 2)
    room = size - length
    while True:
        new = min(max(room, 8), length - near)
        texts.append(first[:near] + random.integers(*high, new + 1).tolist())
        room -= new
        if room <= 0:
            break
    texts.append(first[: length // 4 + PREDICTED_TOKENS])
    return [(text[:-PREDICTED_TOKENS], text[-PREDICTED_TOKENS:]) for text in texts]
