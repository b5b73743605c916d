"""Uploads and downloads of whole folders, with progress; an upload that was killed resumes.

The files of a killed upload stay with its LoggedModel, which no list of versions shows. Registering the same version
again finds that LoggedModel and sends only the files that are missing.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.registry.core.terminal import format_bytes, print_status
from limbeck.registry.mlflow.client import NotFound, RetryingMlflowClient
from limbeck.registry.mlflow.layout import DIGEST_TAG, EXPERIMENT
from limbeck.registry.mlflow.versions import TAG_PREFIX
from limbeck.registry.records import Version

LARGE = 50_000_000  # bytes; a larger transfer prints a line if there is no progress bar
NAME_TAG = TAG_PREFIX + "name"  # of a LoggedModel: the registered model
# The fields of a version that make an upload the same one.
SAME_UPLOAD_TAGS = tuple(TAG_PREFIX + field for field in ("name", "digest", "parent", "recipe", "recipe_digest"))
ABANDONED_AFTER = timedelta(days=1)
PROGRESS_SECONDS = 0.3


def begin_upload(client: RetryingMlflowClient, experiment: str, version: Version, tags: Mapping[str, str]) -> Any:
    """The LoggedModel that a version's files go to: that of an unfinished upload of the same version, else a new one.

    Args:
        experiment: the id of its experiment.
        tags: `limbeck.*` of the future version.
    """
    tags = {**tags, NAME_TAG: version.name}
    same = {key: tags.get(key) for key in SAME_UPLOAD_TAGS}
    filter_string = f"tags.`{DIGEST_TAG}` = '{version.digest}' AND tags.`{NAME_TAG}` = '{version.name}'"
    for found in client.search_logged_models(experiment_ids=[experiment], filter_string=filter_string):
        if {key: found.tags.get(key) for key in same} == same:
            return found
    return client.create_logged_model(
        experiment,
        name=re.sub(r"[^\w-]", "_", version.name),
        source_run_id=version.run_id,
        tags=tags,
        model_type=version.kind,
    )


def upload_folder(client: RetryingMlflowClient, folder: Path, uri: str, label: str, *, resend_all: bool = False) -> int:
    """Upload the files of a folder to an artifact URI, except those that are there with the same size.

    Args:
        label: whose files they are, for the user.
        resend_all: upload all files.

    Returns:
        The number of files uploaded.
    """
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    stored = {} if resend_all else client.file_sizes(uri)
    missing = {name: path for name, path in files.items() if stored.get(name) != path.stat().st_size}
    sizes = {name: path.stat().st_size for name, path in missing.items()}
    if len(missing) < len(files):
        print_status(f"{label}: {len(files) - len(missing)} of {len(files)} files are there already")
    sent = 0
    current: list[Path] = []
    with transfer_progress(f"sending {label}", sum(sizes.values()), lambda: sent + sum(map(_bytes_read, current))):
        for name, path in missing.items():
            current[:] = [path]
            client.upload_file(path, uri, os.path.dirname(name) or None)
            current.clear()
            sent += sizes[name]
    return len(missing)


def download_folder(client: RetryingMlflowClient, uri: str, folder: Path, label: str) -> Path:
    """Download the files below an artifact URI into the folder `folder`. Returns the folder they are in."""
    size = sum(client.file_sizes(uri).values())
    with transfer_progress(label, size, lambda: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())):
        return client.download(uri, folder)


class UnfinishedUpload(NamedTuple):
    """An upload that never became a version, or whose version was deleted."""

    model_id: str
    uri: str
    name: str  # of the registered model
    started_at: datetime
    size: int  # bytes
    is_complete: bool  # a version had it


def unfinished_uploads(client: RetryingMlflowClient, registered: Set[str]) -> list[UnfinishedUpload]:
    """The uploads that no command resumed for a day, oldest first.

    Args:
        registered: the ids of the LoggedModels that are versions.
    """
    found = [model for model in uploads(client) if model.model_id not in registered]
    last_moment = datetime.now(UTC) - ABANDONED_AFTER
    abandoned = [model for model in found if _to_datetime(model.last_updated_timestamp) < last_moment]
    unfinished = [
        UnfinishedUpload(
            model.model_id,
            model.artifact_location,
            model.tags.get(NAME_TAG, model.name),
            _to_datetime(model.creation_timestamp),
            sum(client.file_sizes(model.artifact_location).values()),
            str(model.status) == "READY",
        )
        for model in abandoned
    ]
    return sorted(unfinished, key=lambda upload: upload.started_at)


def uploads(client: RetryingMlflowClient) -> Iterator[Any]:
    """The LoggedModels that Limbeck made: the files of versions, and unfinished uploads."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    token = None
    while experiment is not None:
        page = client.search_logged_models(experiment_ids=[experiment.experiment_id], page_token=token)
        yield from (model for model in page if DIGEST_TAG in model.tags)
        token = page.token
        if not token:
            return


def discard_upload(client: RetryingMlflowClient, model_id: str, uri: str) -> None:
    """Delete a LoggedModel that became no version, and its files.

    Raises Forbidden if a server does not let this user delete.
    """
    folder = uri.removesuffix("/artifacts")
    if folder.endswith(f"/{model_id}"):
        with suppress(FileNotFoundError, NotFound):
            client.delete_files(folder)  # before MLflow writes anything, as the disk may be full
    client.delete_logged_model(model_id)


def _to_datetime(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


@contextmanager
def transfer_progress(label: str, size: int, bytes_done: Callable[[], int]) -> Iterator[None]:
    """Show a progress bar of bytes with rate and time left while the block runs.

    Without a terminal, a large transfer prints one line instead.

    Args:
        size: bytes in total.
        bytes_done: returns the bytes so far; called every 0.3 s.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        if size >= LARGE:
            print_status(f"{label} ({format_bytes(size)})")
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    over = threading.Event()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=size)

        def watch() -> None:
            while not over.wait(PROGRESS_SECONDS):
                with suppress(OSError):
                    bar.update(task, completed=bytes_done())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _bytes_read(path: Path) -> int:
    """The bytes that this process has read of an open file; MLflow does not report them. 0 if Linux does not either."""
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError, ValueError):
                if os.readlink(f"/proc/self/fd/{number}") == str(path.resolve()):
                    return int(Path(f"/proc/self/fdinfo/{number}").read_text().split()[1])
    return 0
