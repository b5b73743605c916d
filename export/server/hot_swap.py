"""What a server serves under one name: the newest artifact that could be loaded, and how another takes its place."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from limbeck.export.runtime.chat_template import ChatTemplate
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.server.metrics import Metrics
from limbeck.export.server.requests import Limits
from limbeck.export.server.scheduler import Scheduler
from limbeck.export.server.watch import Artifact, Problem

log = logging.getLogger("limbeck.serve")


@dataclass(frozen=True)
class Loaded:
    """An artifact in memory. A request takes one and keeps it to its end."""

    scheduler: Scheduler
    version: str  # NAME/VERSION, or a folder's name
    digest: str
    created: int  # when it was loaded, seconds since 1970
    template: ChatTemplate | None = None  # None where the model has none


class Served:
    """The model that a server serves under `name`.

    New requests go to the newest artifact; those that run end on the one they began with, which is freed then. Until
    then both are in memory.

    Args:
        load: an artifact's folder and digest to a `Runtime`; raises what is wrong with it.
        first: what is loaded now; what is wrong with it is raised.
    """

    def __init__(
        self,
        name: str,
        first: Artifact,
        load: Callable[[Path, str | None], Runtime],
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self._load = load
        self._current = self._take(first, load(first.path, first.digest), ChatTemplate.read(first.path))

    def current(self) -> Loaded:
        """What a new request takes."""
        return self._current

    async def follow(self, artifacts: AsyncIterator[Artifact | Problem]) -> None:
        """Serve each artifact that comes, in place of the one before, unless it cannot be loaded."""
        async for found in artifacts:
            if isinstance(found, Problem):
                self._refuse(found.name, found.message)
            else:
                await self.swap(found)

    async def swap(self, found: Artifact) -> None:
        """Serve `found` from now on; where it is damaged or cannot be loaded, go on as before and say so."""
        if found.digest == self._current.digest:
            old = self._current
            self._current = self._show(found.name, old.scheduler, old.digest, old.template)
            return
        try:
            runtime = await asyncio.to_thread(self._load, found.path, found.digest)
            template = ChatTemplate.read(found.path)
        except Exception as error:  # whatever is wrong with it, what is served goes on
            self._refuse(found.name, str(error))
            return
        log.warning("%s, digest %s, takes the place of %s", found.name, runtime.digest[:12], self._current.version)
        self._current = self._take(found, runtime, template)
        self.metrics.swaps.inc()
        gc.collect()  # what the old one leaves in cycles is large

    def _refuse(self, name: str | None, why: str) -> None:
        if name is not None:
            self.metrics.refused.inc()
        log.error("%s: %s stays: %s", name or "no news", self._current.version, why)

    def _take(self, found: Artifact, runtime: Runtime, template: ChatTemplate | None) -> Loaded:
        scheduler = Scheduler(runtime, self.limits, self.metrics)
        self.metrics.loaded.inc()
        weakref.finalize(runtime, self.metrics.loaded.dec)
        return self._show(found.name, scheduler, runtime.digest, template)

    def _show(self, version: str, scheduler: Scheduler, digest: str, template: ChatTemplate | None) -> Loaded:
        self.metrics.model.clear()
        self.metrics.model.labels(self.name, version, digest).set(1)
        return Loaded(scheduler, version, digest, int(time.time()), template)
