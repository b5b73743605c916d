"""Alias moves take turns: one process of this machine at a time, and again where another machine came first."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from limbeck.registry.ledger import log
from limbeck.registry.mlflow.store import Store

T = TypeVar("T")

ATTEMPTS = 5  # of a move while other machines come first


@contextmanager
def alias_lock(store: Store, name: str) -> Iterator[None]:
    """Hold the lock of a model's aliases on this machine: moves, their audit and protection take turns."""
    with store.lock(f"promote-{name}"):
        yield


def with_alias_lock(store: Store, name: str, move: Callable[[], T]) -> T:
    """Run `move` under the lock, and again if another machine wrote to the ledger meanwhile. Returns its result.

    Raises log.Overtaken if other machines come first ATTEMPTS times.
    """
    with alias_lock(store, name):
        for attempt in range(ATTEMPTS):
            try:
                return move()
            except log.ConcurrentMove:  # the move has to look at everything again
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.05, 0.5))
    raise AssertionError("unreachable")
