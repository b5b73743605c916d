"""The pages over a real registry, for HTTP clients and a real browser. One registry and one browser per module."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
import uvicorn
from pyarrow import parquet

from limbeck.evals.tasks.documents import DOCUMENT_SCHEMA
from limbeck.registry.mlflow.store import Store
from limbeck.web.app import create_app
from tests.conftest import new_workspace
from tests.registry.conftest import POLICY, Still, copy_prepared, make_artifact, make_still

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TOKEN = "a token that only tests know"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_MS = 30_000  # of each wait for the browser: a loaded machine is slow
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Site:
    """The pages, served on loopback, and their registry."""

    still: Still
    address: str  # http://127.0.0.1:PORT

    @property
    def store(self) -> Store:
        return self.still.store


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, scored_registry: tuple[Path, Still]) -> Iterator[Still]:
    """The registered model `still` of tests/registry/conftest.py: fp32 and int8 pass POLICY, int4 fails."""
    home, still = scored_registry
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(tmp_path_factory.mktemp("web")))
        patch.setenv("LIMBECK_USER", "ada")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        copy = copy_prepared(home, still, still.store, still.documents)
        copy.store = Store()
        yield copy


@pytest.fixture(scope="session")
def scored_registry(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, Still]:
    """A state folder with the model `still`, its scores and their documents; modules copy it, which is faster."""
    folder = tmp_path_factory.mktemp("scored")
    with new_workspace(folder / "home", empty_database) as patch:
        patch.setenv("LIMBECK_USER", "ada")
        still = make_still(Store(), partial(make_artifact, folder / "made"), folder / "none")
        for precision, wrong, scores in (
            ("fp32", 5, dict(usd=2.0)),
            ("int8-weight", 7, dict(usd=1.0)),
            ("int4", 60, dict(usd=0.5, retention=(0.5, 0.4, 0.6))),
        ):
            still.documents = write_answers(folder / f"{precision}.parquet", wrong)
            still.score(still.variants[precision], **scores)
        return folder / "home", still


def write_answers(file: Path, wrong: int) -> Path:
    """Write the documents of a scorecard: 2 tasks with 80 questions each, the first `wrong` answered wrongly."""
    rows = [
        {
            "task": task,
            "doc_id": number,
            "doc_hash": f"d{number}",
            "prompt_hash": f"p{number}",
            "metric": "acc",
            "value": float(number >= wrong),
            "weight": 1.0,
            "cluster": f"{task}:{number}",
            "target": "yes",
            "response": "yes" if number >= wrong else "<i>no</i>",
            "prompt_end": f"question {number}?",
        }
        for task in ("bits", "choice")
        for number in range(80)
    ]
    parquet.write_table(pa.Table.from_pylist(rows, DOCUMENT_SCHEMA), file)
    return file


@pytest.fixture(scope="module")
def site(registry: Still) -> Iterator[Site]:
    """The pages, served by a thread, with POLICY for aliases that no policy protects."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = create_app(registry.store, policy=POLICY, token=TOKEN)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield Site(registry, address)
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; the test is skipped if none is installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    sync_api.expect.set_options(timeout=TIMEOUT_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Browser, site: Site) -> Iterator[Page]:
    """A tab with a new profile, light and 1280 pixels wide, not logged in. An error in its console fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, base_url=site.address, color_scheme="light")
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    assert [problem for problem in problems if "status of 4" not in problem] == []


def log_in(tab: Page) -> None:
    """Log in through the form."""
    tab.goto("/login")
    tab.get_by_label("Token").fill(TOKEN)
    tab.get_by_role("button", name="Log in").click()
    tab.get_by_role("button", name="Log out").wait_for()
    tab.wait_for_load_state()
