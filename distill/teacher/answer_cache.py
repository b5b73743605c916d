"""Stores teachers' answers by their requests, so that no request is sent, or paid, twice.

One SQLite file, which several processes may use. An answer is stored whole or not at all, so a kill loses only
requests in flight. A damaged answer counts as missing.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home

FILE = "completions.db"


class AnswerCache:
    """Stored answers, by `limbeck.registry.core.digest.json_digest` of their request. Thread-safe."""

    def __init__(self) -> None:
        self.path = home() / FILE
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS completions (request TEXT PRIMARY KEY, answer BLOB)")
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{self.path} cannot be used: {error}", fix="move it away to start a new one") from error

    def get(self, request: str) -> Any | None:
        """The answer to a request; None if it is missing or damaged."""
        with self._lock:
            row = self._file.execute("SELECT answer FROM completions WHERE request = ?", [request]).fetchone()
        try:
            return json.loads(zlib.decompress(row[0])) if row else None  # zlib's checksum detects damage
        except (zlib.error, ValueError, TypeError):
            return None

    def add(self, answers: Mapping[str, Any]) -> None:
        """Store answers by their requests: all of them or, after a kill, none."""
        rows = [(request, zlib.compress(json.dumps(answer).encode())) for request, answer in answers.items()]
        with self._lock, self._file:
            self._file.executemany("INSERT OR REPLACE INTO completions VALUES (?, ?)", rows)

    @contextmanager
    def request_lock(self, request: str) -> Iterator[None]:
        """Hold the lock of a request, so that no other process or thread sends it.

        Look for the answer again within: another one may have stored it while this one waited.
        """
        from filelock import FileLock

        path = home() / "locks" / "completions" / f"{request}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
            # Safe to remove: a process that waits for the lock looks for the answer first, and finds it.
            path.unlink(missing_ok=True)
