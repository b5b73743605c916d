"""A child process of the server that polls the registry, so that the server need not import MLflow."""

from __future__ import annotations

import json
import select
import signal
import sys
from typing import Any

from limbeck.export.commands.locate import find_onnx_artifact
from limbeck.registry.core.extras import install_command
from limbeck.registry.core.terminal import quiet_libraries
from limbeck.registry.mlflow.store import Store


def main(ref: str, interval_s: float) -> None:
    """Print the artifact that `ref` names as a line of JSON: at start, and whenever it or its error changes.

    A line has the keys path, name, digest, or error, fix, name. Ends when standard input closes, that is when the
    server exits.
    """
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process too
    poller = _Poller(ref)
    last_line = ""
    while True:
        line = json.dumps(poller.poll())
        if line != last_line:
            print(line, flush=True)
            last_line = line
        if select.select([sys.stdin], [], [], interval_s)[0]:
            return


class _Poller:
    """Resolves one reference again and again; finds the artifact only if the version changed."""

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self._store: Store | None = None
        self._version_ref: str | None = None  # the version that `_message` is about
        self._message: dict[str, Any] = {}

    def poll(self) -> dict[str, Any]:
        """Return the current message: an artifact, or why there is none."""
        version_ref = None
        try:
            if "@" in self.ref:
                self._store = self._store or Store()
                version_ref = self._store.get(self.ref).ref
            if version_ref is None or version_ref != self._version_ref:
                found = find_onnx_artifact(self.ref)
                self._message = {"path": str(found.path), "name": found.name, "digest": found.digest}
                self._version_ref = version_ref
        except Exception as error:  # the registry may be away for a while
            message = getattr(error, "message", str(error))
            self._message = {"error": message, "fix": _fix_of_error(error), "name": version_ref}
            self._store = self._version_ref = None
        return self._message


def _fix_of_error(error: Exception) -> str | None:
    """Return what the user can do about an error; None if that is unknown."""
    if isinstance(error, ModuleNotFoundError):
        return install_command(error.name or "", "registry")
    return getattr(error, "fix", None)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
