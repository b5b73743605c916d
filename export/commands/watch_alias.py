"""The process beside a server that asks the registry, so that the server need not import MLflow."""

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
    """Print what `ref` means as a line of JSON: now, when it changes, and when it cannot be told.

    Ends when standard input does, that is with the server.
    """
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this too
    store: Store | None = None
    name, told = None, ""
    said: dict[str, Any] = {}
    while True:
        new = None
        try:
            if "@" in ref:
                store = store or Store()
                new = store.get(ref).ref
            if new is None or new != name:
                found = find_onnx_artifact(ref)
                said = {"path": str(found.path), "name": found.name, "digest": found.digest}
                name = new
        except Exception as error:  # a registry that is away comes back
            said = {"error": getattr(error, "message", str(error)), "fix": _fix(error), "name": new}
            store = name = None
        if (line := json.dumps(said)) != told:
            print(line, flush=True)
            told = line
        if select.select([sys.stdin], [], [], interval_s)[0]:
            return


def _fix(error: Exception) -> str | None:
    """What to do about an error; None if that is unknown."""
    if isinstance(error, ModuleNotFoundError):
        return install_command(error.name or "", "registry")
    return getattr(error, "fix", None)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
