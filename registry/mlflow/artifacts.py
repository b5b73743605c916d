"""The files of versions: uploaded, downloaded, and verified against their digest."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from limbeck.registry.core.digest import verify_files
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.core.home import atomic_write, home, machine_lock
from limbeck.registry.mlflow import transfer
from limbeck.registry.mlflow.client import RetryingMlflowClient
from limbeck.registry.records import Version

LOCAL_FOLDER = re.compile(r".*/models/m-\w+/artifacts")  # of a LoggedModel


class Artifacts:
    """The files of the versions in a tracking store. Files of a server are cached in `home()/artifacts-cache`."""

    def __init__(self, client: RetryingMlflowClient) -> None:
        self._client = client

    def verified_folder(self, version: Version) -> Path:
        """The local folder of a version's files; from a server they are fetched once.

        Each call verifies the digest. Raises DamagedArtifact.
        """
        return self._verified(version.source, version.digest, version.ref)

    def is_local(self, version: Version) -> bool:
        """Whether the store keeps a version's files on this machine; False if they are fetched."""
        return _local_path(version.source) is not None

    def find_local_folder(self, version: Version) -> Path | None:
        """The folder of a version's files on this machine, not verified; None if they are not here."""
        path = _local_path(version.source) or _cached_folder(version.digest)
        is_expected = LOCAL_FOLDER.fullmatch(str(path)) or path.parent.name == "artifacts-cache"
        return path if is_expected and path.is_dir() else None

    def upload(self, folder: Path, uri: str, version: Version) -> None:
        """Send the files of a version to an artifact URI and read them back.

        Files that changed on the way are sent once more. Raises DamagedArtifact if they change again.
        """
        label = f"{version.name} {version.precision}"
        transfer.upload_folder(self._client, folder, uri, label)
        try:
            self._verified(uri, version.digest, label, is_upload=True)
        except DamagedArtifact:
            transfer.upload_folder(self._client, folder, uri, label, resend_all=True)
            self._verified(uri, version.digest, label, is_upload=True)

    def _verified(self, source: str, digest: str, label: str, *, is_upload: bool = False) -> Path:
        """The verified folder of the files at an artifact URI. After an upload the cache is not trusted."""
        path = _local_path(source)
        if path is not None:
            return _verified_local_folder(path, digest, label)
        cached = _cached_folder(digest)
        with machine_lock(f"fetch-{digest[:16]}"):
            if cached.exists() and not is_upload:
                try:
                    verify_files(cached, digest)
                    return cached
                except DamagedArtifact:  # fetch them again
                    shutil.rmtree(cached)
            self._fetch(source, digest, cached, f"reading {label} back" if is_upload else f"fetching {label}")
        return cached

    def _fetch(self, source: str, digest: str, target: Path, title: str) -> None:
        """Download the files at an artifact URI and verify them; only then they become the folder `target`."""
        with atomic_write(target) as part:
            temporary = part.with_suffix(".fetched")
            try:
                downloaded = transfer.download_folder(self._client, source, temporary, title)
                verify_files(downloaded, digest)
                downloaded.rename(part)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def _verified_local_folder(path: Path, digest: str, label: str) -> Path:
    if not LOCAL_FOLDER.fullmatch(str(path)):
        raise DamagedArtifact(label, [f"its source is {path}, which is not a folder that Limbeck writes"])
    if not path.is_dir():
        raise DamagedArtifact(label, [f"its files are gone from {path}"])
    verify_files(path, digest)
    return path


def _cached_folder(digest: str) -> Path:
    return home() / "artifacts-cache" / digest


def _local_path(uri: str) -> Path | None:
    """The path on this machine that an artifact URI means; None if the files are elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if not parts.scheme else None
