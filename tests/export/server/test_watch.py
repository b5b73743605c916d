"""The served artifact changes while requests run: an alias moves, a folder is replaced."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.gate.promotion import rollback
from limbeck.registry.ledger import log as ledger
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Version
from tests.conftest import make_model
from tests.export.export_helpers import Exported, Served, serving
from tests.export.server.client_helpers import body, metric, root, wait_until

PROMPT = "def add("
pytestmark = pytest.mark.usefixtures("limbeck_home")


@pytest.fixture(scope="module")
def artifacts(llama: Exported, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Path]:
    """Two artifacts with different answers."""
    folder = tmp_path_factory.mktemp("other")
    export_onnx(make_model(folder / "torch", tokenizer_folder, "llama", seed=1), folder / "fp32")
    assert answer_of(llama.fp32) != answer_of(folder / "fp32")
    return llama.fp32, folder / "fp32"


def answer_of(folder: Path) -> str:
    """The artifact's greedy completion of PROMPT."""
    return Runtime.load(folder, threads=1).generate([PROMPT], max_new_tokens=60)[0].text


@contextmanager
def busy_clients(served: Served, model: str) -> Iterator[list[str]]:
    """Clients that send requests without a pause while the block runs; gives their answers. None may fail."""
    texts: list[str] = []
    failures: list[Any] = []
    stop = threading.Event()

    def ask(stream: bool) -> None:
        with httpx.Client(timeout=60) as client:
            while not stop.is_set():
                request = body(PROMPT, new=60, model=model, stream=stream)
                answer = client.post(f"{served.url}/completions", json=request)
                if answer.status_code != 200 or (stream and not answer.text.endswith("data: [DONE]\n\n")):
                    failures.append(answer.text)
                elif not stream:
                    texts.append(answer.json()["choices"][0]["text"])

    clients = [threading.Thread(target=ask, args=(stream,)) for stream in (False, False, True)]
    for client in clients:
        client.start()
    try:
        yield texts
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert failures == []


def move_alias(store: Store, version: Version) -> None:
    """Point `production` at a version through the ledger, without a policy."""
    before = store.aliases(version.name).get("production")
    moved = dict(from_version=before, to_version=version.version, artifact=version.digest)
    entry = ledger.append_entry(
        store, version.name, who="a test", alias="production", action="promote", verdict=None, reason="", **moved
    )
    ledger.apply_entry(store, entry)


def test_the_server_follows_an_alias_through_promotion_rollback_and_damage(
    store: Store, artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = (
        store.register(NewVersion(name="coder", kind="onnx", engine="onnxruntime", parent=f"coder/{i}"), folder)
        for i, folder in enumerate(artifacts)
    )
    move_alias(store, first)
    expected = {version.ref: answer_of(store.artifacts.verified_folder(version)) for version in (first, second)}
    with serving("coder@production", "", "--watch-seconds", 0.1) as served:

        def version() -> str:
            return httpx.get(f"{root(served)}/ready").json()["version"]

        with busy_clients(served, "coder@production") as texts:
            wait_until(lambda: len(texts) > 3)
            assert set(texts) == {expected[first.ref]}
            move_alias(store, second)
            wait_until(lambda: version() == second.ref and texts[-1] == expected[second.ref])
            rollback(store, "coder", "production")
            wait_until(lambda: version() == first.ref and texts[-1] == expected[first.ref])
            (store.artifacts.verified_folder(second) / "model.onnx").write_bytes(b"damaged")
            move_alias(store, second)
            wait_until(lambda: metric(served, "model_refused_total") == 1)
            del texts[:]
            wait_until(lambda: len(texts) > 5)
            assert set(texts) == {expected[first.ref]}
        assert version() == first.ref
        assert metric(served, "model_swaps_total") == 2
        wait_until(lambda: metric(served, "models_loaded") == 1)
        served.process.send_signal(signal.SIGTERM)
        _, log = served.process.communicate(timeout=20)
        assert f"{second.ref}: {first.ref} is still served" in log
        assert "is damaged" in log


def test_a_folder_is_reloaded_when_it_is_replaced_or_on_sighup(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(artifacts[0], tmp_path / "bundle")
    texts = [answer_of(folder) for folder in artifacts]
    with serving(bundle, "", "--watch-seconds", 0.1) as served, busy_clients(served, "bundle") as answers:
        shutil.copytree(artifacts[1], tmp_path / "next")
        bundle.rename(tmp_path / "old")
        (tmp_path / "next").rename(bundle)
        wait_until(lambda: answers and answers[-1] == texts[1])
        # A new manifest that does not match the files: refused, and again on SIGHUP.
        shutil.copy(artifacts[0] / "limbeck.json", bundle / "limbeck.json")
        wait_until(lambda: metric(served, "model_refused_total") == 1)
        served.process.send_signal(signal.SIGHUP)
        wait_until(lambda: metric(served, "model_refused_total") == 2)
        shutil.copy(artifacts[0] / "model.onnx", bundle / "model.onnx")
        served.process.send_signal(signal.SIGHUP)
        wait_until(lambda: answers[-1] == texts[0])
    assert set(answers) == set(texts)
