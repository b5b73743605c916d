"""A queued request, its rows, and the limits of a server."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from limbeck.export.runtime.generation import GenerationState
from limbeck.export.runtime.slot import Slot
from limbeck.export.runtime.speculative.speculation import Speculator

MAX_UNREAD_RESULTS = 256  # unread results per row at which the rows of a request pause


@dataclass(frozen=True)
class Limits:
    """What clients may take of a server."""

    rows: int = 64  # rows in the batch
    queue: int = 256  # waiting requests beyond the free rows
    timeout_s: float = 600.0  # from a request's arrival to its last token
    prompt_tokens: int | None = None  # longest prompt; None: the context length
    new_tokens: int | None = None  # most new tokens; None: what the context allows
    cache_bytes: int | None = None  # key-value cache of all rows; None: half of the memory available at the start


class Unavailable(Exception):
    """The server cannot serve a request, or not to its end: the queue is full, or the time is up.

    Attributes:
        status: the HTTP status.
        code: the error code in the answer.
        retry_after: seconds after which a client should try again; None if unknown.
    """

    def __init__(self, status: int, message: str, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after


@dataclass(eq=False)
class Row:
    """One prompt of a request: waiting, then in prefill, then decoding."""

    request: QueuedRequest
    generation: GenerationState
    tokens: list[int]  # to compute: the prompt, and the new tokens so far if the row was preempted
    slot: Slot | None = None  # None: the row is waiting
    speculator: Speculator | None = None  # of a row that has decoded alone with proposals
    last_token_s: float = 0.0  # time of its newest token


@dataclass(eq=False)
class QueuedRequest:
    """A request as the engine sees it. Its reader waits for `results` in the event loop.

    Only the engine's thread writes `sent_results`, only the event loop writes `taken_results` and `cancelled`.
    """

    loop: asyncio.AbstractEventLoop
    deadline_s: float  # on the clock of time.monotonic
    waiting_rows: deque[Row] = field(default_factory=deque)  # rows without a slot
    scoring: Iterator[list[Any]] | None = None  # chunks of prompt logprobs or embeddings; None: the request generates
    scored_tokens: int = 0  # tokens of its prompts, if it does not generate
    unfinished_rows: int = 0  # rows that still generate
    running_rows: int = 0  # rows with a slot
    started: bool = False
    cancelled: bool = False
    arrived_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None  # time of its first token
    sent_results: int = 0
    taken_results: int = 0
    results: asyncio.Queue[list[Any] | Exception | None] = field(default_factory=asyncio.Queue)  # None ends them

    @property
    def unread_results(self) -> int:
        """Number of results that the reader has not taken."""
        return self.sent_results - self.taken_results

    @property
    def is_reader_slow(self) -> bool:
        """Whether so many results are unread that the request's rows must pause."""
        return self.unread_results >= MAX_UNREAD_RESULTS * max(1, self.running_rows)
