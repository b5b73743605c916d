"""What teachers wrote, kept by all that was asked: a request that was answered once is not asked, nor paid, again.

One SQLite file that several processes may use. Each answer is there whole or not at all, so a kill loses what was
under way. An answer that is damaged is as good as none.
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
    """The kept answers, by `registry.core.digest.json_digest` of their request; from several threads where need be."""

    def __init__(self) -> None:
        self.path = home() / FILE
        self._lock = threading.Lock()
        try:
            self._file = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS completions (request TEXT PRIMARY KEY, answer BLOB)")
        except sqlite3.DatabaseError as error:
            raise BadInput(f"{self.path} cannot be used: {error}", fix="move it away to begin anew") from error

    def get(self, request: str) -> Any | None:
        """The answer to a request, or None where there is none that is whole."""
        with self._lock:
            row = self._file.execute("SELECT answer FROM completions WHERE request = ?", [request]).fetchone()
        try:
            return json.loads(zlib.decompress(row[0])) if row else None  # zlib's checksum tells damage
        except (zlib.error, ValueError, TypeError):
            return None

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers by their requests: all of them or, after a kill, none."""
        rows = [(request, zlib.compress(json.dumps(answer).encode())) for request, answer in answers.items()]
        with self._lock, self._file:
            self._file.executemany("INSERT OR REPLACE INTO completions VALUES (?, ?)", rows)

    @contextmanager
    def request_lock(self, request: str) -> Iterator[None]:
        """No other process or thread asks this within; look again whether it did before."""
        from filelock import FileLock

        path = home() / "locks" / "completions" / f"{request}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
            # Whoever waits for it looks for the answer first, and it is there by now.
            path.unlink(missing_ok=True)
