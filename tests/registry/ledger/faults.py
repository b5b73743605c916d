"""Processes that are killed on command: reads one JSON object a line, forks a child for it, prints one line of JSON.

MLflow is imported once, before the forks, and no database is opened there: a child takes a tenth of a second.

    {"do": "promote" | "rollback" | "nothing", "to": 4, "home": DIR, "uri": URI,
     "die": 3, "kill": PID, "full": 3, "look": true, "at once": 20, "turns": 2}

`die`: kill -9 itself before the third call that changes something in MLflow. `kill`: kill that process instead.
`look`: report the ledger before it begins.
`at once`: the number of children; each has a state folder of its own below `home` if that ends with a slash.
`full`: the number of the call from which on the database gets no further page, as on a full disk.
The answer: for each child its exit status, its error message, and the number of calls that change something.
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

# MLflow imports these at its first use; import them before the fork.
for late in ("tracking", "model_registry"):
    import_module(f"mlflow.store.{late}.sqlalchemy_store")
    import_module(f"mlflow.store.{late}.rest_store")
FULL: list[bool] = []
CHANGES = ("set_", "delete_", "create_", "log_", "rename_", "update_")


class FaultyClient:
    """MLflow's client until the `die`-th call that changes something, or with a full disk from the `full`-th."""

    def __init__(self, uri: str, command: dict[str, Any]) -> None:
        self.client, self.calls = MlflowClient(uri, uri), 0
        self.die, self.kill, self.full = (command.get(key) for key in ("die", "kill", "full"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith(CHANGES):
            self.calls += 1
            if self.calls == self.die:
                os.kill(self.kill or os.getpid(), signal.SIGKILL)
            if self.calls == self.full:
                FULL.append(True)
        return getattr(self.client, name)


def run_command(command: dict[str, Any], number: int) -> dict[str, Any]:
    """Run a command in a child. Returns its answer."""
    home = command["home"] + (str(number) if command["home"].endswith("/") else "")
    os.environ.update(LIMBECK_HOME=home, MLFLOW_TRACKING_URI=command["uri"])
    client.RETRY_SECONDS = 0.5
    answer: dict[str, Any] = {"code": 0, "message": "", "hashes": []}
    store = Store()
    if command.get("look"):
        answer["before"] = describe_ledger(store)
    faulty = FaultyClient(store.tracking_uri, command)
    store.client.__dict__["_client"] = faulty
    try:
        for turn in range(command.get("turns", 1)):
            if command["do"] == "rollback":
                answer["hashes"].append(promotion.rollback(store, "still", "production", who=str(number)).hash)
            if command["do"] == "promote":
                to = 3 + (turn + number) % 2 if "turns" in command else command["to"]
                done = promotion.promote(store, f"still/{to}", "production", POLICY, who=str(number))
                answer["hashes"] += [done.entry.hash] if done.entry else []
    except LimbeckError as error:
        answer |= {"code": error.exit_code, "message": error.message}
    calls = faulty.calls
    FULL.clear()
    if number == 0:
        with suppress(LimbeckError):  # a server that is dead
            answer |= describe_ledger(Store())
    return answer | {"calls": calls}


def describe_ledger(store: Store) -> dict[str, Any]:
    """The position of the alias, and the entries and problems of the ledger."""
    ledger = log.read_ledger(store, "still")
    entries = [[entry.hash, entry.to_version] for entry in ledger.entries]
    return {"at": ledger.aliases.get("production"), "problems": ledger.problems(), "entries": entries}


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
        command = json.loads(line)
        count = command.get("at once", 1)
        start, go = os.pipe()
        children = []
        for number in range(count):
            out = Path(f"{command['home'].rstrip('/')}.answer.{number}")
            out.unlink(missing_ok=True)
            if (pid := os.fork()) == 0:
                os.close(go)
                os.read(start, 1)  # all children continue when the parent closes its end
                out.write_text(json.dumps(run_command(command, number)))
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
