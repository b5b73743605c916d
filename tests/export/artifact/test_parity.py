"""Parity: its numbers, and the errors in a graph that it finds: in a batch, with padding, with the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

from limbeck.export.artifact.parity import measure_parity, parity_failures
from limbeck.export.artifact.variants import require_parity
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import Refused
from limbeck.registry.records import Parity
from tests.export.export_helpers import Exported, corrupt_one_weight, rewrite_manifest

FEW: dict[str, int] = dict(max_documents=4, max_tokens=48, new_tokens=2)


def test_the_numbers_equal_those_computed_in_torch(llama: Exported) -> None:
    from torch.nn import functional

    model = AutoModelForCausalLM.from_pretrained(llama.torch, dtype=torch.float32).eval()
    runtime = Runtime.load(llama.int8, threads=1)
    kl, agreed, differences, nats, reference = [], [], [], [], []
    for row in ([runtime.encode(text)[:48]] for text in SAMPLE_TEXTS[:4]):
        with torch.inference_mode():
            theirs = model(torch.tensor(row)).logits[0].double().log_softmax(-1)
        ours = torch.from_numpy(runtime.logits(np.array(row), np.ones((1, 48), np.int64))[0]).double().log_softmax(-1)
        kl.append(functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1))
        agreed.append(ours.argmax(-1) == theirs.argmax(-1))
        differences.append((ours - theirs).abs().max())
        nats.append(functional.nll_loss(ours[:-1], torch.tensor(row[0][1:])).item() * 47)
        reference.append(functional.nll_loss(theirs[:-1], torch.tensor(row[0][1:])).item() * 47)
    parity = measure_parity(llama.torch, llama.int8, **FEW)
    all_kl = torch.cat(kl).double()
    assert parity.tokens == 4 * 48
    assert parity.mean_kl == pytest.approx(all_kl.mean().item(), rel=1e-3)
    assert parity.p99_kl == pytest.approx(all_kl.quantile(0.99).item(), rel=1e-3)
    assert parity.max_kl == pytest.approx(all_kl.max().item(), rel=1e-3)
    assert parity.max_logprob_diff == pytest.approx(max(differences).item(), rel=1e-3)
    assert parity.top1_agreement == pytest.approx(torch.cat(agreed).double().mean().item())
    ratio = sum(nats) / sum(reference)
    assert abs(ratio - 1) > 1e-5
    assert parity.bits_per_byte / parity.bits_per_byte_reference == pytest.approx(ratio, abs=1e-6)
    text = [runtime.tokenizer.decode(runtime.encode(text)[1:48]) for text in SAMPLE_TEXTS[:4]]
    size = sum(len(part.encode()) for part in text)
    assert parity.bits_per_byte == pytest.approx(sum(nats) / np.log(2) / size, rel=0.01)


def test_fp32_is_equal_in_a_batch_padded_and_cached(family: Exported) -> None:
    parity = family.variants[0].parity
    assert parity is not None
    for difference in (parity.batch_diff, parity.left_padding_diff, parity.cache_diff):
        assert difference is not None
        assert difference < 1e-4


def test_int8_in_a_batch_differs_at_most_as_much_as_quantization(family: Exported) -> None:
    parity = family.variants[1].parity
    assert parity is not None
    assert parity.passed
    for kl in (parity.batch_kl, parity.left_padding_kl, parity.cache_kl):
        assert kl < parity.mean_kl


def remove_mask(graph: Any) -> None:
    """Left padding is attended to."""

    masked = next(item for item in graph.initializer if item.name == "mask.masked")
    masked.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), masked.name))


def forget_keys(graph: Any) -> None:
    """The first layer ignores its cached keys."""
    from onnx import helper

    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    graph.node.insert(0, helper.make_node("Mul", ["past_key_values.0.key", "nothing"], ["forgotten"]))
    attention.input[3] = "forgotten"


def divide_by_batch_size(graph: Any) -> None:
    """Logits are divided by the batch size."""
    from onnx import TensorProto, helper

    last = next(node for node in graph.node if "logits" in node.output)
    last.output[0] = "whole"
    graph.node.extend([
        helper.make_node("Shape", ["input_ids"], ["texts"], start=0, end=1),
        helper.make_node("Cast", ["texts"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["whole", "number"], ["logits"]),
    ])  # fmt: skip


def make_one_logit_nan(graph: Any) -> None:
    """The logit of one token is NaN."""
    from onnx import helper

    last = next(node for node in graph.node if "logits" in node.output)
    last.output[0] = "whole"
    width = graph.output[0].type.tensor_type.shape.dim[2].dim_value
    values = np.where(np.arange(width) == 7, np.nan, 0).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(values, "nan"))
    graph.node.append(helper.make_node("Add", ["whole", "nan"], ["logits"]))


@pytest.mark.parametrize("precision", ["fp32", "int8-weight"])
@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (remove_mask, ["a text padded on the left differs"]),
        (forget_keys, ["a text padded on the left differs", "a text token by token with the cache differs"]),
        (
            divide_by_batch_size,
            ["a text in a batch differs", "a text padded on the left differs", "with the cache differs"],
        ),
        (make_one_logit_nan, ["NaN or infinite"]),
    ],
)
def test_a_broken_graph_is_refused_in_every_precision(
    llama: Exported, tmp_path: Path, precision: str, damage: Callable[[Any], None], messages: list[str]
) -> None:

    folder = tmp_path / precision
    shutil.copytree(llama.fp32.parent / precision, folder)
    model = onnx.load(folder / "model.onnx")
    damage(model.graph)
    onnx.save_model(model, folder / "model.onnx")
    rewrite_manifest(folder)
    parity = measure_parity(llama.torch, folder, **FEW)
    assert not parity.passed
    with pytest.raises(Refused, match="differs from PyTorch") as refused:
        require_parity(parity, "coder")
    assert all(message in str(refused.value) for message in messages)


def test_the_limits_of_fp32_and_of_other_precisions(llama: Exported) -> None:
    fp32, int8 = (variant.parity for variant in llama.variants)
    assert fp32 is not None
    assert int8 is not None

    def failures(parity: Parity, **changes: Any) -> list[str]:
        return parity_failures(parity.model_copy(update=changes))

    assert failures(fp32) == failures(int8) == []
    assert "greedy" in failures(fp32, greedy_identical=False)[0]
    assert failures(int8, greedy_identical=False, max_logprob_diff=9.0) == []
    assert failures(fp32, max_logprob_diff=1.1e-3)
    assert failures(fp32, cache_diff=1.1e-3)
    assert failures(int8, mean_kl=1e-3, batch_kl=0.9e-3, left_padding_kl=0.0, cache_kl=0.9e-3) == []
    assert failures(int8, mean_kl=1e-3, batch_kl=1.1e-3)
    assert failures(int8, mean_kl=1e-3, cache_kl=1.1e-3)
    assert failures(int8, cache_diff=float("inf"))


def test_a_changed_weight_fails_parity(llama: Exported, tmp_path: Path) -> None:
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    corrupt_one_weight(tmp_path / "fp32")
    parity = measure_parity(llama.torch, tmp_path / "fp32")
    assert not parity.passed
    assert parity.max_logprob_diff > 1e-3


def test_a_tokenizer_that_differs_is_refused(llama: Exported, tmp_path: Path) -> None:
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    tokenizer = json.loads((tmp_path / "fp32/tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "fp32/tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "fp32/limbeck.json").unlink()
    with pytest.raises(Refused, match="splits a text differently"):
        measure_parity(llama.torch, tmp_path / "fp32")
