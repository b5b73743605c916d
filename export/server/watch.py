"""Watch what to serve: an alias of the registry that moves, or a folder whose content is replaced.

A child process (limbeck.export.commands.watch_alias) reads the registry, so the server itself never imports MLflow.
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

from limbeck.export.bundle.layout import sbom_of_artifact
from limbeck.registry.core.digest import MANIFEST, read_manifest
from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.provenance.sbom import verify_sbom

RESTART_S = 5.0  # wait before a new child process


class Artifact(NamedTuple):
    """An artifact to serve."""

    path: Path
    name: str  # NAME/VERSION, or a folder's name
    digest: str | None = None  # the digest that the files must have; None: the one in their manifest


@dataclass(frozen=True)
class WatchProblem:
    """Why a change cannot be served."""

    message: str
    name: str | None  # of the artifact; None if the registry does not answer


class AliasWatcher:
    """Watches a name of the registry, NAME/VERSION or NAME@ALIAS; only an alias changes.

    Args:
        ref: NAME/VERSION or NAME@ALIAS.
        interval_s: seconds between two checks.
    """

    def __init__(self, ref: str, interval_s: float) -> None:
        self.ref, self.interval_s = ref, interval_s
        self._child: subprocess.Popen[str] | None = None

    def current_artifact(self) -> Artifact:
        """The artifact that the name points at now. Raises BadInput with the registry's error."""
        message = self._next_message()
        if message is None:
            self.close()
            raise BadInput(f"{self.ref}: the process that reads the registry ended without an answer")
        if "error" in message:
            self.close()
            raise BadInput(message["error"], fix=message["fix"])
        return _artifact_from_message(message)

    async def watch(self) -> AsyncIterator[Artifact | WatchProblem]:
        """Yield the artifact each time that the alias moves, and each problem. Ends at once without an alias."""
        try:
            while "@" in self.ref:
                message = await asyncio.to_thread(self._next_message)
                if message is None:
                    self.close()
                    yield WatchProblem(f"the process that watches {self.ref} ended; restarting it", None)
                    await asyncio.sleep(RESTART_S)
                elif "error" in message:
                    yield WatchProblem(message["error"], message["name"])
                else:
                    yield _artifact_from_message(message)
        finally:
            self.close()

    def close(self) -> None:
        """Kill the child process."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _next_message(self) -> dict[str, Any] | None:
        """The next message of the child process, started if necessary; None if it has ended."""
        if self._child is None:
            module = "limbeck.export.commands.watch_alias"
            command = [sys.executable, "-P", "-m", module, self.ref, str(self.interval_s)]
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        return json.loads(line) if line else None


class FolderWatcher:
    """Watches a bundle's or artifact's folder: at an interval, and at once on SIGHUP.

    Args:
        artifact: the artifact in the folder now.
        interval_s: seconds between two checks.
    """

    def __init__(self, artifact: Artifact, interval_s: float) -> None:
        self._artifact, self.interval_s = artifact, interval_s
        self._last_stamp = self._manifest_stamp()

    def current_artifact(self) -> Artifact:
        """The artifact in the folder at the start."""
        return self._artifact

    async def watch(self) -> AsyncIterator[Artifact | WatchProblem]:
        """Yield the artifact, or why it cannot be served, each time that its manifest changes or SIGHUP comes."""
        hangup = asyncio.Event()
        with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.set)
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hangup.wait(), self.interval_s)
            stamp, is_forced = self._manifest_stamp(), hangup.is_set()
            hangup.clear()
            if stamp and (is_forced or stamp != self._last_stamp):
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
        """Modification time and inode of the manifest; None while the folder is being replaced."""
        try:
            status = (self._artifact.path / MANIFEST).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def close(self) -> None:
        """Do nothing: there is no child process."""


def _artifact_from_message(message: dict[str, Any]) -> Artifact:
    return Artifact(Path(message["path"]), message["name"], message["digest"])
