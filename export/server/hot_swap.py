"""Hot swap: the served model gets a new artifact while requests run."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from limbeck.export.runtime.embeddings import Pooling
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.text.chat_template import ChatTemplate
from limbeck.export.runtime.text.constraint import GrammarCompiler
from limbeck.export.server.metrics import Metrics
from limbeck.export.server.requests import Limits
from limbeck.export.server.scheduler import Scheduler
from limbeck.export.server.watch import Artifact, WatchProblem

log = logging.getLogger("limbeck.serve")


@dataclass(frozen=True)
class LoadedArtifact:
    """An artifact in memory. A request keeps the one that it started with."""

    scheduler: Scheduler
    version: str  # NAME/VERSION, or a folder's name
    digest: str
    created: int  # time of loading, seconds since 1970
    template: ChatTemplate | None  # None if the model has none
    grammars: GrammarCompiler


class ServedModel:
    """The model that a server serves under `name`.

    New requests get the newest artifact. Running requests finish on the one that they started with, which is freed
    after the last of them; until then both are in memory.

    Args:
        name: the model's name in the API.
        artifact: the first artifact, loaded at once; errors of `load` are raised.
        load: loads an artifact from its folder and expected digest.
        limits: what clients may take; None: the defaults.
        metrics: where to count; None: new metrics.
        embeddings: how to pool embeddings; None: there are none. `load` must load the hidden states.
    """

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        load: Callable[[Path, str | None], Runtime],
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        embeddings: Pooling | None = None,
    ) -> None:
        self.name = name
        self.embeddings = embeddings
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self._load = load
        self._current = self._start_scheduler(
            artifact, load(artifact.path, artifact.digest), ChatTemplate.read(artifact.path)
        )

    def current(self) -> LoadedArtifact:
        """The artifact for a new request."""
        return self._current

    async def swap_on_changes(self, artifacts: AsyncIterator[Artifact | WatchProblem]) -> None:
        """Swap to each artifact of a watcher, and report its problems; does not end before `artifacts` does."""
        async for change in artifacts:
            if isinstance(change, WatchProblem):
                self._report_refused(change.name, change.message)
            else:
                await self.swap(change)

    async def swap(self, artifact: Artifact) -> None:
        """Serve `artifact` from now on; if it cannot be loaded, log why and keep the current one."""
        if artifact.digest == self._current.digest:
            old = self._current
            self._current = self._publish(artifact.name, old.scheduler, old.digest, old.template)
            return
        try:
            runtime = await asyncio.to_thread(self._load, artifact.path, artifact.digest)
            template = ChatTemplate.read(artifact.path)
        except Exception as error:  # whatever is wrong with it, keep serving
            self._report_refused(artifact.name, str(error))
            return
        log.warning("%s, digest %s, replaces %s", artifact.name, runtime.digest[:12], self._current.version)
        self._current = self._start_scheduler(artifact, runtime, template)
        self.metrics.model_swaps.inc()
        gc.collect()  # reference cycles of the old artifact hold much memory

    def _report_refused(self, name: str | None, reason: str) -> None:
        if name is not None:
            self.metrics.models_refused.inc()
        log.error("%s: %s is still served: %s", name or "no update", self._current.version, reason)

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
        runtime = scheduler.runtime
        grammars = GrammarCompiler(runtime.tokenizer, runtime.vocab_size, runtime.eos_token_ids)
        return LoadedArtifact(scheduler, version, digest, int(time.time()), template, grammars)
