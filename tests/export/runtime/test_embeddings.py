"""Embeddings, compared with transformers' hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from limbeck.export.runtime.embeddings import Pooling, embed
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import BadInput
from tests.export.export_helpers import Exported

IDS = [5, 17, 42, 260, 9, 9, 31]


def reference(model: Path, pooling: Pooling) -> np.ndarray:
    """By transformers: the hidden states after the last norm."""
    import torch
    from transformers import AutoModel

    with torch.no_grad():
        states = AutoModel.from_pretrained(model)(torch.tensor([IDS])).last_hidden_state[0].double().numpy()
    vector: np.ndarray = states.mean(axis=0) if pooling == "mean" else states[-1]
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_those_of_transformers(family: Exported, pooling: Pooling) -> None:
    runtime = Runtime.load(family.fp32, threads=1, hidden_states=True)
    (vector,) = embed(runtime, IDS, pooling)
    assert vector is not None
    assert vector.dtype == np.float32
    assert vector == pytest.approx(reference(family.torch, pooling), abs=1e-5)


def test_a_long_text_is_read_in_chunks(llama: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(llama.fp32, threads=1, hidden_states=True)
    monkeypatch.setattr(Runtime, "max_prefill_tokens", 3)
    for pooling in ("mean", "last"):
        *unfinished, vector = embed(runtime, IDS, pooling)
        assert unfinished == [None, None]
        assert vector == pytest.approx(reference(llama.torch, pooling), abs=1e-5)


def test_texts_are_those_of_a_graph_without_hidden_states(llama: Exported, runtime: Runtime) -> None:
    loaded = Runtime.load(llama.fp32, threads=1, hidden_states=True)
    assert [done.text for done in loaded.generate(["def f("], max_new_tokens=20)] == [
        done.text for done in runtime.generate(["def f("], max_new_tokens=20)
    ]


def test_a_graph_that_does_not_name_them_is_refused(llama: Exported, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((llama.fp32 / name).read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(BadInput, match="gives no embeddings"):
        Runtime.load(tmp_path, verify=False, hidden_states=True)
