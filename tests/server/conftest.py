"""Servers of a team on loopback: PostgreSQL, S3 and `mlflow server` with accounts."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import requests

from tests.registry.conftest import make_artifact

BUCKET = "limbeck"
KEYS = {"AWS_ACCESS_KEY_ID": "team", "AWS_SECRET_ACCESS_KEY": "of-a-test", "AWS_DEFAULT_REGION": "us-east-1"}
ADMIN = "password-of-admin"
ROLE = "engineers"  # may change models and experiments; users without a role may read them


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(uri: str) -> bool:
    try:
        return requests.get(uri, timeout=1).status_code < 500
    except requests.RequestException:
        return False


def find_postgresql() -> Path | None:
    """The folder of PostgreSQL's programs, which Debian does not put into PATH; None if it is not installed."""
    found = [Path(p).resolve().parent for p in (shutil.which("initdb"), shutil.which("pg_ctl")) if p]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "initdb").exists()), None)


@contextmanager
def running(command: list[str], log: Path, until: Callable[[], bool], **options: object) -> Iterator[subprocess.Popen]:
    """Run a program while the block runs; the block starts when `until` returns True."""
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        end = time.monotonic() + 60
        while not until():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(30)


class Team:
    """An `mlflow server` with accounts that can be killed and started again.

    Args:
        folder: for its logs and settings.
        database: the address of PostgreSQL, without a database.
        s3: the address of the S3 server.
        name: of its databases.
        serves_artifacts: True: files go through the server; False: from each client to S3.
    """

    def __init__(self, folder: Path, database: str, s3: str, name: str, *, serves_artifacts: bool = True) -> None:
        self.folder, self.s3, self.serves_artifacts = folder, s3, serves_artifacts
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._database = f"{database}/{name}"
        self._stack = ExitStack()
        self._settings = folder / f"{name}.ini"
        self._settings.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}/{name}_accounts\n"
            "admin_username = admin\nauth_cache_ttl_seconds = 60\n"
        )
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the server; returns when it answers."""
        files = "--artifacts-destination" if self.serves_artifacts else "--default-artifact-root"
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--backend-store-uri", self._database),
            *(files, f"s3://{BUCKET}/{self._settings.stem}"),
            *(() if self.serves_artifacts else ("--no-serve-artifacts",)),
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_"))}
        env |= KEYS | {
            "MLFLOW_S3_ENDPOINT_URL": self.s3,
            "MLFLOW_AUTH_CONFIG_PATH": str(self._settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": "bGltYmVjay1saW1iZWNrLWxpbWJlY2stbGltYmVjay0=",
            # Without these MLflow sends notices only by https and never to loopback.
            "MLFLOW_WEBHOOK_CACHE_TTL": "0",  # else a new webhook misses events for up to a minute
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        }
        until = lambda: answers(f"{self.uri}/health")  # noqa: E731
        self.process = self._stack.enter_context(
            running(command, self.log, until, cwd=self.folder, env=env, start_new_session=True)
        )

    def stop(self) -> None:
        """Kill the server, as a power cut would."""
        if self.process:
            with ExitStack() as ended:
                ended.push(self._stack.pop_all())
                os.killpg(self.process.pid, 9)
            self.process = None

    def create_accounts(self) -> None:
        """Create accounts: ann and carl may edit, bob may only read."""
        from mlflow.server import get_app_client

        with pytest.MonkeyPatch.context() as patch:
            self.log_in(patch, "admin")
            accounts = get_app_client("basic-auth", tracking_uri=self.uri)
            role = accounts.create_role("default", ROLE)
            for kind in ("experiment", "registered_model"):
                accounts.add_role_permission(role.id, kind, "*", "EDIT")
            for name in ("ann", "bob", "carl"):
                accounts.create_user(name, f"password-of-{name}")
            for name in ("ann", "carl"):
                accounts.assign_role(name, role.id)

    def log_in(self, patch: pytest.MonkeyPatch, name: str | None, password: str | None = None) -> None:
        """Run the next commands as the user `name`; None: without a user."""
        patch.setenv("MLFLOW_TRACKING_URI", self.uri)
        if not self.serves_artifacts:
            for key, value in (KEYS | {"MLFLOW_S3_ENDPOINT_URL": self.s3}).items():
                patch.setenv(key, value)
        if name is None:
            patch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
            patch.delenv("MLFLOW_TRACKING_PASSWORD", raising=False)
        else:
            patch.setenv("MLFLOW_TRACKING_USERNAME", name)
            patch.setenv("MLFLOW_TRACKING_PASSWORD", password or f"password-of-{name}")


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """The address of PostgreSQL. It refuses to run as root, so root starts it as another user."""
    programs = find_postgresql()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with TemporaryDirectory(prefix="limbeck-postgresql-") as folder:  # other users cannot enter pytest's folders
        yield from _postgresql(programs, Path(folder))


def _postgresql(programs: Path, folder: Path) -> Iterator[str]:
    other: list[str] = []
    if os.geteuid() == 0:
        other = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        shutil.chown(folder, "nobody", "nogroup")
    data, port = folder / "data", free_port()
    made = [*other, str(programs / "initdb"), "-D", str(data), "-U", "mlflow", "-A", "trust", "--no-sync"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
    command = [*other, str(programs / "postgres"), "-D", str(data)]
    for key, value in settings.items():
        command += ["-c", f"{key}={value}"]
    ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    with running(command, folder / "log", lambda: subprocess.run(ready).returncode == 0, cwd=folder):
        for name in ("team", "team_accounts", "direct", "direct_accounts"):
            where = ["-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", name]
            subprocess.run([str(programs / "createdb"), *where], check=True)
        yield f"postgresql+psycopg2://mlflow:a-secret@127.0.0.1:{port}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server with an empty bucket."""
    import boto3

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, tmp_path_factory.mktemp("s3") / "log", lambda: answers(uri)):
        session = boto3.Session(KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
        session.client("s3", endpoint_url=uri).create_bucket(Bucket=BUCKET)
        yield uri


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory, database: str, s3: str) -> Iterator[Team]:
    """The server of the team; all files go through it."""
    yield from _served(Team(tmp_path_factory.mktemp("team"), database, s3, "team"))


@pytest.fixture(scope="session")
def direct(tmp_path_factory: pytest.TempPathFactory, database: str, s3: str) -> Iterator[Team]:
    """A server whose clients upload their files to S3 themselves."""
    yield from _served(Team(tmp_path_factory.mktemp("direct"), database, s3, "direct", serves_artifacts=False))


def _served(team: Team) -> Iterator[Team]:
    team.start()
    try:
        team.create_accounts()
        yield team
    finally:
        team.stop()


@pytest.fixture
def log_in(team: Team, limbeck_home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`log_in("ann")`: run the next commands as ann, on a machine of her own."""

    def change(name: str | None, password: str | None = None) -> None:
        team.log_in(monkeypatch, name, password)
        monkeypatch.setenv("LIMBECK_HOME", str(limbeck_home.parent / f"home-of-{name}"))

    return change


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Creates an artifact folder that looks like a model; its digest depends on `content`."""
    return partial(make_artifact, tmp_path / "made")
