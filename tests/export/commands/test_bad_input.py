"""Bad input of `export`, `deploy`, `serve` and `generate`: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.export.export_helpers import Exported

Limbeck = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("limbeck_home")


def test_bad_input_is_reported_in_a_line(limbeck: Limbeck, llama: Exported, tiny_llama: Path, tmp_path: Path) -> None:
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
        (("serve", llama.fp32, "--cache-mb", 10**9), "MB of memory are available"),
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


def test_a_port_in_use_is_reported(limbeck: Limbeck, llama: Exported) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = limbeck("serve", llama.fp32, "--port", taken.getsockname()[1])
    assert code == 2
    assert "in use" in err
