"""`limbeck export`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.export.runtime.runtime import Runtime
from tests.conftest import make_model
from tests.export.export_helpers import Exported

Limbeck = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("limbeck_home")


def test_the_variants_of_a_folder_are_written_beside_it(limbeck: Limbeck, tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    corpus = tmp_path / "heldout.jsonl"
    texts = [f"def f(x):\n    return x + {number}\n" for number in range(8)]
    corpus.write_text("".join(json.dumps({"path": "a", "text": text}) + "\n" for text in texts))
    code, out, _ = limbeck("export", model, "--texts", corpus, "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["precision"], row["new"]) for row in rows] == [("fp32", True), ("int8-weight", True)]
    assert [Path(row["model"]) for row in rows] == [tmp_path / "model-onnx/fp32", tmp_path / "model-onnx/int8-weight"]
    runtime = Runtime.load(rows[0]["model"])
    assert rows[0]["parity"]["tokens"] == sum(len(runtime.encode(text)) for text in texts)
    assert rows[1]["parity"]["quality"]["mean_kl"]["high"] <= rows[1]["parity"]["limits"]["mean_kl"]
    code, out, err = limbeck("export", model)
    assert code == 0
    assert "exists" in out
    assert "already exported" in err


def test_each_precision_is_made_and_described(
    limbeck: Callable[..., tuple[int, str, str]], llama: Exported, tmp_path: Path, limbeck_home: Path
) -> None:
    shutil.copytree(llama.fp32, tmp_path / "to/fp32")
    command = (
        "export",
        llama.torch,
        "--output",
        tmp_path / "to",
        "--precision",
        "int8-weight,fp16",
        "--format",
        "json",
    )
    code, out, err = limbeck(*command)
    assert code == 0, err
    rows = json.loads(out)
    assert [row["precision"] for row in rows] == ["fp16", "int8-weight"]
    assert rows[1]["quantization"]["chosen"]["bits"] == 8
    assert "int8-weight: exporting" in err


def test_an_engine_that_cannot_make_the_graph_is_refused(
    limbeck: Limbeck, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", tokenizer_folder, "llama", hidden_size=48)
    code, _, err = limbeck("export", model, "--engine", "fused", "--precision", "fp32")
    assert code == 2
    assert "has no fused graph: a head size of 12" in err
    assert err.endswith("use --engine optimum, or leave --engine out\n")
