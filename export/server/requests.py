"""A request on its way through the scheduler: what it waits for, how far it is, what its reader has not taken."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from limbeck.export.runtime.generation import GenerationState
from limbeck.export.runtime.slot import Slot


@dataclass(frozen=True)
class Limits:
    """How much of a server its clients may take."""

    rows: int = 64  # decoded together
    queue: int = 256  # requests that wait for their first row
    timeout_s: float = 600.0  # from a request's arrival to its last token
    prompt_tokens: int | None = None  # None: what the context allows
    new_tokens: int | None = None
    cache_bytes: int | None = None  # of all rows together; None: half of the memory that is free at the start


class Unavailable(Exception):
    """A request that is not served, or not to its end, for want of room or time.

    Attributes:
        status: of HTTP. code: for programs.
        retry_after: seconds after which another try may fare better; None where that is not known.
    """

    def __init__(self, status: int, message: str, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after


@dataclass(eq=False)
class Row:
    """One prompt of a request: it waits, is read, is decoded."""

    request: QueuedRequest
    generation: GenerationState
    tokens: list[int]  # what has to be read: the prompt, and after a pause for want of memory what came after it
    slot: Slot | None = None
    last_token_s: float = 0.0  # when its newest token came


@dataclass(eq=False)
class QueuedRequest:
    """What the thread that runs the model knows of a request. Its reader waits for `results` in the event loop.

    `sent` is written by the thread alone, `taken` by the event loop alone.
    """

    loop: asyncio.AbstractEventLoop
    deadline_s: float  # on the clock of time.monotonic
    waiting_rows: deque[Row] = field(default_factory=deque)  # rows that have no place yet
    prompt_logprobs: Iterator[list[Any]] | None = None  # of a prompt that is scored: pieces of what is found
    unfinished_rows: int = 0  # rows that have not ended
    running_rows: int = 0  # rows that have a place
    started: bool = False
    cancelled: bool = False
    arrived_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None  # when its first token came
    sent_results: int = 0
    taken_results: int = 0
    results: asyncio.Queue[list[Any] | Exception | None] = field(default_factory=asyncio.Queue)

    @property
    def unread_results(self) -> int:
        """Results that the reader has not taken."""
        return self.sent_results - self.taken_results
