"""The lock of an alias move: one process of this machine at a time, and again if another machine was faster."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from limbeck.registry.core.home import machine_lock
from limbeck.registry.ledger import log

T = TypeVar("T")

ATTEMPTS = 5  # of a move while other machines are faster


@contextmanager
def alias_lock(name: str) -> Iterator[None]:
    """Hold the lock of a model's aliases on this machine: moves, audits and changes of protection take turns."""
    with machine_lock(f"promote-{name}"):
        yield


def with_alias_lock(name: str, move: Callable[[], T]) -> T:
    """Run `move` under the lock, and again if another machine wrote to the ledger meanwhile. Returns its result.

    Raises log.ConcurrentMove if other machines are faster ATTEMPTS times.
    """
    with alias_lock(name):
        for _ in range(ATTEMPTS - 1):
            try:
                return move()
            except log.ConcurrentMove:  # `move` has to read everything again
                time.sleep(random.uniform(0.05, 0.5))
        return move()
