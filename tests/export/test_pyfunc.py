"""A registered ONNX version as MLflow's pyfunc model: in process, in MLflow's scoring server, in Spark."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from limbeck.export.pyfunc import BATCH_ROWS, PARAMS
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling
from limbeck.registry.core.digest import folder_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, Version
from tests.export.export_helpers import Exported

PROMPTS = ["def add(a, b):", "x", "for i in range(10):"]
URI = "models:/coder@production"


@pytest.fixture
def version(store: Store, llama: Exported, monkeypatch: pytest.MonkeyPatch) -> Version:
    """coder@production, in the registry that MLflow uses by default."""
    version = store.register(NewVersion(name="coder", kind="onnx", engine="onnxruntime"), llama.fp32)
    store.client.set_registered_model_alias("coder", "production", str(version.version))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)
    return version


@pytest.fixture
def model(version: Version, store: Store) -> Any:
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.tracking_uri)
    yield mlflow.pyfunc.load_model(URI)
    mlflow.set_tracking_uri(before)


def complete_each(runtime: Runtime, **settings: Any) -> list[str]:
    """Complete each prompt alone in the runtime."""
    return [runtime.generate([prompt], **settings)[0].text for prompt in PROMPTS]


def test_it_completes_a_column_of_prompts(model: Any, runtime: Runtime) -> None:
    expected = complete_each(runtime, max_new_tokens=8)
    table = pd.DataFrame({"prompt": PROMPTS}, index=[5, 3, 9])
    result = model.predict(table, params={"max_new_tokens": 8})
    assert list(result["text"]) == expected
    assert list(result.index) == [5, 3, 9]
    many = PROMPTS * BATCH_ROWS
    assert list(model.predict({"prompt": many}, params={"max_new_tokens": 8})["text"]) == expected * BATCH_ROWS
    with pytest.raises(BadInput, match="row 1 of the column prompt is not a text: nan"):
        model.predict(pd.DataFrame({"prompt": ["x", float("nan")]}))
    stop = expected[0][3]
    cut = model.predict({"prompt": PROMPTS[:1]}, params={"max_new_tokens": 8, "stop": ["never", stop]})
    assert cut["text"][0] == expected[0][: expected[0].index(stop)]


def test_a_seed_repeats_samples_and_differs_between_rows(model: Any) -> None:
    rows = {"prompt": ["x"] * (BATCH_ROWS + 2)}
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 7}
    first, again = (list(model.predict(rows, params=settings)["text"]) for _ in range(2))
    assert first == again
    assert first != list(model.predict(rows, params=settings | {"seed": 8})["text"])
    assert first[:2] != first[BATCH_ROWS:]


def test_the_signature_lists_the_parameters(model: Any) -> None:
    from mlflow.exceptions import MlflowException

    signature = model.metadata.signature
    assert signature.inputs.to_dict() == [{"type": "string", "name": "prompt", "required": True}]
    assert signature.outputs.to_dict() == [{"type": "string", "name": "text", "required": True}]
    assert [param.name for param in signature.params] == list(PARAMS)
    # All fields of `Sampling`, except those for the server and a mapping: MLflow has no type for it.
    server_only = {"logprobs", "ignore_eos", "min_tokens", "stop_token_ids", "skip_special_tokens", "constraint"}
    assert {item.name for item in fields(Sampling)} - set(PARAMS) == {*server_only, "logit_bias"}
    defaults = {item.name: item.default for item in fields(Sampling)} | {"parse_special": False}
    for name, (_, default) in PARAMS.items():
        assert name == "max_new_tokens" or default == defaults[name] or (default, defaults[name]) == ([], ())
    with pytest.raises(MlflowException, match="prompt"):
        model.predict({"text": ["x"]})


def test_mlflow_does_not_change_the_version(model: Any, version: Version, store: Store) -> None:
    assert folder_digest(store.artifacts.verified_folder(version)) == version.digest


def test_a_damaged_version_is_not_loaded(version: Version, store: Store) -> None:
    import mlflow

    folder = store.artifacts.verified_folder(version)
    with open(folder / "MLmodel", "a") as file:
        file.write("# more\n")
    with pytest.raises(DamagedArtifact, match="MLmodel has sha256"):
        mlflow.pyfunc.load_model(str(folder))


def test_loading_it_imports_no_torch(llama: Exported, tmp_path: Path) -> None:
    code = (
        "import sys; from limbeck.export.pyfunc import _load_pyfunc; _load_pyfunc(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'onnx', 'mlflow'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, llama.fp32], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "[]", ran.stderr


INVOCATION = {
    "dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS]},
    "params": {"max_new_tokens": 8},
}


def test_mlflows_scoring_server_serves_it(model: Any, runtime: Runtime) -> None:
    from fastapi.testclient import TestClient
    from mlflow.pyfunc import scoring_server

    response = TestClient(scoring_server.init(model)).post("/invocations", json=INVOCATION)
    assert response.json() == {"predictions": [{"text": text} for text in complete_each(runtime, max_new_tokens=8)]}


@pytest.mark.slow
def test_mlflow_models_serve_serves_it(version: Version, runtime: Runtime, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", URI, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts `uvicorn` by its name
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": path}, process_group=0)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        log.seek(0)
        assert process.poll() is None, log.read()
        body, headers = json.dumps(INVOCATION).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{address}/invocations", body, headers), timeout=30
        ) as response:
            texts = [{"text": text} for text in complete_each(runtime, max_new_tokens=8)]
            assert json.load(response) == {"predictions": texts}
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=20)


@pytest.mark.slow
def test_spark_runs_it(version: Version, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    sql = pytest.importorskip("pyspark.sql")
    import mlflow

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    settings = {"spark.ui.enabled": "false", "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    session = sql.SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
    try:
        complete = mlflow.pyfunc.spark_udf(session, URI, result_type="string", params={"max_new_tokens": 8})
        table = session.createDataFrame([(prompt,) for prompt in PROMPTS * 5], ["prompt"]).repartition(2)
        rows = table.withColumn("text", complete("prompt")).collect()
    finally:
        session.stop()
    assert {row.prompt: row.text for row in rows} == dict(
        zip(PROMPTS, complete_each(runtime, max_new_tokens=8), strict=True)
    )
    assert len(rows) == len(PROMPTS) * 5
