"""Parity: its numbers, and that a graph which is wrong in a batch, padded or with its cache is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.export.artifact.parity import measure_parity, parity_failures
from limbeck.export.artifact.variants import require_parity
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import Refused
from limbeck.registry.records import Parity
from tests.export.export_helpers import Exported, rewrite_manifest

FEW: dict[str, int] = dict(max_documents=4, max_tokens=48, new_tokens=2)


def test_the_numbers_are_those_of_torch(llama: Exported) -> None:
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama.torch, dtype=torch.float32).eval()
    runtime = Runtime.load(llama.int8, threads=1)
    kl, agreed, differences, nats, reference = [], [], [], [], []
    for row in ([runtime.encode(text)[:48]] for text in SAMPLE_TEXTS[:4]):
        with torch.inference_mode():
            theirs = model(torch.tensor(row)).logits[0].log_softmax(-1)
        ours = torch.from_numpy(runtime.logits(np.array(row), np.ones((1, 48), np.int64))[0]).log_softmax(-1)
        kl.append(functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1))
        agreed.append(ours.argmax(-1) == theirs.argmax(-1))
        differences.append((ours - theirs).abs().max())
        nats.append(functional.nll_loss(ours[:-1], torch.tensor(row[0][1:])).item() * 47)
        reference.append(functional.nll_loss(theirs[:-1], torch.tensor(row[0][1:])).item() * 47)
    found = measure_parity(llama.torch, llama.int8, **FEW)
    all_kl = torch.cat(kl).double()
    assert found.tokens == 4 * 48
    assert found.mean_kl == pytest.approx(all_kl.mean().item(), rel=1e-3)
    assert found.p99_kl == pytest.approx(all_kl.quantile(0.99).item(), rel=1e-3)
    assert found.max_kl == pytest.approx(all_kl.max().item(), rel=1e-3)
    assert found.max_logprob_diff == pytest.approx(max(differences).item(), rel=1e-3)
    assert found.top1_agreement == pytest.approx(torch.cat(agreed).double().mean().item())
    ratio = sum(nats) / sum(reference)
    assert abs(ratio - 1) > 1e-5
    assert found.bits_per_byte / found.bits_per_byte_reference == pytest.approx(ratio, abs=1e-6)
    text = [runtime.tokenizer.decode(runtime.encode(text)[1:48]) for text in SAMPLE_TEXTS[:4]]
    size = sum(len(part.encode()) for part in text)
    assert found.bits_per_byte == pytest.approx(sum(nats) / np.log(2) / size, rel=0.01)


def test_fp32_is_the_same_however_it_is_run(family: Exported) -> None:
    parity = family.variants[0].parity
    assert parity is not None
    for difference in (parity.batch_diff, parity.left_padding_diff, parity.cache_diff):
        assert difference is not None
        assert difference < 1e-4


def test_int8_moves_by_no_more_than_its_own_noise(family: Exported) -> None:
    parity = family.variants[1].parity
    assert parity is not None
    assert parity.passed
    for kl in (parity.batch_kl, parity.left_padding_kl, parity.cache_kl):
        assert kl is not None
        assert 0 < kl < 4 * parity.mean_kl


def no_mask(graph: Any) -> None:
    """What is padded on the left is attended to."""
    from onnx import numpy_helper

    masked = next(item for item in graph.initializer if item.name == "mask.masked")
    masked.CopyFrom(numpy_helper.from_array(np.array(0, np.float32), masked.name))


def no_cache(graph: Any) -> None:
    """The first layer forgets its keys."""
    from onnx import helper, numpy_helper

    attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "nothing"))
    graph.node.insert(0, helper.make_node("Mul", ["past_key_values.0.key", "nothing"], ["forgotten"]))
    attention.input[3] = "forgotten"


def batch_counts(graph: Any) -> None:
    """Logits are divided by the number of texts."""
    from onnx import TensorProto, helper

    last = next(node for node in graph.node if "logits" in node.output)
    last.output[0] = "whole"
    graph.node.extend([
        helper.make_node("Shape", ["input_ids"], ["texts"], start=0, end=1),
        helper.make_node("Cast", ["texts"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["whole", "number"], ["logits"]),
    ])  # fmt: skip


def not_a_number(graph: Any) -> None:
    """One token's logit."""
    from onnx import helper, numpy_helper

    last = next(node for node in graph.node if "logits" in node.output)
    last.output[0] = "whole"
    width = graph.output[0].type.tensor_type.shape.dim[2].dim_value
    values = np.where(np.arange(width) == 7, np.nan, 0).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(values, "nan"))
    graph.node.append(helper.make_node("Add", ["whole", "nan"], ["logits"]))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_mask, ["a text padded on the left differs"]),
        (no_cache, ["a text padded on the left differs", "a text token by token with the cache differs"]),
        (batch_counts, ["a text in a batch differs", "a text padded on the left differs", "with the cache differs"]),
        (not_a_number, ["NaN or infinite"]),
    ],
)
def test_a_graph_that_is_wrong_outright_is_refused_in_every_precision(
    llama: Exported, tmp_path: Path, precision: str, damage: Callable[[Any], None], words: list[str]
) -> None:
    import onnx

    folder = tmp_path / precision
    shutil.copytree(getattr(llama, precision), folder)
    model = onnx.load(folder / "model.onnx")
    damage(model.graph)
    onnx.save_model(model, folder / "model.onnx")
    rewrite_manifest(folder)
    parity = measure_parity(llama.torch, folder, **FEW)
    assert not parity.passed
    with pytest.raises(Refused, match="differs from PyTorch") as refused:
        require_parity(parity, "coder")
    assert all(word in str(refused.value) for word in words)


def test_what_a_precision_may_do(llama: Exported) -> None:
    fp32, int8 = (variant.parity for variant in llama.variants)
    assert fp32 is not None
    assert int8 is not None

    def found(parity: Parity, **changes: Any) -> list[str]:
        return parity_failures(parity.model_copy(update=changes))

    assert found(fp32) == found(int8) == []
    assert "greedy" in found(fp32, greedy_identical=False)[0]
    assert found(int8, greedy_identical=False, max_logprob_diff=9.0) == []
    assert found(fp32, max_logprob_diff=1.1e-3)
    assert found(fp32, cache_diff=1.1e-3)
    assert found(int8, mean_kl=1e-3, batch_kl=3.9e-3) == []
    assert found(int8, mean_kl=1e-3, batch_kl=4.1e-3)
    # Weights in blocks take each token by itself.
    assert found(int8, precision="int4", mean_kl=1e-3, cache_kl=1.1e-3)
    assert found(int8, precision="int4", mean_kl=1e-3, batch_kl=0.0, left_padding_kl=0.0, cache_kl=0.9e-3) == []
    assert found(int8, cache_diff=float("inf"))
