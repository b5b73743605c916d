"""Files on their way to a tracking server and back: told as they go, and gone on with where they were stopped.

What a killed upload has brought stays with its LoggedModel, which nobody sees: a version of it comes last. The same
registration finds that LoggedModel again and sends what is missing.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.registry.core.terminal import format_bytes, print_status
from limbeck.registry.mlflow.client import NotFound, RetryingMlflowClient
from limbeck.registry.records import Version

LARGE = 50_000_000  # bytes that are told of where there is no progress bar
SAME_UPLOAD_FIELDS = (
    "name",
    "digest",
    "parent",
    "recipe",
    "recipe_digest",
)  # of a version: what makes it the same upload
ABANDONED_AFTER = timedelta(days=1)  # an upload that nobody goes on with


def begin_upload(client: RetryingMlflowClient, experiment: str, version: Version, tags: Mapping[str, str]) -> Any:
    """The LoggedModel that a version's files go to: one that was begun for the very same version, else a new one.

    Args:
        experiment: the id of the experiment that it is in.
        tags: `limbeck.*` of the version to be.
    """
    tags = {**tags, "limbeck.name": version.name}
    same = {key: tags.get(key) for key in (f"limbeck.{field}" for field in SAME_UPLOAD_FIELDS)}
    asked = f"tags.`limbeck.digest` = '{version.digest}' AND tags.`limbeck.name` = '{version.name}'"
    for found in client.search_logged_models(experiment_ids=[experiment], filter_string=asked):
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
    """Bring the files of a folder to an artifact URI, less those that are there in their size.

    Args:
        label: that the files are of, for the user.
        resend_all: all of them, whatever is there.

    Returns:
        The number of files that were sent.
    """
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    there = {} if resend_all else client.file_sizes(uri)
    missing = {name: path for name, path in files.items() if there.get(name) != path.stat().st_size}
    sizes = {name: path.stat().st_size for name, path in missing.items()}
    if len(missing) < len(files):
        print_status(f"{label}: {len(files) - len(missing)} of {len(files)} files are there already")
    sent = 0
    reading: list[Path] = []
    with transfer_progress(f"sending {label}", sum(sizes.values()), lambda: sent + sum(map(_bytes_read, reading))):
        for name, path in missing.items():
            reading[:] = [path]
            client.upload_file(path, uri, os.path.dirname(name) or None)
            reading.clear()
            sent += sizes[name]
    return len(missing)


def download_folder(client: RetryingMlflowClient, uri: str, folder: Path, label: str) -> Path:
    """Fetch the files below an artifact URI into the folder `folder`. Returns where they lie."""
    size = sum(client.file_sizes(uri).values())
    with transfer_progress(label, size, lambda: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())):
        return client.download(uri, folder)


class UnfinishedUpload(NamedTuple):
    """An upload that was begun and never became a version."""

    model_id: str
    uri: str
    name: str  # of the registered model
    started_at: datetime
    size: int  # bytes


def unfinished_uploads(
    client: RetryingMlflowClient, experiments: list[str], registered: set[str]
) -> list[UnfinishedUpload]:
    """The uploads that nobody went on with for a day, oldest first.

    Args:
        experiments: ids of those to look in.
        registered: the ids of the LoggedModels that are versions.
    """
    found: list[Any] = []
    token = None
    while experiments:
        page = client.search_logged_models(experiment_ids=experiments, page_token=token)
        found += [m for m in page if "limbeck.digest" in m.tags and m.model_id not in registered]
        token = page.token
        if not token:
            break
    late = [m for m in found if _when(m.last_updated_timestamp) < datetime.now(UTC) - ABANDONED_AFTER]
    return sorted(
        (
            UnfinishedUpload(
                m.model_id,
                m.artifact_location,
                m.tags.get("limbeck.name", m.name),
                _when(m.creation_timestamp),
                sum(client.file_sizes(m.artifact_location).values()),
            )
            for m in late
        ),
        key=lambda each: each.started_at,
    )


def discard_upload(client: RetryingMlflowClient, model_id: str, uri: str) -> None:
    """Take away a LoggedModel that became no version, and its files.

    Raises Forbidden where a server does not let this user delete.
    """
    folder = uri.removesuffix("/artifacts")
    if folder.endswith(f"/{model_id}"):
        with suppress(FileNotFoundError, NotFound):
            client.delete_files(folder)  # first, as it may be the disk that is full
    client.delete_logged_model(model_id)


def _when(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


@contextmanager
def transfer_progress(label: str, size: int, bytes_done: Callable[[], int]) -> Iterator[None]:
    """A progress bar of bytes with rate and time left, of what `bytes_done` says, while the block runs.

    Where there is no terminal, what is large is told in one line.
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
            while not over.wait(0.3):
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
    """How many bytes of a file this process has read: MLflow does not tell. 0 where the system does not say."""
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError, ValueError):
                if os.readlink(f"/proc/self/fd/{number}") == str(path.resolve()):
                    return int(Path(f"/proc/self/fdinfo/{number}").read_text().split()[1])
    return 0
