"""Caches a model's answers to requests, so that no request runs twice: SQLite, one file for each artifact.

The artifact's digest names the file, so no model sees the answers of another. Processes may share a file. Each answer
is written in a transaction of its own as soon as it is known: a run that is killed resumes after the last one. Int8
ONNX models scale activations by batch, so their answers depend slightly on the rest of the batch: cached answers are
those of the batches in which they ran first.
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

LOCK_TIMEOUT_S = 60  # while another process writes
TABLE = "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, value BLOB, checksum BLOB) WITHOUT ROWID"


class ScoreCache:
    """The cached answers of one artifact.

    Args:
        digest: of the artifact.
        overwrite: ignore earlier answers, and replace them as new ones come.
    """

    def __init__(self, digest: str, *, overwrite: bool = False) -> None:
        self.path = home() / "scores" / f"{digest}.sqlite"
        self._overwrite = overwrite
        self._written: set[bytes] = set()
        self._database = self._open()

    def get(self, key: bytes) -> Any | None:
        """The answer to a request; None if there is none or it is damaged."""
        if self._overwrite and key not in self._written:
            return None
        rows = self._run("SELECT value, checksum FROM answers WHERE key = ?", key)
        if not rows:
            return None
        value, checksum = rows[0]
        return json.loads(value) if checksum == _checksum(key, value) else None

    def put(self, key: bytes, value: Any) -> None:
        """Store an answer that JSON can hold; `get` returns its numbers exactly."""
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
        except (
            sqlite3.OperationalError
        ) as error:  # a full disk, a folder without write permission, a lock that is not released
            raise BadInput(f"scores cannot be stored in {self.path}: {error}") from error
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
            raise BadInput(f"scores cannot be stored in {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            self._delete_damaged(error)
            return _connect(self.path)

    def _delete_damaged(self, error: Exception) -> None:
        print_status(f"{self.path} is damaged ({error}): its scores are computed again")
        for suffix in (
            "-wal",
            "-shm",
            "",
        ):  # the write-ahead log first: a new file must not read the log of the old one
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)


def request_key(*parts: Any) -> bytes:
    """The key of a request: a hash of all values that its answer depends on, each one that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def _checksum(key: bytes, data: Any) -> bytes:
    return hashlib.sha256(key + data).digest() if isinstance(data, bytes) else b""


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
    try:
        # With a write-ahead log a killed process loses no answer, and no write waits for the disk.
        with closing(database.execute("PRAGMA journal_mode = WAL")):
            database.execute("PRAGMA synchronous = NORMAL")
        database.execute(TABLE)
    except sqlite3.Error:
        database.close()
        raise
    return database
