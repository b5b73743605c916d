"""Processes that die, on command: reads `{...}` lines on stdin, forks a child for each, answers with a line.

MLflow is imported once, here, and no database is opened before the fork: a child takes a tenth of a second.

    {"do": "promote" | "rollback" | "nothing", "to": 4, "home": DIR, "uri": URI,
     "die": 3, "kill": PID, "full": 3, "look": true, "at once": 20, "turns": 2}

`die`: kill -9 before the third call that changes something in MLflow. `kill`: that process instead, and go on.
`look`: say what there is, before.
`at once`: so many children, each with a home of its own below `home` where that ends with a slash.
`full`: from that call on the database gets no further page, as on a full disk.
The answer: for each child its exit status, what it printed, and how many such calls it made.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from sqlalchemy import Engine, event
from sqlalchemy.pool import Pool

from limbeck.registry.core.errors import LimbeckError
from limbeck.registry.gate import promotion
from limbeck.registry.ledger import log
from limbeck.registry.mlflow import client
from limbeck.registry.mlflow.store import Store
from tests.registry.conftest import POLICY

# Before the fork: what MLflow imports when it is first used.
for late in ("tracking", "model_registry"):
    import_module(f"mlflow.store.{late}.sqlalchemy_store")
    import_module(f"mlflow.store.{late}.rest_store")
FULL: list[bool] = []
CHANGES = ("set_", "delete_", "create_", "log_", "rename_", "update_")


class Dying:
    """MLflow's client, until the `die`-th call that changes something."""

    def __init__(self, uri: str, asked: dict[str, Any]) -> None:
        self.client, self.calls = MlflowClient(uri, uri), 0
        self.die, self.kill, self.full = (asked.get(key) for key in ("die", "kill", "full"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith(CHANGES):
            self.calls += 1
            if self.calls == self.die:
                os.kill(self.kill or os.getpid(), signal.SIGKILL)
            if self.calls == self.full:
                FULL.append(True)
        return getattr(self.client, name)


def child(asked: dict[str, Any], number: int) -> dict[str, Any]:
    """Do what is asked, and say what came of it."""
    home = asked["home"] + (str(number) if asked["home"].endswith("/") else "")
    os.environ.update(LIMBECK_HOME=home, MLFLOW_TRACKING_URI=asked["uri"])
    client.RETRY_SECONDS = 0.5
    said: dict[str, Any] = {"code": 0, "said": "", "hashes": []}
    store = Store()
    if asked.get("look"):
        said["before"] = look(store)
    dying = Dying(store.tracking_uri, asked)
    store.client.__dict__["_client"] = dying
    try:
        for turn in range(asked.get("turns", 1)):
            if asked["do"] == "rollback":
                said["hashes"].append(promotion.rollback(store, "still", "production", who=str(number)).hash)
            if asked["do"] == "promote":
                to = 3 + (turn + number) % 2 if "turns" in asked else asked["to"]
                done = promotion.promote(store, f"still/{to}", "production", POLICY, who=str(number))
                said["hashes"] += [done.entry.hash] if done.entry else []
    except LimbeckError as error:
        said |= {"code": error.exit_code, "said": error.message}
    calls = dying.calls
    FULL.clear()
    if number == 0:
        with suppress(LimbeckError):  # a server that is dead
            said |= look(Store())
    return said | {"calls": calls}


def look(store: Store) -> dict[str, Any]:
    """Where the alias is, and what the ledger says."""
    book = log.read_ledger(store, "still")
    entries = [[entry.hash, entry.to_version] for entry in book.entries]
    return {"at": book.aliases.get("production"), "problems": book.problems(), "entries": entries}


@event.listens_for(Engine, "connect")
def _no_waiting(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")  # as in tests/conftest.py


@event.listens_for(Pool, "checkout")
def _no_room(connection: Any, *_: Any) -> None:
    pages = connection.execute("PRAGMA page_count").fetchone()[0] if FULL else 2**30
    connection.execute(f"PRAGMA max_page_count={pages}")


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        count = asked.get("at once", 1)
        start, go = os.pipe()
        children = []
        for number in range(count):
            out = Path(f"{asked['home'].rstrip('/')}.said.{number}")
            out.unlink(missing_ok=True)
            if (pid := os.fork()) == 0:
                os.close(go)
                os.read(start, 1)  # returns at once for all, when the parent closes its end
                out.write_text(json.dumps(child(asked, number)))
                os._exit(0)
            children.append((pid, out))
        os.close(start)
        os.close(go)
        answers = []
        for pid, out in children:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answers.append({"status": status} | (json.loads(out.read_text()) if out.exists() else {}))
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
