"""A backup of a workspace: one tar file with its database, the files of its versions and runs, and its scores.

The database is copied first: Limbeck writes files before the record that names them, so the files copied afterwards
include all that the records name. The last member is a list of SHA-256 digests; nothing is restored that differs from
it. Caches are left out: they are made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.registry.core.digest import file_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, redact_urls
from limbeck.registry.core.home import atomic_write, home, tracking_uri
from limbeck.registry.mlflow.client import sqlite_file
from limbeck.registry.mlflow.layout import LAYOUT, check_layout_number
from limbeck.registry.mlflow.transfer import transfer_progress

DATABASE = "mlflow.db"
FOLDERS = ("artifacts", "scorecards", "scorecards-local", "reports")
MANIFEST = "backup.json"
FORMAT = 1


@dataclass(frozen=True)
class Backup:
    """What a backup holds."""

    file: Path
    files: int
    bytes: int
    digest: str  # hex SHA-256 of its list of digests

    def json(self) -> dict[str, Any]:
        """`{file, files, bytes, digest}`."""
        return {"file": str(self.file), "files": self.files, "bytes": self.bytes, "digest": self.digest}


def back_up(file: Path) -> Backup:
    """Write a backup of the workspace; other commands may run meanwhile.

    Raises BadInput if there is no workspace, or if the file exists or cannot be written.
    """
    source = _database_of_workspace()
    if file.exists():
        raise BadInput(f"{file} exists", fix="name another file: a backup never replaces one")
    digests: dict[str, str] = {}
    size = 0
    try:
        with atomic_write(file.absolute()) as part, TemporaryDirectory() as temporary:
            copy = Path(temporary) / DATABASE
            with closing(sqlite3.connect(source)) as database, closing(sqlite3.connect(copy)) as target:
                database.backup(target)
            members = {DATABASE: copy} | dict(_files())
            total = sum(path.stat().st_size for path in members.values())
            with tarfile.open(part, "w") as tar, transfer_progress("backing up", total, lambda: size):
                for name, path in members.items():
                    digests[name] = _add(tar, name, path)
                    size += path.stat().st_size
                content = json.dumps({"format": FORMAT, "layout": LAYOUT, "files": digests}, indent=1).encode()
                member = tarfile.TarInfo(MANIFEST)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    except OSError as error:  # also a file that was deleted meanwhile
        raise BadInput(f"the backup {file} cannot be written: {error}", fix="mend that, and run again") from None
    return Backup(file, len(digests), size, hashlib.sha256(content).hexdigest())


def restore(file: Path) -> Backup:
    """Make the workspace from a backup. All files are verified before any is put into its place.

    Raises:
        BadInput: there is a workspace already, the file is no backup, or a newer Limbeck wrote it.
        DamagedArtifact: the files differ from their digests.
    """
    if not file.is_file():
        raise BadInput(f"{file}: no such file")
    _require_local()
    target = home()
    if taken := [name for name in (DATABASE, *FOLDERS) if (target / name).exists()]:
        raise BadInput(
            f"{target} has a workspace already: {', '.join(taken)}",
            fix="move it away, or set LIMBECK_HOME to another folder, and run again",
        )
    with TemporaryDirectory(dir=target, prefix=".restore-") as temporary:
        folder = Path(temporary)
        digest = _extract_verified(file, folder)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        for name in (*FOLDERS, DATABASE):  # the database last: what can be seen is complete
            if (folder / name).exists():
                (folder / name).rename(target / name)
    return Backup(file, len(sizes), sum(sizes), digest)


def _require_local() -> Path:
    """The database of the workspace, which may not exist. Raises BadInput for a tracking server."""
    file = sqlite_file(tracking_uri())
    if file is None or file.parent != home():
        raise BadInput(
            f"{redact_urls(tracking_uri())} is not a workspace on this machine",
            fix="back up a server with its own tools, see docs/team.md, or unset MLFLOW_TRACKING_URI",
        )
    return file


def _database_of_workspace() -> Path:
    file = _require_local()
    if not file.exists():
        raise BadInput(f"there is no workspace in {home()}", fix="set LIMBECK_HOME to the folder of one")
    return file


def _files() -> Iterator[tuple[str, Path]]:
    """Name in the backup -> file, of all folders; without files that are being written."""
    for folder in FOLDERS:
        for path in sorted((home() / folder).rglob("*")):
            if path.is_file() and not any(part.endswith(".part") for part in path.parts):
                yield path.relative_to(home()).as_posix(), path


def _add(tar: tarfile.TarFile, name: str, path: Path) -> str:
    """Add a file to the tar; returns the digest of what was added."""
    with open(path, "rb") as source:
        member = tarfile.TarInfo(name)
        member.size, member.mtime = path.stat().st_size, int(path.stat().st_mtime)
        reader = _DigestingReader(source)
        tar.addfile(member, reader)  # type: ignore[arg-type]
    return reader.sha256.hexdigest()


class _DigestingReader:
    """A file that computes the digest of what is read."""

    def __init__(self, source: io.BufferedReader) -> None:
        self._source = source
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        content = self._source.read(size)
        self.sha256.update(content)
        return content


def _extract_verified(file: Path, folder: Path) -> str:
    """Extract a backup and compare every file with its digest. Returns the digest of the list."""
    try:
        with tarfile.open(file) as tar:
            tar.extractall(folder, filter="data")  # nothing lands outside of the folder
        content = (folder / MANIFEST).read_bytes()
        manifest = json.loads(content)
        recorded: dict[str, str] = manifest["files"]
        written_under = (int(manifest["format"]), str(manifest["layout"]))
    except (tarfile.TarError, FileNotFoundError, ValueError, TypeError, KeyError, EOFError) as error:
        reason = str(error) or type(error).__name__
        raise BadInput(f"{file} is not a complete backup of Limbeck: {reason}", fix="use another backup") from None
    if written_under[0] > FORMAT:
        raise BadInput(f"{file} was written by a newer Limbeck", fix="update Limbeck and run again")
    check_layout_number(written_under[1], str(file))
    (folder / MANIFEST).unlink()
    actual = {p.relative_to(folder).as_posix(): file_digest(p) for p in folder.rglob("*") if p.is_file()}
    problems = [f"{name} differs" for name in sorted(recorded) if name in actual and actual[name] != recorded[name]]
    problems += [f"{name} is missing" for name in sorted(recorded.keys() - actual.keys())]
    problems += [f"{name} was added" for name in sorted(actual.keys() - recorded.keys())]
    if problems:
        raise DamagedArtifact(file, problems[:5] + [f"and {len(problems) - 5} more"] * (len(problems) > 5))
    for extra in folder.iterdir():
        if extra.name not in (DATABASE, *FOLDERS):
            shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    return hashlib.sha256(content).hexdigest()
