"""Continuous batching: one thread decodes the rows of all requests together; rows join and leave at every step.

After Orca (Yu et al., OSDI 2022). Prompts are read in chunks between the steps, as in Sarathi (arXiv 2308.16369).
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
from limbeck.export.runtime.slot import Slot
from limbeck.export.runtime.speculative.speculation import Speculation
from limbeck.export.server.memory import cache_bytes_per_token
from limbeck.export.server.metrics import Metrics
from limbeck.export.server.requests import Limits, QueuedRequest, Row, Unavailable
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import available_memory

# Decoding rows wait about this long for a chunk of prefill, or as long as a decoding step takes if that is longer.
PREFILL_S = 0.05
PREFILL_ALONE_S = 0.25  # the same if no row is decoding; new requests wait this long
MIN_CHUNK_TOKENS = 16  # the smallest chunk of a prompt, however slow the model is
FREE_TOKENS_PER_ROW = 32  # tokens that the cache must have free for each row before another row joins
RATE_WINDOW = 64  # finished requests over which the rate is measured


class Engine:
    """The requests of one loaded artifact, and the thread that runs the model.

    - First come, first served. But a request gets at most half of the rows that other requests leave, so that a
      request with 128 rows does not block one with a single row.
    - A request ends at once when its reader leaves or its time is up. Its rows pause while its reader is slow.
    - If the key-value cache would exceed its size, the newest row is preempted and computed again later.

    The event loop calls `submit`, `wake` and `stop` and reads the properties; everything else belongs to the thread.

    Args:
        runtime: the loaded artifact.
        limits: what clients may take.
        metrics: where to count.

    Attributes:
        is_sleeping: the thread waits for a request, or is about to: it needs `wake` to notice that a reader caught up.
    """

    def __init__(self, runtime: Runtime, limits: Limits, metrics: Metrics) -> None:
        self._runtime, self._limits, self._metrics = runtime, limits, metrics
        self._batch = Batch(runtime)
        budget = available_memory() // 2 if limits.cache_bytes is None else limits.cache_bytes
        self._cache_tokens = max(1, budget // cache_bytes_per_token(runtime))
        self._inbox: queue.SimpleQueue[QueuedRequest | None] = queue.SimpleQueue()
        self._requests: list[QueuedRequest] = []  # all unfinished requests, in order of arrival
        self._prefilling: deque[Row] = deque()
        self._decoding: list[Row] = []
        self._outbox: list[tuple[QueuedRequest, list[Any] | Exception | None]] = []
        self._submitted_count = 0  # written by the event loop
        self._started_count = 0  # written by the thread
        self._finish_times: deque[float] = deque(maxlen=RATE_WINDOW)
        self._prefill_tokens_per_s = 2000.0  # a first guess; measured during prefill
        self._step_s = 0.0  # moving average of the time of a decoding step
        self._row_was_freed = False  # since the last `_admit`
        self._stopped = False
        self.is_sleeping = False
        threading.Thread(target=self._run, name="limbeck-engine", daemon=True).start()

    # Called by the event loop.

    def submit(self, request: QueuedRequest) -> None:
        """Queue a request."""
        self._submitted_count += 1
        self._inbox.put(request)

    def wake(self) -> None:
        """Make the thread look at its requests again: a reader has taken results, or has left."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Stop the thread; call it when no reader waits for results."""
        self._stopped = True
        self.wake()

    @property
    def queued_requests(self) -> int:
        """Number of requests that wait for their first row."""
        return self._submitted_count - self._started_count

    @property
    def free_rows(self) -> int:
        """Number of rows that are free."""
        return self._limits.rows - len(self._prefilling) - len(self._decoding)

    def requests_per_s(self) -> float | None:
        """Recent rate of finished requests; None before two have finished."""
        ends = list(self._finish_times)
        return len(ends) / max(time.monotonic() - ends[0], 1e-3) if len(ends) > 1 else None

    # Called by the thread.

    def _run(self) -> None:
        while not self._stopped:
            self._receive_requests()
            self._end_dead_requests()
            self._admit()
            self._prefill()
            self._decode_step()
            self._score_prompts()
            self._metrics.requests_waiting.set(self.queued_requests)
            self._metrics.rows_running.set(len(self._prefilling) + len(self._decoding))
            self._deliver()

    def _receive_requests(self) -> None:
        """Take new requests; wait for one if there is nothing to compute."""
        self.is_sleeping = True
        if not self._has_work():
            nearest = min((request.deadline_s for request in self._requests), default=None)
            with suppress(queue.Empty):
                self._add_request(self._inbox.get(timeout=nearest and max(0.001, nearest - time.monotonic())))
        self.is_sleeping = False
        with suppress(queue.Empty):
            while True:
                self._add_request(self._inbox.get_nowait())

    def _add_request(self, request: QueuedRequest | None) -> None:
        if request is not None:
            self._requests.append(request)

    def _has_work(self) -> bool:
        """Whether there is anything to compute or clean up."""
        if self._prefilling or any(request.scoring or request.cancelled for request in self._requests):
            return True
        if self._row_was_freed and any(request.waiting_rows for request in self._requests):
            return True
        return any(not row.request.is_reader_slow for row in self._decoding)

    def _end_dead_requests(self) -> None:
        """End requests whose reader has left or whose time is up."""
        now = time.monotonic()
        for request in list(self._requests):
            if request.cancelled:
                self._end_request(request, "cancelled")
            elif now > request.deadline_s:
                message = f"the request took longer than {self._limits.timeout_s:g} s"
                self._end_request(request, "timeout", Unavailable(504, message, "timeout"))

    def _admit(self) -> None:
        """Start waiting rows while there are free rows and the cache has room."""
        self._row_was_freed = False
        for request in list(self._requests):
            while request.waiting_rows:
                if self.free_rows <= 0 or not self._cache_has_room(request.waiting_rows[0]):
                    return
                if request.running_rows >= max(1, (self.free_rows + request.running_rows) // 2):
                    break
                row = request.waiting_rows.popleft()
                with self._end_on_failure([request]):
                    row.slot = self._batch.add_prompt(row.tokens)
                    self._prefilling.append(row)
                    request.running_rows += 1
                self._mark_started(request)

    def _mark_started(self, request: QueuedRequest) -> None:
        if not request.started:
            request.started = True
            self._started_count += 1
            self._metrics.queue_time.observe(time.monotonic() - request.arrived_s)

    def _cache_has_room(self, row: Row) -> bool:
        """Whether the cache has room for another row; the first row always fits."""
        rows = [*self._prefilling, *self._decoding, row]
        longest = max(_length(other) for other in rows) + FREE_TOKENS_PER_ROW
        return len(rows) == 1 or len(rows) * longest <= self._cache_tokens

    def _prefill(self) -> None:
        """Compute a chunk of the prompts of the first rows, which then move to the end of the queue."""
        if not self._prefilling:
            return
        max_tokens = self._chunk_size()
        rows, tokens = self._rows_of_chunk(max_tokens)
        with self._end_on_failure([row.request for row in rows]):
            start = time.monotonic()
            logits = self._batch.prefill([_slot(row) for row in rows], max_tokens)
            rate = tokens / max(time.monotonic() - start, 1e-6)
            self._prefill_tokens_per_s += (rate - self._prefill_tokens_per_s) / 4
            for row, values in zip(rows, logits, strict=True):
                self._prefilling.popleft()
                (self._prefilling if values is None else self._decoding).append(row)
            for row, values in zip(rows, logits, strict=True):
                if values is not None:
                    if not row.generation.token_count and row.slot is not None:
                        self._metrics.prompt_tokens.inc(len(row.tokens))
                        self._metrics.cached_tokens.inc(row.slot.reused_tokens)
                    self._sample_token(row, values)

    def _chunk_size(self) -> int:
        """The most prompt tokens to compute in one turn."""
        seconds = max(PREFILL_S, self._step_s) if self._decoding else PREFILL_ALONE_S
        affordable = int(self._prefill_tokens_per_s * seconds)
        return max(MIN_CHUNK_TOKENS, min(affordable, self._runtime.max_prefill_tokens))

    def _rows_of_chunk(self, max_tokens: int) -> tuple[list[Row], int]:
        """The first rows of the queue whose unread tokens fit, at least one; and the number of those tokens."""
        rows: list[Row] = []
        tokens = 0
        for row in self._prefilling:
            unread = min(_slot(row).unread_tokens, max_tokens)
            if rows and tokens + unread > max_tokens:
                break
            rows.append(row)
            tokens += unread
        return rows, tokens

    def _decode_step(self) -> None:
        """Generate one more token for each row whose reader keeps up, or several for one that decodes alone."""
        self._preempt_rows()
        rows = [row for row in self._decoding if not row.request.is_reader_slow]
        if not rows:
            return
        with self._end_on_failure([row.request for row in rows]):
            if len(rows) == 1 and self._runtime.speculation:
                self._speculate(rows[0], self._runtime.speculation)
                return
            start = time.monotonic()
            logits = self._batch.step([_slot(row) for row in rows], [row.generation.last_token for row in rows])
            self._step_s += (time.monotonic() - start - self._step_s) / 4
            for row, values in zip(rows, logits, strict=True):
                self._sample_token(row, values)

    def _speculate(self, row: Row, speculation: Speculation) -> None:
        """Generate one token or more for a row that decodes alone."""
        row.speculator = row.speculator or speculation.start()
        counts = speculation.counts
        before = replace(counts)
        start = time.monotonic()
        for logits in row.speculator.run(self._batch, _slot(row), row.generation, row.tokens):
            self._sample_token(row, logits)
            if row.slot is None:
                break
        if counts.verifications == before.verifications:
            self._step_s += (time.monotonic() - start - self._step_s) / 4
        self._metrics.verifications.inc(counts.verifications - before.verifications)
        self._metrics.proposed_tokens.inc(counts.proposed - before.proposed)
        self._metrics.accepted_tokens.inc(counts.accepted - before.accepted)
        self._metrics.speculative_speedup.set(counts.speedup or 1)

    def _sample_token(self, row: Row, logits: np.ndarray) -> None:
        """Choose a row's next token from (V,) logits, and end the row if it is the last one.

        If that fails, only the row's request ends.
        """
        request, now = row.request, time.monotonic()
        if row.slot is None:  # another row of its request failed just now
            return
        try:
            event = row.generation.choose_token(logits)
        except Exception as error:  # settings that fit no token, a constraint, logits that are not numbers
            self._end_request(request, "error", error if isinstance(error, BadInput) else _failure(error))
            return
        if row.generation.token_count == 1:
            event = replace(event, cached_tokens=_slot(row).reused_tokens)
        row.tokens.append(event.token_id)
        if request.first_token_s is None:
            request.first_token_s = now
            self._metrics.time_to_first_token.observe(now - request.arrived_s)
        if row.last_token_s:
            self._metrics.inter_token_latency.observe(now - row.last_token_s)
        row.last_token_s = now
        self._metrics.generation_tokens.inc()
        self._add_results(request, [event])
        if event.finish_reason:
            self._metrics.requests_finished.labels(event.finish_reason).inc()
            self._decoding.remove(row)
            self._release_slot(row)
            request.unfinished_rows -= 1
            if not request.unfinished_rows:
                self._end_request(request)

    def _score_prompts(self) -> None:
        """Compute a chunk of the first request for prompt logprobs or embeddings, which then moves to the end."""
        request = next((request for request in self._requests if request.scoring and not request.is_reader_slow), None)
        if request is None or request.scoring is None:
            return
        self._mark_started(request)
        with self._end_on_failure([request]):
            self._requests.remove(request)
            self._requests.append(request)
            logprobs = next(request.scoring, None)
            if logprobs is None:
                self._metrics.prompt_tokens.inc(request.scored_tokens)
                self._end_request(request)
            else:
                self._add_results(request, logprobs)

    def _preempt_rows(self) -> None:
        """Preempt the newest rows until the cache fits in its size."""
        while len(rows := [*self._decoding, *self._prefilling]) > 1:
            if len(rows) * (max(map(_length, rows)) + 1) <= self._cache_tokens:
                return
            self._preempt(rows[-1])

    def _preempt(self, row: Row) -> None:
        """Put a row back to waiting; its prompt and its new tokens will be computed again."""
        (self._decoding if row in self._decoding else self._prefilling).remove(row)
        self._release_slot(row)
        row.request.waiting_rows.appendleft(row)
        self._metrics.preemptions.inc()

    def _release_slot(self, row: Row) -> None:
        if row.slot is not None:
            self._batch.remove_slot(row.slot)
        row.slot = None
        row.request.running_rows -= 1
        self._row_was_freed = True

    def _end_request(self, request: QueuedRequest, reason: str = "", error: Exception | None = None) -> None:
        """Remove a request and its rows.

        Args:
            request: not ended yet; else nothing happens.
            reason: the label of the failure metric; "" for success.
            error: raised to the reader; None ends the results.
        """
        if request not in self._requests:
            return
        self._requests.remove(request)
        for row in [row for row in (*self._prefilling, *self._decoding) if row.request is request]:
            (self._decoding if row in self._decoding else self._prefilling).remove(row)
            self._release_slot(row)
        request.waiting_rows.clear()
        if not request.started:
            self._started_count += 1
        if reason:
            self._metrics.requests_failed.labels(reason).inc()
        else:
            self._finish_times.append(time.monotonic())
            self._metrics.request_latency.observe(self._finish_times[-1] - request.arrived_s)
        self._outbox.append((request, error))

    @contextmanager
    def _end_on_failure(self, requests: Sequence[QueuedRequest]) -> Iterator[None]:
        """If the block raises, end these requests with the error and continue the others."""
        try:
            yield
        except Exception as error:  # whatever it is, the readers must get it
            # The batch may be in any state: compute the rows of the other requests again in a new batch.
            self._batch = Batch(self._runtime)
            for row in reversed([*self._decoding, *self._prefilling]):
                row.slot = None
                if row.request not in requests:
                    self._preempt(row)
            for request in requests:
                self._end_request(request, "error", _failure(error))

    def _add_results(self, request: QueuedRequest, results: list[Any]) -> None:
        request.sent_results += len(results)
        self._outbox.append((request, results))

    def _deliver(self) -> None:
        """Send the results of this turn to the readers: one call into each event loop."""
        loops = defaultdict(list)
        for request, results in self._outbox:
            loops[request.loop].append((request, results))
        self._outbox = []
        for loop, out in loops.items():
            try:
                loop.call_soon_threadsafe(_put, out)
            except RuntimeError:  # the loop is closed: its readers are gone
                for request, _ in out:
                    request.cancelled = True


def _put(out: list[tuple[QueuedRequest, list[Any] | Exception | None]]) -> None:
    for request, results in out:
        request.results.put_nowait(results)


def _failure(error: Exception) -> RuntimeError:
    failure = RuntimeError(f"the model failed: {error}")
    failure.__cause__ = error
    return failure


def _slot(row: Row) -> Slot:
    assert row.slot is not None
    return row.slot


def _length(row: Row) -> int:
    """Tokens that the row has in the cache, or will have after prefill."""
    return len(row.tokens)
