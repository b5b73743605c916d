"""Costs of real models, timed in turn, each in a process of its own; prices, ratios and what may be compared."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.evals.cost import runner
from limbeck.evals.cost import worker as cost_worker
from limbeck.evals.cost.flops import flops_per_token
from limbeck.evals.cost.measure import (
    PROTOCOL,
    cost_at_batch,
    group_by_memory,
    is_comparable,
    is_same_run,
    measure_costs,
    median_estimate,
    paired_cost_ratio,
    reprice,
)
from limbeck.evals.cost.runner import TimingPlan
from limbeck.registry.catalog.model_ref import ResolvedModel, resolve_model
from limbeck.registry.core.digest import file_digests, folder_digest
from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.records import Cost, Engine
from tests.conftest import make_model

BRIEF = TimingPlan(batches=(1, 2), rounds=4, threads=1, prompt_tokens=16, new_tokens=8)


def model_in(folder: Path, engine: Engine = "torch") -> ResolvedModel:
    return ResolvedModel(folder, folder_digest(folder), str(folder), None, engine)


@pytest.fixture(scope="module")
def costs(tiny_llama: Path, onnx_llama: Path) -> list[Cost]:
    """Of tiny_llama and of its ONNX export, measured in one run while this process holds 300 MB."""
    memory_of_this_process = bytearray(300_000_000)
    memory_of_this_process[::4096] = b"x" * len(memory_of_this_process[::4096])
    return measure_costs([resolve_model(str(tiny_llama)), resolve_model(str(onnx_llama))], BRIEF)


def test_the_facts_of_each_model(costs: list[Cost], tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch_cost, onnx_cost = costs
    assert torch_cost.params == AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()
    # The graph may lack weights that were folded into others.
    assert onnx_cost.params == pytest.approx(torch_cost.params, rel=0.05)
    assert torch_cost.disk_bytes == sum((tiny_llama / name).stat().st_size for name in file_digests(tiny_llama))
    assert "torch" in torch_cost.machine
    assert "onnxruntime" in onnx_cost.machine
    assert onnx_cost.flops_per_token == torch_cost.flops_per_token == flops_per_token(tiny_llama, (16 + 8 + 1) / 2)
    for cost in costs:
        assert (cost.prompt_tokens, cost.new_tokens, cost.threads, cost.requests) == (16, 8, 1, 4)
        assert (cost.protocol, cost.device) == (PROTOCOL, "cpu")
        assert [load.batch for load in cost.loads] == [1, 2]


def test_speeds_and_dollars_agree(costs: list[Cost]) -> None:
    for cost in costs:
        for load in cost.loads:
            assert len(load.request_ms) == 4
            assert load.p50_ms == pytest.approx(np.median(load.request_ms))
            assert 0 < load.p50_ms <= load.p95_ms <= max(load.request_ms)
            seconds = load.p50_ms / 1000
            # The first new token comes with the prefill.
            parts = load.batch * (16 / load.prefill_tokens_per_s + 7 / load.decode_tokens_per_s)
            assert parts == pytest.approx(seconds)
            an_hour = load.batch * (16 + 8) * 3600 / seconds
            assert load.usd_per_million_tokens == pytest.approx(1 / an_hour * 1e6)
        one = cost.loads[0]
        assert (cost.p50_ms, cost.p95_ms, cost.usd_per_million_tokens) == (
            one.p50_ms,
            one.p95_ms,
            one.usd_per_million_tokens,
        )
        assert cost.intervals["usd_per_million_tokens"]
        assert cost.intervals["p50_ms"]
        assert cost.intervals["p50_ms"].low == min(one.request_ms)
        assert cost.intervals["p50_ms"].confidence == pytest.approx(1 - 2 / 2**4)
        assert cost.intervals["usd_per_million_tokens"].value == pytest.approx(cost.usd_per_million_tokens)
        assert cost.intervals["usd_per_million_tokens"].low / cost.intervals[
            "usd_per_million_tokens"
        ].value == pytest.approx(cost.intervals["p50_ms"].low / cost.intervals["p50_ms"].value)


def test_peak_memory_is_that_of_the_model_alone(costs: list[Cost]) -> None:
    # The worker's ru_maxrss would include what the process that started it holds.
    assert costs[1].peak_rss_bytes < 200_000_000 < costs[0].peak_rss_bytes
    for cost in costs:
        one, two = cost.loads
        assert cost.peak_rss_bytes == one.peak_rss_bytes <= two.peak_rss_bytes


def test_a_ratio_is_over_paired_rounds(costs: list[Cost]) -> None:
    a, b = costs
    assert is_same_run(a, b)
    for batch in (1, 2):
        each = np.divide(cost_at_batch(a, batch).request_ms, cost_at_batch(b, batch).request_ms)
        found = paired_cost_ratio(a, b, batch)
        assert (found.value, found.low, found.high) == pytest.approx((np.median(each), each.min(), each.max()))
    with pytest.raises(BadInput, match="batches of 8 were not measured"):
        paired_cost_ratio(a, b, 8)
    # A disturbance of the machine that slows both models does not change the ratio.
    load = a.loads[0]
    slow = [(1 + place) * ms for place, ms in enumerate(load.request_ms)]
    twice = load.model_copy(update={"request_ms": tuple(2 * ms for ms in slow)})
    disturbed = a.model_copy(update={"loads": (load.model_copy(update={"request_ms": tuple(slow)}),)})
    steady = paired_cost_ratio(a.model_copy(update={"loads": (twice,)}), disturbed)
    assert (steady.value, steady.low, steady.high) == pytest.approx((2, 2, 2))


def test_another_price_scales_the_dollars(costs: list[Cost]) -> None:
    cost = costs[0]
    repriced = reprice(cost, 2.0, "mine")
    assert repriced.price == "mine"
    assert repriced.usd_per_million_tokens == pytest.approx(2 * cost.usd_per_million_tokens)
    assert repriced.loads[1].usd_per_million_tokens == pytest.approx(2 * cost.loads[1].usd_per_million_tokens)
    assert repriced.intervals["usd_per_million_tokens"]
    assert cost.intervals["usd_per_million_tokens"]
    assert repriced.intervals["usd_per_million_tokens"].high == pytest.approx(
        2 * cost.intervals["usd_per_million_tokens"].high
    )
    assert (repriced.p50_ms, repriced.intervals["p50_ms"]) == (cost.p50_ms, cost.intervals["p50_ms"])
    assert not is_comparable(repriced, cost)
    assert reprice(repriced, 1.0) == cost


def test_which_costs_may_be_compared(costs: list[Cost]) -> None:
    cost = costs[0]
    later = cost.model_copy(update={"run": "another"})
    assert is_comparable(cost, later)
    assert not is_same_run(cost, later)
    for changes in ({"threads": 2}, {"new_tokens": 9}, {"protocol": 1}, {"machine": "other; torch"}):
        assert not is_comparable(cost, cost.model_copy(update=changes))
    without_run = cost.model_copy(update={"run": None})
    assert not is_same_run(without_run, without_run)


def test_the_shortest_context_shortens_the_requests_of_all_models(
    onnx_llama: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(onnx_llama, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    models = [model_in(onnx_llama, "onnxruntime"), model_in(short, "onnxruntime")]
    rounds: list[tuple[int, int]] = []
    plan = TimingPlan(rounds=3, batches=(1,), threads=1)
    found = measure_costs(models, plan, on_round=lambda *done: rounds.append(done))
    assert [(cost.prompt_tokens, cost.new_tokens) for cost in found] == [(10, 10), (10, 10)]
    assert rounds == [(1, 3), (2, 3), (3, 3)]


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch, onnx_llama: Path) -> None:
    """A B A B, batch by batch; no more rounds than the time allows, but enough for an interval."""
    timed: list[tuple[str, int]] = []
    time_batch = runner._Worker.time_batch

    def record(worker: Any, batch: int, new_tokens: int) -> Any:
        timed.append((worker.label, batch))
        return time_batch(worker, batch, new_tokens)

    monkeypatch.setattr(runner._Worker, "time_batch", record)
    models = [replace(model_in(onnx_llama, "onnxruntime"), label=label) for label in "AB"]
    nine = replace(BRIEF, rounds=9)
    a, b = measure_costs(models, replace(nine, seconds=0))
    assert timed == [("A", 1), ("B", 1)] * 6 + [("A", 2), ("B", 2)] * 6
    timed.clear()
    measure_costs(models, replace(nine, seconds=600))
    assert timed == [("A", 1), ("B", 1)] * 9 + [("A", 2), ("B", 2)] * 6
    assert a.intervals["p50_ms"]
    assert a.intervals["p50_ms"].confidence == 0.95
    assert a.run == b.run is not None


# --- the interval of a median


def test_the_interval_of_a_median() -> None:
    # Ranks for 95% from tables of the sign test.
    for n, rank in ((6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (15, 4), (20, 6), (30, 10)):
        found = median_estimate(np.arange(1, n + 1))
        assert (found.low, found.high, found.confidence) == (rank, n + 1 - rank, 0.95)
        assert found.value == (n + 1) / 2
    assert median_estimate([3.0]).confidence == 0
    assert median_estimate([3.0, 1.0, 2.0]).confidence == pytest.approx(0.75)


@pytest.mark.parametrize("n", [6, 10, 17])
def test_the_interval_covers_the_median_at_its_confidence(n: int) -> None:
    draws = np.random.default_rng(0).lognormal(size=(4000, n))  # of median 1
    covered = np.mean([found.low <= 1 <= found.high for found in map(median_estimate, draws)])
    assert covered > 0.94


# --- FLOPs


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=300, pad_token_id=0)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=48)
MIXTURES_AND_HYBRIDS = {
    "mixtral": EXPERTS | dict(num_local_experts=4),
    "qwen2_moe": EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=40),
    "gpt_oss": EXPERTS | dict(num_local_experts=4, head_dim=16),
    "glm4_moe": EXPERTS | dict(n_routed_experts=4, head_dim=16),
    "gemma4_text": dict(
        head_dim=16, global_head_dim=32, hidden_size_per_layer_input=8, vocab_size_per_layer_input=300,
        layer_types=["sliding_attention", "full_attention"], enable_moe_block=True, num_experts=4, top_k_experts=2,
        moe_intermediate_size=48,
    ),
    "qwen3_5_text": dict(
        head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "qwen2", *MIXTURES_AND_HYBRIDS])
def test_flops_of_one_token_equal_those_that_torch_counts(kind: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    """In a decoding step with 40 tokens in the cache."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind in MIXTURES_AND_HYBRIDS:
        config = AutoConfig.for_model(kind, **SIZES | MIXTURES_AND_HYBRIDS[kind])
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    else:
        make_model(tmp_path, tokenizer_folder, kind)
    # The counter does not know the grouped product that experts use by default.
    kinds = dict(attn_implementation="eager", experts_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **kinds).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.ones(1, 40, dtype=torch.long), use_cache=True).cache
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.ones(1, 1, dtype=torch.long), cache=cache, use_cache=True)
    # Rotary embeddings are products too, but are left out. transformers' convolution computes an output that it drops.
    tolerance = 1e-2 if kind in ("qwen3_5_text", "lfm2") else 1e-3
    assert flops_per_token(tmp_path, 41) == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_flops_of_an_unknown_model_are_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert flops_per_token(tmp_path, 1) is None


# --- memory, and workers that fail


def test_models_that_do_not_fit_together_are_measured_in_several_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model_of_size(label: str, megabytes: float) -> ResolvedModel:
        folder = tmp_path / label
        folder.mkdir()
        with open(folder / "model.safetensors", "wb") as file:
            file.truncate(int(megabytes * 1e6))
        return ResolvedModel(folder, label, label, None, "torch")

    sizes = {"teacher": 2, "a": 1, "b": 1, "c": 3, "d": 1}  # megabytes
    teacher, *students = [model_of_size(*each) for each in sizes.items()]
    monkeypatch.setattr("limbeck.evals.cost.measure._gpu_memory", lambda: float("inf"))

    def labels(room: float, **more: Any) -> list[str]:
        # The estimate: half a gigabyte for each process, plus three times the files of its model.
        monkeypatch.setattr("limbeck.evals.cost.measure.available_memory", lambda: room)
        return ["".join(model.label[0] for model in group) for group in group_by_memory([teacher, *students], **more)]

    half = 2**29
    assert labels(1e12, teacher=teacher) == ["tabcd"]
    assert labels((3 * half + 3 * 4e6) / 0.8, teacher=teacher) == ["tab", "tc", "td"]
    assert labels((3 * half + 3 * 4e6) / 0.8) == ["tab", "cd"]
    assert labels(0, teacher=teacher) == ["ta", "tb", "tc", "td"]  # tried although it does not fit
    assert list(group_by_memory([teacher], teacher)) == [[teacher]]


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_an_end_of_text_token_does_not_end_a_request(
    engine: Engine, tiny_llama: Path, onnx_llama: Path, tmp_path: Path
) -> None:
    """A model that only generates the end-of-text token is timed over the whole length."""
    folder = tmp_path / "ends"
    shutil.copytree(tiny_llama if engine == "torch" else onnx_llama, folder)
    _always_end(folder, engine)
    setting = {"folder": str(folder), "engine": engine, "prompt_tokens": 8, "threads": 1, "cpus": None}
    answers = io.StringIO()
    requests = io.StringIO('{"batch": 2, "new_tokens": 16}\n' * 2)
    cost_worker.main(setting | {"trust_remote_code": False}, requests, answers)
    about, *timed = map(json.loads, answers.getvalue().splitlines())
    assert about["device"] == "cpu"
    assert len(timed) == 2
    assert all(0 < each["prefill_s"] < each["request_s"] for each in timed)


def _always_end(folder: Path, engine: Engine) -> None:
    """Set every weight to zero: all logits are equal, and token 0, the end of text, is the first of them."""
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


def test_a_worker_that_dies_reports_why_and_the_others_end(onnx_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(onnx_llama, folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    models = [model_in(onnx_llama, "onnxruntime"), model_in(folder, "onnxruntime")]
    with pytest.raises(LimbeckError, match=r"broken could not be measured: .*damaged"):
        measure_costs(models, BRIEF)
    assert not _children()


def test_a_worker_that_is_killed_is_reported(onnx_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_batch: Callable[..., Any] = runner._Worker.time_batch

    def kill(worker: Any, batch: int, new_tokens: int) -> Any:
        worker._process.kill()
        worker._process.wait()
        return time_batch(worker, batch, new_tokens)

    monkeypatch.setattr(runner._Worker, "time_batch", kill)
    with pytest.raises(LimbeckError, match="killed by signal 9"):
        measure_costs([model_in(onnx_llama, "onnxruntime")], BRIEF)
    assert not _children()


def _children() -> list[str]:
    """The workers of this process that are still running."""
    import os

    return [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.read_text().rpartition(")")[2].split()[1] == str(os.getpid())
        and b"limbeck.evals.cost.worker" in (path.parent / "cmdline").read_bytes()
    ]


@pytest.mark.gpu
def test_a_gpu_is_used_and_its_memory_measured(tiny_llama: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    (cost,) = measure_costs([resolve_model(str(tiny_llama))], BRIEF)
    assert cost.device == "cuda"
    assert torch.cuda.get_device_name(0) in cost.machine
    assert cost.peak_device_bytes
    assert cost.peak_device_bytes >= 4 * cost.params
