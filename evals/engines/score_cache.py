"""What a model said to each request, kept so that no request is run twice. SQLite; one file for each artifact.

The file is named by the artifact's digest, so a second model never sees the first one's answers. Processes may
share it. Each answer is written in a transaction of its own as soon as it is there: a run that is killed goes on
from the last one. Int8 ONNX models scale activations by batch, so what they answer depends slightly on what else
was in the batch: kept answers are those of the batches they were first run in.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home
from limbeck.registry.core.terminal import print_status

WAIT_S = 60  # for another process that writes
TABLE = "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB, checksum BLOB) WITHOUT ROWID"


class ScoreCache:
    """The answers of one artifact.

    Args:
        digest: the artifact's.
        anew: what was kept before is not given back, but replaced as new answers come.
    """

    def __init__(self, digest: str, *, overwrite: bool = False) -> None:
        self.path = home() / "scores" / f"{digest}.sqlite"
        self._overwrite = overwrite
        self._written: set[bytes] = set()
        self._database = self._open()

    def get(self, key: bytes) -> Any | None:
        """The answer to a request; None where there is none, or one that is damaged."""
        if self._overwrite and key not in self._written:
            return None
        rows = self._run("SELECT value, checksum FROM answers WHERE key = ?", key)
        value, checksum = rows[0] if rows else (b"", None)
        return json.loads(value) if checksum == _checksum(key, value) else None

    def put(self, key: bytes, value: Any) -> None:
        """Keep a JSON-able answer; numbers come back exactly."""
        data = json.dumps(value).encode()
        self._run("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", key, data, _checksum(key, data))
        self._written.add(key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._database.close()

    def _run(self, statement: str, *values: Any) -> list[Any]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:  # a full disk, a folder that cannot be written, a lock that stays
            raise BadInput(f"scores cannot be kept in {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._database.close()
            self._delete_damaged(error)
            self._database = self._open()
            return self._database.execute(statement, values).fetchall()

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _connect(self.path)
        except sqlite3.OperationalError as error:
            raise BadInput(f"scores cannot be kept in {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._delete_damaged(error)
            return _connect(self.path)

    def _delete_damaged(self, error: Exception) -> None:
        print_status(f"{self.path} is damaged ({error}): its scores are computed again")
        for suffix in ("-wal", "-shm", ""):  # the journal first: a new file must not read an old one
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)


def request_key(*parts: Any) -> bytes:
    """The key of a request, over all that its answer depends on; JSON-able values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def _checksum(key: bytes, data: Any) -> bytes:
    return hashlib.sha256(key + data).digest() if isinstance(data, bytes) else b""


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
    try:
        # A write is then safe from a kill of the process without a wait for the disk.
        with closing(database.execute("PRAGMA journal_mode = WAL")):
            database.execute("PRAGMA synchronous = NORMAL")
        database.execute(TABLE)
    except sqlite3.Error:
        database.close()
        raise
    return database
