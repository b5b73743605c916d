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
from limbeck.export.server.watch import Artifact, WatchProblem

log = logging.getLogger("limbeck.serve")


@dataclass(frozen=True)
class LoadedArtifact:
    """An artifact in memory. A request takes one and keeps it to its end."""

    scheduler: Scheduler
    version: str  # NAME/VERSION, or a folder's name
    digest: str
    created: int  # when it was loaded, seconds since 1970
    template: ChatTemplate | None = None  # None where the model has none


class ServedModel:
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
        artifact: Artifact,
        load: Callable[[Path, str | None], Runtime],
        limits: Limits | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.name = name
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self._load = load
        self._current = self._start_scheduler(
            artifact, load(artifact.path, artifact.digest), ChatTemplate.read(artifact.path)
        )

    def current(self) -> LoadedArtifact:
        """What a new request takes."""
        return self._current

    async def swap_on_changes(self, artifacts: AsyncIterator[Artifact | WatchProblem]) -> None:
        """Serve each artifact that comes, in place of the one before, unless it cannot be loaded."""
        async for found in artifacts:
            if isinstance(found, WatchProblem):
                self._report_refused(found.name, found.message)
            else:
                await self.swap(found)

    async def swap(self, artifact: Artifact) -> None:
        """Serve `artifact` from now on; where it is damaged or cannot be loaded, go on as before and say so."""
        if artifact.digest == self._current.digest:
            old = self._current
            self._current = self._publish(artifact.name, old.scheduler, old.digest, old.template)
            return
        try:
            runtime = await asyncio.to_thread(self._load, artifact.path, artifact.digest)
            template = ChatTemplate.read(artifact.path)
        except Exception as error:  # whatever is wrong with it, what is served goes on
            self._report_refused(artifact.name, str(error))
            return
        log.warning("%s, digest %s, takes the place of %s", artifact.name, runtime.digest[:12], self._current.version)
        self._current = self._start_scheduler(artifact, runtime, template)
        self.metrics.model_swaps.inc()
        gc.collect()  # what the old one leaves in cycles is large

    def _report_refused(self, name: str | None, reason: str) -> None:
        if name is not None:
            self.metrics.models_refused.inc()
        log.error("%s: %s stays: %s", name or "no news", self._current.version, reason)

    def _start_scheduler(self, artifact: Artifact, runtime: Runtime, template: ChatTemplate | None) -> LoadedArtifact:
        scheduler = Scheduler(runtime, self.limits, self.metrics)
        self.metrics.models_loaded.inc()
        weakref.finalize(runtime, self.metrics.models_loaded.dec)
        return self._publish(artifact.name, scheduler, runtime.digest, template)

    def _publish(
        self, version: str, scheduler: Scheduler, digest: str, template: ChatTemplate | None
    ) -> LoadedArtifact:
        self.metrics.model_info.clear()
        self.metrics.model_info.labels(self.name, version, digest).set(1)
        return LoadedArtifact(scheduler, version, digest, int(time.time()), template)
