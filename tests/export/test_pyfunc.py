"""A registered ONNX version as MLflow's pyfunc model: in process, behind `mlflow models serve`, in Spark."""

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
    """coder@production, where MLflow by itself looks for it too."""
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


def completed(runtime: Runtime, **settings: Any) -> list[str]:
    """What the runtime gives for each prompt alone."""
    return [runtime.generate([prompt], **settings)[0].text for prompt in PROMPTS]


def test_it_completes_a_column_of_prompts(model: Any, runtime: Runtime) -> None:
    wanted = completed(runtime, max_new_tokens=8)
    table = pd.DataFrame({"prompt": PROMPTS}, index=[5, 3, 9])
    told = model.predict(table, params={"max_new_tokens": 8})
    assert list(told["text"]) == wanted
    assert list(told.index) == [5, 3, 9]
    many = PROMPTS * BATCH_ROWS
    assert list(model.predict({"prompt": many}, params={"max_new_tokens": 8})["text"]) == wanted * BATCH_ROWS
    with pytest.raises(BadInput, match="row 1 of the column prompt is not a text: nan"):
        model.predict(pd.DataFrame({"prompt": ["x", float("nan")]}))
    ends = wanted[0][3]
    cut = model.predict({"prompt": PROMPTS[:1]}, params={"max_new_tokens": 8, "stop": ["never", ends]})
    assert cut["text"][0] == wanted[0][: wanted[0].index(ends)]


def test_a_seed_gives_the_same_draws_and_each_row_its_own(model: Any) -> None:
    rows = {"prompt": ["x"] * (BATCH_ROWS + 2)}
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 7}
    first, again = (list(model.predict(rows, params=settings)["text"]) for _ in range(2))
    assert first == again
    assert first != list(model.predict(rows, params=settings | {"seed": 8})["text"])
    assert first[:2] != first[BATCH_ROWS:]


def test_its_signature_tells_what_can_be_set(model: Any) -> None:
    from mlflow.exceptions import MlflowException

    signature = model.metadata.signature
    assert signature.inputs.to_dict() == [{"type": "string", "name": "prompt", "required": True}]
    assert signature.outputs.to_dict() == [{"type": "string", "name": "text", "required": True}]
    assert [param.name for param in signature.params] == list(PARAMS)
    # All that `Sampling` has, but for what changes more than the text and for a mapping, which MLflow has no type for.
    assert {item.name for item in fields(Sampling)} - set(PARAMS) == {"logprobs", "ignore_eos", "logit_bias"}
    defaults = {item.name: item.default for item in fields(Sampling)}
    for name, (_, default) in PARAMS.items():
        assert name == "max_new_tokens" or default == defaults[name] or (default, defaults[name]) == ([], ())
    with pytest.raises(MlflowException, match="prompt"):
        model.predict({"text": ["x"]})


def test_mlflow_leaves_the_version_as_it_was(model: Any, version: Version, store: Store) -> None:
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


def post(address: str, body: dict[str, Any]) -> Any:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as answer:
        return json.load(answer)


def test_mlflow_serves_it(version: Version, runtime: Runtime, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", URI, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts `uvicorn` by its name
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": path}, process_group=0)
    try:
        address = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 90
        while process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        log.seek(0)
        assert process.poll() is None, log.read()
        body = {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS]}}
        told = post(f"{address}/invocations", body | {"params": {"max_new_tokens": 8}})
        assert told == {"predictions": [{"text": text} for text in completed(runtime, max_new_tokens=8)]}
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
        zip(PROMPTS, completed(runtime, max_new_tokens=8), strict=True)
    )
    assert len(rows) == len(PROMPTS) * 5
