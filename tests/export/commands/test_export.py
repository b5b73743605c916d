"""`limbeck export`, `deploy`, `serve` and `generate` as a user runs them."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.export.export_helpers import Exported, limbeck_without_torch

Limbeck = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("limbeck_home")


def test_export_of_a_folder_writes_beside_it(limbeck: Limbeck, tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    corpus = tmp_path / "heldout.jsonl"
    corpus.write_text("".join(json.dumps({"path": "a", "text": "def f(x):\n    return x\n"}) + "\n" for _ in range(3)))
    code, out, _ = limbeck("export", model, "--texts", corpus, "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["precision"], row["new"]) for row in rows] == [("fp32", True), ("int8", True)]
    assert [Path(row["model"]) for row in rows] == [tmp_path / "model-onnx/fp32", tmp_path / "model-onnx/int8"]
    assert rows[0]["parity"]["tokens"] == 3 * len(Runtime.load(rows[0]["model"]).encode("def f(x):\n    return x\n"))
    code, out, err = limbeck("export", model)
    assert code == 0
    assert "exists" in out
    assert "already exported" in err


def test_export_deploy_and_generate_of_a_registered_version(
    limbeck: Limbeck, store: Store, tiny_llama: Path, tmp_path: Path
) -> None:
    store.register(NewVersion(name="coder", kind="teacher"), tiny_llama)
    assert limbeck("deploy", "coder/1", "--output", tmp_path / "bundle").err.strip().endswith("limbeck export coder/1")
    code, out, _ = limbeck("export", "coder/1", "--precision", "int8, fp32")
    assert code == 0
    assert "coder/2" in out
    assert "coder/3" in out
    code, _, err = limbeck("deploy", "coder/1", "--output", tmp_path / "bundle")
    assert code == 2
    assert "its ONNX variants: coder/2 (fp32), coder/3 (int8)" in err

    code, out, _ = limbeck("deploy", "coder/3", "--output", tmp_path / "bundle", "--format", "json")
    assert code == 0
    digest = store.get("coder/3").digest
    deployed = {"bundle": str(tmp_path / "bundle"), "model": "coder/3", "digest": digest}
    assert json.loads(out) == deployed | {"sbom": None, "signed_by": None}  # it was never promoted
    done = limbeck("generate", "coder/2", "def add(", "--against", "coder/1", "--max-new-tokens", 12, "--format", "json")
    assert done.code == 0
    ours, teacher = json.loads(done.out)
    assert (ours["model"], ours["engine"]) == ("coder/2", "onnxruntime")
    assert (teacher["model"], teacher["engine"]) == ("coder/1", "torch")
    assert ours["text"] == teacher["text"]
    assert ours["new_tokens"] == teacher["new_tokens"] == 12
    assert ours["digest"] == store.get("coder/2").digest
    assert all(done[speed] > 0 for done in (ours, teacher) for speed in ("prefill_tokens_per_s", "decode_tokens_per_s"))


def test_generate_reads_stdin_and_prints_a_table(
    limbeck: Limbeck, llama: Exported, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("import "))
    code, out, _ = limbeck("generate", llama.fp32, "--max-new-tokens", 9)
    assert code == 0
    assert out.startswith("import " + runtime.generate(["import "], max_new_tokens=9)[0].text)
    assert "tok/s" in out


def test_generate_needs_no_torch(llama: Exported, runtime: Runtime, tmp_path: Path) -> None:
    command = limbeck_without_torch("generate", llama.fp32, "for i", "--max-new-tokens", 6, "--format", "json")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["text"] == runtime.generate(["for i"], max_new_tokens=6)[0].text
    assert list(tmp_path.iterdir()) == []  # no state folder either


def test_torch_and_onnx_stop_alike(limbeck: Limbeck, llama: Exported, runtime: Runtime) -> None:
    text = runtime.generate(["class A"], max_new_tokens=20)[0].text
    texts = []
    for model in (llama.fp32, llama.torch):
        command = ("generate", model, "class A", "--max-new-tokens", 20, "--stop", text[2:4], "--format", "json")
        (done,) = json.loads(limbeck(*command).out)
        assert done["finish_reason"] == "stop"
        texts.append(done["text"])
    assert texts == [text[: text.index(text[2:4])]] * 2


def test_bad_input_is_told_in_a_line(limbeck: Limbeck, llama: Exported, tiny_llama: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(llama.int8, tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes((damaged / "model.onnx").read_bytes()[:-1])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nnot json\n')
    cases = [
        (("export", tiny_llama, "--precision", "fp32,int5"), "precision 'int5' is unknown"),
        (("export", llama.fp32), "an ONNX artifact already"),
        (("export", "./nowhere"), "no such folder"),
        (("export", tiny_llama, "--texts", tmp_path / "empty.jsonl"), "is empty"),
        (("export", tiny_llama, "--texts", tmp_path / "bad.jsonl"), "line 2"),
        (("export", tiny_llama, "--texts", tmp_path / "no.jsonl"), "cannot be read"),
        (("deploy", damaged, "--output", tmp_path / "to"), "model.onnx has sha256"),
        (("deploy", tiny_llama, "--output", tmp_path / "to"), "is a PyTorch model"),
        (("serve", damaged), "model.onnx has sha256"),
        (("serve", tiny_llama), "is a PyTorch model"),
        (("generate", damaged, "x"), "model.onnx has sha256"),
        (("generate", llama.fp32, "x", "--temperature", -1), "temperature is -1"),
        (("generate", llama.fp32, "a b c " * 100), "the context is 128"),
        (("generate", tiny_llama, "a b c " * 100), "the context is 128"),
    ]
    for command, message in cases:
        code, out, err = limbeck(*command)
        assert (code, out) == (2, ""), command
        assert message in err, command
        assert "Traceback" not in err
    assert not (tmp_path / "to").exists()


def test_a_port_in_use_is_told(limbeck: Limbeck, llama: Exported) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = limbeck("serve", llama.fp32, "--port", taken.getsockname()[1])
    assert code == 2
    assert "in use" in err
