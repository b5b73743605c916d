"""The connection to MLflow: it answers or fails within seconds, retries, and raises errors that a user understands.

Only this module decides how MLflow is reached. `import mlflow` takes over a second, so it happens here at the first
call.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from limbeck.registry.core.errors import BadInput, LimbeckError, Unreachable
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status

Found = TypeVar("Found")

QUIET_ENVIRONMENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # MLflow retries silently; `call_with_retries` prints a line
}
PROBE_SECONDS = 4.0
RETRY_SECONDS = 30.0  # `mlflow server` takes about ten to restart
# The texts by which a network error is recognized if MLflow hides the exception, as for a folder it could not fetch.
NO_ANSWER_PATTERN = re.compile(
    r"failed with (timeout )?exception|Max retries exceeded|5\d\d Server Error|Read timed out"
)
STORAGE_DOWN_ERRORS = {"EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"}
PARAMS_PER_CALL = 100  # MLflow refuses more
LOCKED_TRIES = 5  # each waits up to 20 s for SQLite's lock, inside MLflow


def connect(tracking_uri: str) -> RetryingMlflowClient:
    """A client of the tracking store at `tracking_uri`.

    A server is asked for its health first; a missing SQLite file is created.
    Raises Unreachable within about five seconds if nothing answers.
    """
    if is_server(tracking_uri):
        probe(tracking_uri)
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if path := sqlite_file(tracking_uri):
        with _translate_errors(tracking_uri):
            _create_database(path)
            # MLflow would retry for minutes to open a file that cannot be opened.
            with closing(sqlite3.connect(path, timeout=20)) as database:
                database.execute("PRAGMA schema_version")
    return RetryingMlflowClient(tracking_uri)


def sqlite_file(tracking_uri: str) -> Path | None:
    """The database file of a SQLite store, else None."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///")).resolve()


def artifact_location(tracking_uri: str) -> str | None:
    """Where a store's experiments keep their files: beside a SQLite database; None: a server decides."""
    if is_server(tracking_uri):
        return None
    file = sqlite_file(tracking_uri)
    return str((file.parent if file else home()) / "artifacts")


def is_server(tracking_uri: str) -> bool:
    """True for an MLflow server reached over HTTP; False for a database opened directly."""
    return urlsplit(tracking_uri).scheme in ("http", "https")


def probe(tracking_uri: str) -> float:
    """Check that an MLflow server answers. Returns the seconds it took; raises Unreachable."""
    import requests

    start = time.monotonic()
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true")
    server_certificate = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not insecure
    client_certificate = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
    try:
        answer = requests.get(
            tracking_uri.rstrip("/") + "/health",
            timeout=(PROBE_SECONDS / 2, PROBE_SECONDS),
            verify=server_certificate,
            cert=client_certificate,
        )
    except requests.exceptions.Timeout:
        raise _unreachable(tracking_uri, f"no answer within {PROBE_SECONDS:.0f} s") from None
    except requests.exceptions.RequestException as error:
        raise _unreachable(tracking_uri, network_error_reason(error)) from None
    if answer.status_code >= 500:
        raise _unreachable(tracking_uri, f"it answers {answer.status_code} {answer.reason}")
    return time.monotonic() - start


def call_with_retries(tracking_uri: str, call: Callable[[], Found]) -> Found:
    """The result of a call of MLflow; its errors are raised as LimbeckError.

    If a server does not answer, or answers 429 or 5xx, the call is repeated for RETRY_SECONDS at growing intervals,
    and a line says so. It is also repeated if another process has locked the SQLite file. Each call is one transaction.
    """
    until, pause, locked = 0.0, 0.5, 0
    while True:
        try:
            with _translate_errors(tracking_uri):
                return call()
        except Locked:
            locked += 1
            if locked == LOCKED_TRIES:
                raise
            time.sleep(0.2 * locked)
        except Unreachable as error:
            now = time.monotonic()
            if not until:
                until = now + RETRY_SECONDS
                print_status(f"{error.message}; trying again for {RETRY_SECONDS:.0f} s")
            if now >= until:
                raise
            time.sleep(min(pause * random.uniform(0.8, 1.2), max(until - now, 0.1)))  # not all clients at once
            pause = min(2 * pause, 5.0)


class RetryingMlflowClient:
    """MLflow's client: the same methods, each called by `call_with_retries`; and some more."""

    def __init__(self, tracking_uri: str) -> None:
        self._tracking_uri = tracking_uri

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        _quiet_logs()
        return MlflowClient(self._tracking_uri, self._tracking_uri)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            return call_with_retries(self._tracking_uri, lambda: getattr(self._client, name)(*args, **named))

        return call

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        """Log parameters of a run."""
        from mlflow.entities import Param

        entities = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(entities), PARAMS_PER_CALL):
            self.log_batch(run_id, params=entities[start : start + PARAMS_PER_CALL])

    def create_model_version(self, *args: Any, **named: Any) -> Any:
        """As MLflow's, but never repeated: a call that seems lost may have succeeded, and would make two versions."""
        with _translate_errors(self._tracking_uri):
            return self._client.create_model_version(*args, **named)

    def download(self, uri: str, folder: Path) -> Path:
        """Download the file or folder at an artifact URI into the folder `folder`. Returns its local path."""

        def fetch() -> Path:
            from mlflow.artifacts import download_artifacts

            folder.mkdir(parents=True, exist_ok=True)
            return Path(download_artifacts(artifact_uri=uri, dst_path=str(folder), tracking_uri=self._tracking_uri))

        return call_with_retries(self._tracking_uri, fetch)

    def upload_file(self, file: Path, uri: str, folder: str | None = None) -> None:
        """Upload a file to an artifact URI, below `folder` if given."""
        call_with_retries(self._tracking_uri, lambda: self._artifacts(uri).log_artifact(str(file), folder))

    def delete_files(self, uri: str) -> None:
        """Delete all files below an artifact URI."""
        call_with_retries(self._tracking_uri, lambda: self._artifacts(uri).delete_artifacts())

    def file_sizes(self, uri: str) -> dict[str, int]:
        """The files below an artifact URI: POSIX path -> bytes."""

        def sizes_below(folder: str | None = None) -> dict[str, int]:
            sizes: dict[str, int] = {}
            for found in call_with_retries(self._tracking_uri, lambda: self._artifacts(uri).list_artifacts(folder)):
                sizes |= sizes_below(found.path) if found.is_dir else {found.path: int(found.file_size or 0)}
            return sizes

        return sizes_below()

    def _artifacts(self, uri: str) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(uri, tracking_uri=self._tracking_uri)


class NotFound(BadInput):
    """MLflow has no such experiment, run, model, version or alias."""


class AlreadyExists(BadInput):
    """MLflow has an experiment, run, model or version with this name."""


class Forbidden(LimbeckError):
    """A server does not allow this user to do it."""


class Locked(LimbeckError):
    """Another process has locked the SQLite database."""


@contextmanager
def _translate_errors(tracking_uri: str) -> Iterator[None]:
    """Turn the errors of MLflow, its database and its network into LimbeckErrors."""
    try:
        yield
    except LimbeckError:
        raise
    except Exception as error:
        translated = _to_limbeck_error(error, tracking_uri)
        if translated is error:
            raise
        raise translated from error


def _to_limbeck_error(error: Exception, tracking_uri: str) -> Exception:
    """The LimbeckError of an error; the error itself if it is none of MLflow, its database or its network."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return (
        _disk_or_database_error(chain, tracking_uri)
        or _permission_error(chain, tracking_uri)
        or _artifact_store_error(chain)
        or _network_error(chain, tracking_uri)
        or _mlflow_error(error, tracking_uri)
        or error
    )


def _disk_or_database_error(chain: list[BaseException], tracking_uri: str) -> LimbeckError | None:
    text = str(chain[0])
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in chain) or "disk is full" in text:
        return LimbeckError(
            f"no space left on the disk while writing to {tracking_uri}",
            fix=f"free some space on the disk of {home()}, then run the same command again",
        )
    if "database is locked" in text:
        return Locked(
            f"{tracking_uri} is locked by another process",
            fix="wait for the other limbeck or mlflow process to finish, then try again",
        )
    if "unable to open database file" in text or "readonly database" in text or "not a database" in text:
        detail = next((words for words in ("readonly", "not a database") if words in text), "it cannot be opened")
        return LimbeckError(
            f"{tracking_uri}: the tracking database cannot be used ({detail})",
            fix="check the file and its permissions, or move it away to begin with a new one",
        )
    return None


def _network_error(chain: list[BaseException], tracking_uri: str) -> LimbeckError | None:
    is_of_network = any(type(e).__module__.startswith(("requests", "urllib3")) for e in chain)
    if is_of_network or NO_ANSWER_PATTERN.search(str(chain[0])):
        return _unreachable(tracking_uri, network_error_reason(chain[0]))
    return None


def _mlflow_error(error: Exception, tracking_uri: str) -> LimbeckError | None:
    """The error of an MlflowException or an OSError; None for any other."""
    text, code = str(error), getattr(error, "error_code", "")
    classes: dict[str, type[LimbeckError]] = {
        "RESOURCE_DOES_NOT_EXIST": NotFound,
        "RESOURCE_ALREADY_EXISTS": AlreadyExists,
        "INVALID_PARAMETER_VALUE": BadInput,
    }
    if code in classes:
        return classes[code](text)
    if schema := re.search(r"out-of-date database schema \(found version (\w+)", text):
        return _schema_error(schema[1], tracking_uri)
    if code or isinstance(error, OSError):
        return LimbeckError(f"{tracking_uri}: {text}")
    return None


def _schema_error(revision: str, tracking_uri: str) -> LimbeckError:
    """The error of a database whose schema is another than that of the installed MLflow: older or newer."""
    import mlflow

    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if not any(migrations.glob(f"{revision}_*.py")):
        return LimbeckError(
            f"{tracking_uri} was written by a newer MLflow than {mlflow.__version__}, which is installed here",
            fix="install the newer one: pip install --upgrade mlflow",
        )
    return LimbeckError(
        f"{tracking_uri} was written by an older MLflow than {mlflow.__version__}, which is installed here",
        fix=f"back it up (limbeck backup FILE), then run: mlflow db upgrade {tracking_uri}",
    )


def _permission_error(chain: list[BaseException], tracking_uri: str) -> LimbeckError | None:
    """The error if a server, or the storage behind it, answered 4xx, such as for an unknown user; else None."""
    text = str(chain[0])
    answers = [getattr(getattr(e, "response", None), "status_code", None) for e in chain]
    codes = {getattr(e, "error_code", "") for e in chain}
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if 401 in answers or "UNAUTHENTICATED" in codes or "401 Client Error" in text:
        return Forbidden(
            f"{tracking_uri} does not accept the user {user} with this password"
            if user
            else f"{tracking_uri} asks for a user and a password",
            fix="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    if 403 in answers or "PERMISSION_DENIED" in codes or "403 Client Error" in text:
        endpoint = re.search(r"/api/\d\.\d/(?:mlflow/)?([\w-]+(?:/[a-z-]+)?)", text)
        return Forbidden(
            f"{tracking_uri} does not let {user or 'you'} do this" + (f" ({endpoint[1]})" if endpoint else ""),
            fix="ask its administrator for EDIT on the model and on the experiment: docs/team.md",
        )
    if refused := [a for a in answers if a and 400 <= a < 500 and a not in (408, 429)]:
        return (NotFound if 404 in refused else LimbeckError)(f"{tracking_uri}: {text[:500]}")
    return None


def _artifact_store_error(chain: list[BaseException]) -> LimbeckError | None:
    """The error of S3, if the server lets its clients store artifacts there themselves; else None."""
    if not any(type(e).__module__.startswith(("boto", "s3transfer")) for e in chain):
        return None
    text = str(chain[0])
    if any(type(e).__name__ in STORAGE_DOWN_ERRORS for e in chain) or re.search(
        r"\((InternalError|SlowDown|5\d\d)\)", text
    ):
        return Unreachable(f"the artifact store does not answer: {text[:200]}", fix="is AWS_ENDPOINT_URL right?")
    return LimbeckError(
        f"the artifact store refused: {text[:500]}",
        fix="set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL, or have the server serve artifacts",
    )


def _unreachable(tracking_uri: str, why: str) -> Unreachable:
    if why == "certificate":
        return Unreachable(
            f"the certificate of the tracking server {tracking_uri} is not trusted on this machine",
            fix="name the certificate of its authority: MLFLOW_TRACKING_SERVER_CERT_PATH=ca.pem",
        )
    return Unreachable(
        f"the tracking server {tracking_uri} does not answer: {why}",
        fix="start it, correct MLFLOW_TRACKING_URI, or unset that to use the local store",
    )


def network_error_reason(error: BaseException) -> str:
    """The reason in a few words, from an exception of requests."""
    text = str(error)
    for reason in ("connection refused", "name or service not known", "no route to host", "certificate"):
        if reason in text.lower():
            return reason
    if answered := re.search(r"too many (\d{3}) error responses|(\d{3}) Server Error", text):
        return f"it answers {answered[1] or answered[2]}"
    return text.split("\n")[0][:200]


def _create_database(path: Path) -> None:
    """Create MLflow's SQLite file if it is missing: completely or not at all, by one process."""
    if path.exists():
        return
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        _quiet_logs()
        with atomic_write(path) as part:
            store = SqlAlchemyStore(f"sqlite:///{part}", str(path.parent / "artifacts"))
            store.engine.dispose()


def _quiet_logs() -> None:
    """Silence the loggers of MLflow; call it after the import of mlflow, which sets them."""
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.ERROR)
