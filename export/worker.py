"""One thread that runs the model, and the way from asynchronous request handlers to it and back."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Job:
    """Work for the thread: what `start` yields goes to `results`, then None; an exception goes as it is."""

    start: Callable[[], Iterator[Any]]
    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def send(self, result: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the loop has ended: nobody listens any more
            self.cancelled = True


class Worker:
    """Runs generators one after another in a thread of its own; requests wait in the order they came.

    A slow reader holds nobody up: the thread goes on and the results wait in the reader's queue. A reader
    that leaves ends its job at the next result.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="limbeck-worker", daemon=True).start()

    async def results(self, start: Callable[[], Iterator[Any]]) -> AsyncGenerator[Any]:
        """What the generator that `start` makes yields in the thread; what it raises is raised here."""
        job = _Job(start, asyncio.get_running_loop())
        self._jobs.put(job)
        try:
            while (result := await job.results.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            job.cancelled = True

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if not job.cancelled:
                    for result in job.start():
                        if job.cancelled:
                            break
                        job.send(result)
            except Exception as error:  # whatever it is, the handler that waits must hear of it
                job.send(error)
            job.send(None)
