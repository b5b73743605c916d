"""`limbeck generate`."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from limbeck.export.runtime.runtime import Runtime
from tests.conftest import Result
from tests.export.export_helpers import Exported, limbeck_without_torch
from tests.registry.conftest import make_artifact

Limbeck = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("limbeck_home")


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


def test_torch_and_onnx_stop_at_the_same_text(limbeck: Limbeck, llama: Exported, runtime: Runtime) -> None:
    text = runtime.generate(["class A"], max_new_tokens=20)[0].text
    texts = []
    for model in (llama.fp32, llama.torch):
        command = ("generate", model, "class A", "--max-new-tokens", 20, "--stop", text[2:4], "--format", "json")
        (done,) = json.loads(limbeck(*command).out)
        assert done["finish_reason"] == "stop"
        texts.append(done["text"])
    assert texts == [text[: text.index(text[2:4])]] * 2


def test_special_tokens_of_a_prompt_are_text_unless_asked_for(limbeck: Limbeck, llama: Exported) -> None:
    for model in (llama.fp32, llama.torch):
        command = ("generate", model, "a<|endoftext|>", "--max-new-tokens", 1, "--format", "json")
        (as_text,), (as_token,) = (json.loads(limbeck(*command, *more).out) for more in ((), ("--parse-special",)))
        assert as_token["prompt_tokens"] == 2
        assert as_text["prompt_tokens"] > 4


def test_the_code_of_a_model_is_not_run(
    tmp_path: Path, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limbeck does not ask on standard input either."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = make_artifact(tmp_path, "evil")
    save_file({"a": np.zeros(4, np.float32)}, folder / "model.safetensors")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    code, out, err = limbeck("generate", folder, "x")
    assert (code, out, "contains custom code" in err) == (2, "", True)
    assert not (folder / "ran").exists()
