"""A model whose folder has code of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import Result
from tests.registry.conftest import make_artifact


def test_the_code_of_a_model_is_not_run(
    tmp_path: Path, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = make_artifact(tmp_path, "evil")
    save_file({"a": np.zeros(4, np.float32)}, folder / "model.safetensors")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    code, out, err = limbeck("generate", folder, "x")
    assert (code, out, "contains custom code" in err) == (2, "", True)
    assert not (folder / "ran").exists()
