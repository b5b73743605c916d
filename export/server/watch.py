"""Which artifact is to be served next: an alias of the registry as it moves, a bundle's folder as it is replaced.

The registry is asked by a child process (limbeck.export.commands.watch_alias): the server itself never imports MLflow.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.export.bundle.bundle import sbom_of_artifact
from limbeck.registry.core.digest import MANIFEST, read_manifest
from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.provenance.sbom import verify_sbom

RESTART_S = 5.0  # before a child that died is started again


class Artifact(NamedTuple):
    """Files to serve."""

    path: Path
    name: str  # NAME/VERSION, or a folder's name
    digest: str | None = None  # what the files must have; None: their manifest decides


@dataclass(frozen=True)
class WatchProblem:
    """Why what comes next cannot be served."""

    message: str
    name: str | None  # of the artifact; None where the registry does not answer


class AliasWatcher:
    """A name of the registry. Where it is NAME@ALIAS, a child process watches it."""

    def __init__(self, ref: str, interval_s: float) -> None:
        self.ref, self.interval_s = ref, interval_s
        self._child: subprocess.Popen[str] | None = None

    def current_artifact(self) -> Artifact:
        """What it means now. Raises BadInput with what the registry says."""
        said = self._next_message()
        if said is None or "error" in said:
            self.close()
            why: dict[str, Any] = said or {"error": f"{self.ref}: the registry was not asked", "fix": None}
            raise BadInput(why["error"], fix=why["fix"])
        return _artifact_from_message(said)

    async def watch(self) -> AsyncIterator[Artifact | WatchProblem]:
        """What it comes to mean, each time that it changes; and what goes wrong."""
        try:
            while "@" in self.ref:
                said = await asyncio.to_thread(self._next_message)
                if said is None:
                    self.close()
                    yield WatchProblem(f"the process that follows {self.ref} ended; another is started", None)
                    await asyncio.sleep(RESTART_S)
                elif "error" in said:
                    yield WatchProblem(said["error"], said["name"])
                else:
                    yield _artifact_from_message(said)
        finally:
            self.close()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _next_message(self) -> dict[str, Any] | None:
        """What the child says next; None where it has ended."""
        if self._child is None:
            command = [
                sys.executable,
                "-P",
                "-m",
                "limbeck.export.commands.watch_alias",
                self.ref,
                str(self.interval_s),
            ]
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        return json.loads(line) if line else None


class FolderWatcher:
    """A bundle or artifact folder: looked at every few seconds, and at once on SIGHUP."""

    def __init__(self, artifact: Artifact, interval_s: float) -> None:
        self._artifact, self.interval_s = artifact, interval_s
        self._last_stamp = self._manifest_stamp()

    def current_artifact(self) -> Artifact:
        """What is there now."""
        return self._artifact

    async def watch(self) -> AsyncIterator[Artifact | WatchProblem]:
        """What is there, each time that its manifest is a new one or SIGHUP comes."""
        asked = asyncio.Event()
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, asked.set)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), self.interval_s)
            stamp, again = self._manifest_stamp(), asked.is_set()
            asked.clear()
            if stamp and (again or stamp != self._last_stamp):
                self._last_stamp = stamp
                yield self._read_artifact()

    def _read_artifact(self) -> Artifact | WatchProblem:
        try:
            manifest = read_manifest(self._artifact.path)
            verify_sbom(sbom_of_artifact(self._artifact.path), str(manifest.get("digest")), self._artifact.name)
        except LimbeckError as error:
            return WatchProblem(error.message, self._artifact.name)
        return Artifact(self._artifact.path, str(manifest.get("model") or self._artifact.name), manifest.get("digest"))

    def _manifest_stamp(self) -> tuple[int, int] | None:
        try:
            found = (self._artifact.path / MANIFEST).stat()
        except OSError:  # it is being replaced
            return None
        return found.st_mtime_ns, found.st_ino

    def close(self) -> None:
        """Nothing to end."""


def _artifact_from_message(said: dict[str, Any]) -> Artifact:
    return Artifact(Path(said["path"]), said["name"], said["digest"])
