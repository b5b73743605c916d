"""Costs of real models, each measured in a process of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evals import cost_worker
from evals.cost import comparable, measure, priced
from registry.digest import file_digests, folder_digest
from registry.errors import BadInput, LimbeckError
from registry.records import Cost, Engine
from registry.resolve import Model, resolve


def model_in(folder: Path, engine: Engine = "torch") -> Model:
    return Model(folder, folder_digest(folder), str(folder), None, engine)


@pytest.fixture(scope="module")
def torch_cost(tiny_llama: Path) -> Cost:
    return measure(resolve(str(tiny_llama)), usd_per_hour=0.5, requests=4, threads=1)


@pytest.fixture(scope="module")
def onnx_cost(onnx_llama: Path) -> Cost:
    return measure(resolve(str(onnx_llama)), usd_per_hour=0.5, requests=4, threads=1)


def test_a_torch_model(torch_cost: Cost, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert torch_cost.params == AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()
    assert torch_cost.disk_bytes == sum((tiny_llama / name).stat().st_size for name in file_digests(tiny_llama))
    assert (torch_cost.prompt_tokens, torch_cost.new_tokens) == (64, 64)
    assert 3 <= torch_cost.requests <= 4
    assert torch_cost.threads == 1
    assert "torch" in torch_cost.machine


def test_an_onnx_artifact(onnx_cost: Cost, torch_cost: Cost) -> None:
    # The graph may lack the weights that it folded into others.
    assert onnx_cost.params == pytest.approx(torch_cost.params, rel=0.05)
    assert "onnxruntime" in onnx_cost.machine
    assert comparable(onnx_cost, torch_cost)


def test_speeds_and_dollars_agree(torch_cost: Cost, onnx_cost: Cost) -> None:
    for cost in (torch_cost, onnx_cost):
        assert 0 < cost.p50_ms <= cost.p95_ms
        seconds = cost.p50_ms / 1000
        # The first of the new tokens comes with the prefill.
        parts = cost.prompt_tokens / cost.prefill_tokens_per_s + (cost.new_tokens - 1) / cost.decode_tokens_per_s
        assert parts == pytest.approx(seconds)
        an_hour = (cost.prompt_tokens + cost.new_tokens) * 3600 / seconds
        assert cost.usd_per_million_tokens == pytest.approx(0.5 / an_hour * 1e6)


def test_peak_memory_is_that_of_the_model_alone(onnx_llama: Path) -> None:
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    cost = measure(resolve(str(onnx_llama)), usd_per_hour=1.0, requests=3)
    # The worker's ru_maxrss would begin at what this process holds.
    assert cost.peak_rss_bytes < 200_000_000 < cost_worker.peak_rss_bytes()


def test_another_price(onnx_cost: Cost) -> None:
    dear = priced(onnx_cost, 2.0)
    assert dear.usd_per_million_tokens == pytest.approx(4 * onnx_cost.usd_per_million_tokens)
    assert dear.p50_ms == onnx_cost.p50_ms
    assert not comparable(dear, onnx_cost)


def test_a_short_context_shortens_the_request(onnx_llama: Path) -> None:
    cost = measure(resolve(str(onnx_llama)), usd_per_hour=1.0, prompt_tokens=200, new_tokens=50, requests=3)
    assert (cost.prompt_tokens, cost.new_tokens) == (64, 64)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_an_end_of_text_ends_no_request(engine: Engine, tiny_llama: Path, onnx_llama: Path, tmp_path: Path) -> None:
    """A model whose every token is the one that ends a text is timed over the whole length."""
    folder = tmp_path / "ends"
    shutil.copytree(tiny_llama if engine == "torch" else onnx_llama, folder)
    _always_end(folder, engine)
    request = {"folder": str(folder), "engine": engine, "prompt_tokens": 8, "new_tokens": 16, "requests": 3}
    seen = cost_worker.main({**request, "seconds": 9.0, "threads": 1, "trust_remote_code": False})
    assert len(seen["request_s"]) == len(seen["prefill_s"]) == 3


def _always_end(folder: Path, engine: Engine) -> None:
    """Make every weight zero: all logits are equal, and token 0, the end of text, is the first of them."""
    import numpy as np

    if engine == "torch":
        from safetensors.numpy import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        save_file({n: np.zeros_like(w) for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        return
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / "model.onnx")
    for item in graph.graph.initializer:
        if item.data_type == onnx.TensorProto.FLOAT and len(item.dims) == 2:
            item.CopyFrom(numpy_helper.from_array(np.zeros(item.dims, np.float32), item.name))
    onnx.save(graph, folder / "model.onnx")


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan")])
def test_a_price_has_to_be_above_zero(price: float, tiny_llama: Path) -> None:
    with pytest.raises(BadInput, match="dollars an hour"):
        measure(model_in(tiny_llama), usd_per_hour=price)


def test_a_worker_that_dies_says_why(onnx_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(onnx_llama, folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(LimbeckError, match=r"could not be measured: .*damaged"):
        measure(model_in(folder, "onnxruntime"), usd_per_hour=1.0)
