"""Continuous batching: one thread decodes the rows of all requests together, and rows join and leave at every step.

The idea is Orca's (Yu et al., OSDI 2022); prompts are read in pieces between steps as in Sarathi (arXiv 2308.16369).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.session import NUMPY_TYPES, PREFILL_LOGITS
from limbeck.export.runtime.slot import Slot
from limbeck.export.server.metrics import Metrics
from limbeck.export.server.requests import Limits, Request, Row, Unavailable
from limbeck.registry.core.machine import available_memory

READ_S = 0.05  # how long rows that are decoded wait, about, while prompts are read; or as long as a step takes
READ_ALONE_S = 0.25  # where no row is decoded; those that come meanwhile wait
LEAST_PIECE = 16  # tokens of a prompt that are read at once, however slow the model is
BEHIND = 256  # results for each row that a reader may leave before its rows pause
GROWTH = 32  # tokens that must be free in the cache for each row before another one joins
FINISHED = 64  # requests over which their rate is taken


class Engine:
    """The rows of one loaded artifact, and the thread that runs it.

    - First come, first served; but a request takes at most half of the rows that the others leave, so that one of
      128 rows does not lock out one of a single row.
    - A row ends at once when its reader has left or its time is up, and pauses while its reader is slow.
    - Where the cache would outgrow its bytes, the youngest row gives up its place and is read again later.
    """

    def __init__(self, runtime: Runtime, limits: Limits, metrics: Metrics) -> None:
        self._runtime, self._limits, self._metrics = runtime, limits, metrics
        self._batch = Batch(runtime)
        budget = available_memory() // 2 if limits.cache_bytes is None else limits.cache_bytes
        self._cache_tokens = max(1, budget // _bytes_per_token(runtime))
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._requests: list[Request] = []  # all that are not answered, in the order they came
        self._reading: deque[Row] = deque()
        self._decoding: list[Row] = []
        self._out: list[tuple[Request, list[Any] | Exception | None]] = []
        self._submitted = self._begun = 0  # written by the event loop, by the thread
        self._finished: deque[float] = deque(maxlen=FINISHED)
        self._read_rate = 2000.0  # prompt tokens a second; measured as they are read
        self._step_s = 0.0  # how long a step took of late
        self._look = False  # a place has become free
        self._stopped = False
        self.sleeping = False
        threading.Thread(target=self._run, name="limbeck-engine", daemon=True).start()

    # What the event loop calls.

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._submitted += 1
        self._inbox.put(request)

    def wake(self) -> None:
        """Look again: a reader has taken something, or has left."""
        self._inbox.put(None)

    def stop(self) -> None:
        """End the thread, once nobody waits for a result."""
        self._stopped = True
        self.wake()

    @property
    def queued(self) -> int:
        """Requests that wait for their first row."""
        return self._submitted - self._begun

    @property
    def free(self) -> int:
        """Places that no row has."""
        return self._limits.rows - len(self._reading) - len(self._decoding)

    def requests_per_s(self) -> float | None:
        """How many requests ended in a second of late; None before the second has."""
        ends = list(self._finished)
        return len(ends) / max(time.monotonic() - ends[0], 1e-3) if len(ends) > 1 else None

    # The thread.

    def _run(self) -> None:
        while not self._stopped:
            self._take_in()
            self._drop()
            self._admit()
            self._read()
            self._step()
            self._score()
            self._metrics.waiting.set(self.queued)
            self._metrics.running.set(len(self._reading) + len(self._decoding))
            self._deliver()

    def _take_in(self) -> None:
        """New requests; where there is nothing to do, wait for one."""
        self.sleeping = True
        if not self._busy():
            nearest = min((request.deadline_s for request in self._requests), default=None)
            with suppress(queue.Empty):
                self._took(self._inbox.get(timeout=nearest and max(0.001, nearest - time.monotonic())))
        self.sleeping = False
        with suppress(queue.Empty):
            while True:
                self._took(self._inbox.get_nowait())

    def _took(self, request: Request | None) -> None:
        if request is not None:
            self._requests.append(request)

    def _busy(self) -> bool:
        """Whether there is something to compute."""
        if self._reading or any(request.scores or request.cancelled for request in self._requests):
            return True
        if self._look and any(request.waiting for request in self._requests):
            return True
        return any(not _slow(row.request) for row in self._decoding)

    def _drop(self) -> None:
        """End requests whose reader has left or whose time is up."""
        now = time.monotonic()
        for request in list(self._requests):
            if request.cancelled:
                self._end(request, "cancelled")
            elif now > request.deadline_s:
                took = f"{self._limits.timeout_s:g} s"
                self._end(request, "timeout", Unavailable(504, f"the request took longer than {took}", "timeout"))

    def _admit(self) -> None:
        """Give places to rows that wait."""
        self._look = False
        for request in list(self._requests):
            while request.waiting:
                if self.free <= 0 or not self._fits(request.waiting[0]):
                    return
                if request.running >= max(1, (self.free + request.running) // 2):
                    break
                row = request.waiting.popleft()
                with self._blamed([request]):
                    row.slot = self._batch.begin(row.tokens, row.generation.most - row.generation.taken)
                    self._reading.append(row)
                    request.running += 1
                self._start(request)

    def _start(self, request: Request) -> None:
        if not request.started:
            request.started = True
            self._begun += 1
            self._metrics.queue_time.observe(time.monotonic() - request.arrived_s)

    def _fits(self, row: Row) -> bool:
        """Whether the cache has room for another row; the first always has a place."""
        rows = [*self._reading, *self._decoding, row]
        longest = max(_length(other) for other in rows) + GROWTH
        return len(rows) == 1 or len(rows) * longest <= self._cache_tokens

    def _read(self) -> None:
        """Read a piece of what the first rows have to read; they go to the end of the line, so none waits long."""
        if not self._reading:
            return
        wanted = self._read_rate * (max(READ_S, self._step_s) if self._decoding else READ_ALONE_S)
        most = max(LEAST_PIECE, min(int(wanted), PREFILL_LOGITS // self._runtime.vocab_size))
        rows: list[Row] = []
        tokens = 0
        for row in self._reading:
            unread = min(_slot(row).unread, most)
            if rows and tokens + unread > most:
                break
            rows.append(row)
            tokens += unread
        with self._blamed([row.request for row in rows]):
            start = time.monotonic()
            logits = self._batch.read([_slot(row) for row in rows], most)
            self._read_rate += (tokens / max(time.monotonic() - start, 1e-6) - self._read_rate) / 4
            for row, values in zip(rows, logits, strict=True):
                self._reading.popleft()
                if values is None:
                    self._reading.append(row)
                    continue
                if not row.generation.taken:
                    self._metrics.prompt_tokens.inc(len(row.tokens))
                    self._metrics.cached_tokens.inc(_slot(row).cached)
                self._decoding.append(row)
                self._take(row, values)

    def _step(self) -> None:
        """One more token for each row whose reader keeps up."""
        self._make_room()
        rows = [row for row in self._decoding if not _slow(row.request)]
        if not rows:
            return
        with self._blamed([row.request for row in rows]):
            start = time.monotonic()
            logits = self._batch.step([_slot(row) for row in rows], [row.generation.last for row in rows])
            self._step_s += (time.monotonic() - start - self._step_s) / 4
            for row, values in zip(rows, logits, strict=True):
                self._take(row, values)

    def _take(self, row: Row, logits: np.ndarray) -> None:
        """Let a row choose its next token."""
        request, now = row.request, time.monotonic()
        event = row.generation.take(logits)
        if row.generation.taken == 1:
            event = replace(event, cached_tokens=_slot(row).cached)
        row.tokens.append(event.token_id)
        if request.first_s is None:
            request.first_s = now
            self._metrics.first_token.observe(now - request.arrived_s)
        if row.last_s:
            self._metrics.next_token.observe(now - row.last_s)
        row.last_s = now
        self._metrics.generation_tokens.inc()
        self._send(request, [event])
        if event.finish_reason:
            self._metrics.requests_finished.labels(event.finish_reason).inc()
            self._decoding.remove(row)
            self._release(row)
            request.left -= 1
            if not request.left:
                self._end(request)

    def _score(self) -> None:
        """A piece of the first prompt that is scored, which then goes to the end of the line."""
        request = next((request for request in self._requests if request.scores and not _slow(request)), None)
        if request is None or request.scores is None:
            return
        self._start(request)
        with self._blamed([request]):
            self._requests.remove(request)
            self._requests.append(request)
            scored = next(request.scores, None)
            if scored is None:
                self._metrics.prompt_tokens.inc(request.sent)
                self._end(request)
            else:
                self._send(request, scored)

    def _make_room(self) -> None:
        """Take the place of the youngest rows where the cache would outgrow its bytes."""
        while len(rows := [*self._decoding, *self._reading]) > 1:
            if len(rows) * (max(map(_length, rows)) + 1) <= self._cache_tokens:
                return
            self._pause(rows[-1])

    def _pause(self, row: Row) -> None:
        """Let a row wait again; it will read what it has so far."""
        (self._decoding if row in self._decoding else self._reading).remove(row)
        self._release(row)
        row.request.waiting.appendleft(row)
        self._metrics.paused.inc()

    def _release(self, row: Row) -> None:
        if row.slot is not None:
            self._batch.end(row.slot)
        row.slot = None
        row.request.running -= 1
        self._look = True

    def _end(self, request: Request, why: str = "", error: Exception | None = None) -> None:
        """Let a request go, its rows with it; its reader hears `error`, or that it is done."""
        if request not in self._requests:
            return
        self._requests.remove(request)
        for row in [row for row in (*self._reading, *self._decoding) if row.request is request]:
            (self._decoding if row in self._decoding else self._reading).remove(row)
            self._release(row)
        request.waiting.clear()
        if not request.started:
            self._begun += 1
        if why:
            self._metrics.requests_failed.labels(why).inc()
        else:
            self._finished.append(time.monotonic())
            self._metrics.whole.observe(self._finished[-1] - request.arrived_s)
        self._out.append((request, error))

    @contextmanager
    def _blamed(self, requests: Sequence[Request]) -> Iterator[None]:
        """Where the block raises, end these requests and go on with the others."""
        try:
            yield
        except Exception as error:  # whatever it is, the readers must hear of it
            # The batch may be in any state: the rows of others are read again in a new one.
            self._batch = Batch(self._runtime)
            for row in reversed([*self._decoding, *self._reading]):
                row.slot = None
                if row.request not in requests:
                    self._pause(row)
            for request in requests:
                told = RuntimeError(f"the model failed: {error}")
                told.__cause__ = error
                self._end(request, "error", told)

    def _send(self, request: Request, results: list[Any]) -> None:
        request.sent += len(results)
        self._out.append((request, results))

    def _deliver(self) -> None:
        """Hand over what a turn has brought: one call into each event loop."""
        loops = defaultdict(list)
        for request, results in self._out:
            loops[request.loop].append((request, results))
        self._out = []
        for loop, out in loops.items():
            try:
                loop.call_soon_threadsafe(_put, out)
            except RuntimeError:  # the loop has ended: nobody listens any more
                for request, _ in out:
                    request.cancelled = True


def _put(out: list[tuple[Request, list[Any] | Exception | None]]) -> None:
    for request, results in out:
        request.results.put_nowait(results)


def _slow(request: Request) -> bool:
    """Whether the reader is so far behind that its rows pause."""
    return request.behind >= BEHIND * max(1, request.running)


def _slot(row: Row) -> Slot:
    assert row.slot is not None
    return row.slot


def _length(row: Row) -> int:
    """Tokens that the row has in the cache, or will have when it is read."""
    return len(row.tokens)


def _bytes_per_token(runtime: Runtime) -> int:
    """Of the cache, for one position of one row."""
    total = 0
    for item in runtime.onnx_session.get_inputs():
        if item.name.startswith("past_key_values."):
            fixed = [size for size in item.shape if isinstance(size, int)]
            total += int(np.prod(fixed)) * np.dtype(NUMPY_TYPES[item.type]).itemsize
    return max(1, total)
