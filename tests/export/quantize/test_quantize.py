"""Quantized variants: what is stored, what it gives, and how it is chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from limbeck.export.artifact.export import export_onnx
from limbeck.export.artifact.parity import measure_parity
from limbeck.export.artifact.variants import ExportOptions, export_folder
from limbeck.export.graph.save import save_graph
from limbeck.export.quantize.evaluate import CandidateEvaluator, CandidateScore
from limbeck.export.quantize.float16 import load_as_float16
from limbeck.export.quantize.mixed_precision import choose_plan
from limbeck.export.quantize.precisions import PRECISIONS
from limbeck.export.quantize.sample_texts import SAMPLE_TEXTS
from limbeck.export.quantize.settings import QuantizationSettings, quantization_settings
from limbeck.export.quantize.weight_only import BlockFormat, GraphWeights
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import read_manifest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.export.export_helpers import Exported, rewrite_manifest

QUANTIZED = [precision for precision in PRECISIONS if precision not in ("fp32", "int8")]
IDS = np.arange(5, 45)[None]


@pytest.fixture(scope="module")
def concatenating(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """GPT-2 (biases, learned positions, tied head) and optimum's graph of it."""
    folder = tmp_path_factory.mktemp("optimum") / "fp32"
    export_onnx(tiny_gpt2, folder, fused=False)
    return tiny_gpt2, folder


@pytest.fixture(params=["fused", "concatenating"])
def pair(request: pytest.FixtureRequest, llama: Exported) -> tuple[Path, Path]:
    """A torch model and its float32 artifact, of each kind of graph."""
    return (llama.torch, llama.fp32) if request.param == "fused" else request.getfixturevalue("concatenating")


def logits(folder: Path, ids: np.ndarray = IDS) -> np.ndarray:
    return Runtime.load(folder, verify=False, threads=1).logits(ids, np.ones_like(ids))


def with_graph(artifact: Path, model: onnx.ModelProto, to: Path) -> Path:
    """A copy of an artifact with another graph."""
    shutil.copytree(artifact, to)
    save_graph(model, to / "model.onnx")
    rewrite_manifest(to)
    return to


@pytest.mark.parametrize("precision", QUANTIZED)
def test_every_precision_of_every_graph_holds(pair: tuple[Path, Path], precision: str, tmp_path: Path) -> None:
    torch, fp32 = pair
    export_onnx(torch, tmp_path / "out", precision, fp32_artifact=fp32)
    parity = measure_parity(torch, tmp_path / "out", max_documents=4, max_tokens=48, new_tokens=8)
    assert parity.passed
    assert parity.precision == precision
    assert 0 < parity.mean_kl < {"fp16": 1e-5, "int8-static": 0.1, "int8-weight": 1e-3, "int4": 0.3}[precision]
    sizes = [(folder / "model.onnx").stat().st_size for folder in (tmp_path / "out", fp32)]
    assert sizes[0] < sizes[1]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["precision"] == precision
    assert manifest["quantization"]["requested"]["device"] == "cpu"
    assert [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def unpacked(weights: GraphWeights, weight: str, blocks: BlockFormat) -> np.ndarray:
    """(in, out) float32 that the codes of a weight stand for, by the definition of MatMulNBits."""
    product = next(item for item in weights.weight_nodes if item.weight == weight)
    codes, scales, *zeros = weights.pack(product, blocks)
    if blocks.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
    zero = np.full(scales.shape, 2 ** (blocks.bits - 1), np.float32)
    if zeros:
        packed = zeros[0]
        if blocks.bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, : scales.shape[1]]
        zero = packed.reshape(scales.shape).astype(np.float32)
    values = (codes.astype(np.float32) - zero[..., None]) * scales[..., None]
    return values.reshape(len(values), -1)[:, : product.inputs].T


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_graph_computes_with_the_weights_its_codes_stand_for(
    pair: tuple[Path, Path], bits: int, symmetric: bool, tmp_path: Path
) -> None:
    blocks = BlockFormat(bits, 32, symmetric, accuracy_level=0)
    weights = GraphWeights.from_graph(pair[1] / "model.onnx")
    quantized = with_graph(pair[1], weights.quantize(dict.fromkeys(weights.groups, blocks)), tmp_path / "quantize")
    plain = onnx.load(pair[1] / "model.onnx")
    by_name = {product.weight: product for product in weights.weight_nodes}
    for tensor in plain.graph.initializer:
        if tensor.name in by_name:
            values = unpacked(weights, tensor.name, blocks)
            turned = values.T if by_name[tensor.name].outputs_first or values.shape != tuple(tensor.dims) else values
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned.reshape(tensor.dims)), tensor.name))
    reference = with_graph(pair[1], plain, tmp_path / "plain")
    assert np.abs(logits(quantized) - logits(pair[1])).max() > 1e-3
    np.testing.assert_allclose(logits(quantized), logits(reference), atol=2e-4)


def test_no_product_with_a_weight_is_left_out_and_a_tied_table_is_stored_once(llama: Exported) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    graph = weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32))).graph
    ops = [node.op_type for node in graph.node]
    assert "MatMul" not in ops
    assert "FusedMatMul" not in ops
    assert "Gather" not in ops
    assert ops.count("GatherBlockQuantized") == 1
    vocabulary = [item for item in graph.initializer if item.dims and item.dims[0] == 300 and item.data_type == 2]
    assert sum(len(item.raw_data) for item in vocabulary) == 300 * 32 // 2 + 300  # codes and zero points
    large = [item.name for item in graph.initializer if item.data_type == 1 and np.prod(item.dims) >= 32 * 32]
    assert [name for name in large if "scales" not in name and "rotary" not in name] == []


def test_a_table_whose_width_no_block_divides_stays_as_it_is(llama: Exported) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    product = next(item for item in weights.weight_nodes if item.weight == weights.embedding)
    assert weights.format_for(product, BlockFormat(4, 128)) == BlockFormat(4, 32)  # 32 wide
    odd = type(product)(product.output_name, product.weight, True, 40, product.outputs, product.group)
    assert weights.format_for(odd, BlockFormat(4, 128)) is None


@pytest.fixture(scope="module")
def trial(llama: Exported, tmp_path_factory: pytest.TempPathFactory) -> CandidateEvaluator:
    return CandidateEvaluator(llama.fp32, tmp_path_factory.mktemp("trial"), SAMPLE_TEXTS, tokens=128)


def test_a_trial_scores_a_graph_as_parity_does(llama: Exported, trial: CandidateEvaluator, tmp_path: Path) -> None:
    same = trial.score(onnx.load(llama.fp32 / "model.onnx"))
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.bits_per_byte_change == pytest.approx(0, abs=1e-6)
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    model = weights.quantize(dict.fromkeys(weights.groups, BlockFormat(4, 32)))
    long = CandidateEvaluator(llama.fp32, tmp_path, SAMPLE_TEXTS[:3], tokens=10_000)
    score, milliseconds = long.score_and_time(model)
    parity = measure_parity(llama.torch, with_graph(llama.fp32, model, tmp_path / "int4"), SAMPLE_TEXTS[:3])
    assert long.tokens == parity.tokens
    assert score.kl == pytest.approx(parity.mean_kl, rel=1e-3)
    assert score.bits_per_byte_change == pytest.approx(
        parity.bits_per_byte / parity.bits_per_byte_reference - 1, abs=1e-5
    )
    assert milliseconds > 0


def test_a_loss_is_what_text_shows_or_what_the_model_expects() -> None:
    assert CandidateScore(kl=0.1, bits_per_byte_change=-0.2, expected_change=0.05, bytes=1).loss == 0.05
    assert CandidateScore(kl=0.1, bits_per_byte_change=0.2, expected_change=0.05, bytes=1).loss == 0.2


def test_parts_get_8_bits_until_the_loss_is_within_the_limit(llama: Exported, trial: CandidateEvaluator) -> None:
    weights = GraphWeights.from_graph(llama.fp32 / "model.onnx")
    free = choose_plan(weights, trial, 4, max_loss=1e9)
    assert "raised_to_8_bits" not in free.record
    assert {blocks.bits for blocks in free.plan.values()} == {4}
    all_kept = choose_plan(weights, trial, 4, max_loss=1e-9)
    assert {blocks.bits for blocks in all_kept.plan.values()} == {8}
    curve = all_kept.record["raised_to_8_bits"]
    assert curve[0]["part"] is None
    assert {point["part"] for point in curve[1:]} == set(weights.groups)
    assert [point["bytes"] for point in curve] == sorted(point["bytes"] for point in curve)
    assert curve[-1]["kl"] < curve[0]["kl"] / 10
    alone = all_kept.record["alone_in_8_bits"]
    gain = {part: (curve[0]["kl"] - one["kl"]) / (one["bytes"] - curve[0]["bytes"]) for part, one in alone.items()}
    assert [point["part"] for point in curve[1:]] == sorted(gain, key=lambda part: -gain[part])
    limit = min(max(one["expected_change"], one["bits_per_byte_change"]) for one in free.record["tried"]) / 2
    some = choose_plan(weights, trial, 4, max_loss=limit)
    *before, last = [
        max(point["expected_change"], point["bits_per_byte_change"]) for point in some.record["raised_to_8_bits"]
    ]
    assert last <= limit < min(before)
    assert {blocks.bits for blocks in some.plan.values()} == {4, 8}


def test_the_search_tries_blocks_symmetry_and_accuracy_and_says_so(llama: Exported, tmp_path: Path) -> None:
    export_onnx(
        llama.torch,
        tmp_path / "int4",
        "int4",
        fp32_artifact=llama.fp32,
        settings=QuantizationSettings(text_source="a test", max_change=1e9),
    )
    made = read_manifest(tmp_path / "int4")["quantization"]
    tried = [(one["block_size"], one["symmetric"], one["accuracy_level"]) for one in made["tried"]]
    assert {(block, symmetric, 4) for block in (32, 64, 128) for symmetric in (False, True)} < set(tried)
    assert [accuracy for *_, accuracy in tried].count(0) == 1
    assert all(one["decode_ms"] > 0 and one["kl"] > 0 and one["bytes"] > 0 for one in made["tried"])
    assert made["chosen_on"] == "a test"
    assert {key: made["chosen"][key] for key in ("block_size", "symmetric", "accuracy_level")} in [
        {key: one[key] for key in ("block_size", "symmetric", "accuracy_level")} for one in made["tried"]
    ]


def test_static_scales_cover_what_the_calibration_text_gave(llama: Exported, tmp_path: Path) -> None:
    text = SAMPLE_TEXTS[1]
    export_onnx(
        llama.torch,
        tmp_path / "out",
        "int8-static",
        fp32_artifact=llama.fp32,
        settings=QuantizationSettings([text], "a test"),
    )
    assert read_manifest(tmp_path / "out")["quantization"]["calibration"] == "a test"
    tensors = {
        item.name: numpy_helper.to_array(item) for item in onnx.load(tmp_path / "out/model.onnx").graph.initializer
    }
    plain = onnx.load(llama.fp32 / "model.onnx")
    name = next(node.input[0] for node in plain.graph.node if node.op_type == "MatMul")
    plain.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.array([Runtime.load(llama.fp32).encode(text)[:128]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    for item in session.get_inputs():
        if item.name not in feeds:
            feeds[item.name] = np.zeros([1, item.shape[1], 0, item.shape[3]], np.float32)
    [seen] = session.run([name], feeds)
    assert tensors[f"{name}_scale"] == pytest.approx((max(seen.max(), 0) - min(seen.min(), 0)) / 255, rel=1e-3)


def test_float16_keeps_its_cache_in_float16_and_its_logits_in_float32(llama: Exported) -> None:
    graph = load_as_float16(llama.fp32 / "model.onnx").graph
    kinds = {item.name: item.type.tensor_type.elem_type for item in (*graph.input, *graph.output)}
    assert kinds["logits"] == onnx.TensorProto.FLOAT
    assert kinds["input_ids"] == onnx.TensorProto.INT64
    assert {kind for name, kind in kinds.items() if "past" in name or "present" in name} == {onnx.TensorProto.FLOAT16}
    assert not [item.name for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT]


def test_for_cuda_int4_keeps_activations_in_float16_and_int8_is_refused(llama: Exported, tmp_path: Path) -> None:
    export_onnx(
        llama.torch,
        tmp_path / "int4",
        "int4",
        fp32_artifact=llama.fp32,
        settings=QuantizationSettings(device="cuda", max_change=1e9),
    )
    graph = onnx.load(tmp_path / "int4/model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {attribute.i for node in products for attribute in node.attribute if attribute.name == "accuracy_level"} == {
        0
    }
    scales = {node.input[2] for node in products}
    assert {item.data_type for item in graph.initializer if item.name in scales} == {onnx.TensorProto.FLOAT16}
    assert "decode_ms" not in read_manifest(tmp_path / "int4")["quantization"]["tried"][0]
    assert np.isfinite(logits(tmp_path / "int4")).all()
    with pytest.raises(BadInput, match="int8-static is for the CPU"):
        export_onnx(
            llama.torch,
            tmp_path / "int8",
            "int8-static",
            fp32_artifact=llama.fp32,
            settings=QuantizationSettings(device="cuda"),
        )
    assert not (tmp_path / "int8").exists()


def test_an_operator_without_a_kernel_is_named(
    llama: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_made(model: Path, out: Path, precision: str, **_: object) -> None:
        shutil.copytree(llama.fp32, out)
        graph = onnx.load(out / "model.onnx")
        node = next(node for node in graph.graph.node if node.op_type == "QuickGelu")
        node.op_type = "Rfft"  # for CUDA only
        del node.attribute[:]
        node.attribute.extend(
            onnx.helper.make_attribute(name, value)
            for name, value in (("signal_ndim", 1), ("normalized", 0), ("onesided", 1))
        )
        onnx.save_model(graph, out / "model.onnx")
        rewrite_manifest(out)

    monkeypatch.setattr("limbeck.export.artifact.variants.export_onnx", half_made)
    with pytest.raises(BadInput, match=r"fp32: onnxruntime has no kernel for the operator Rfft"):
        export_folder(llama.torch, tmp_path / "to", ["fp32"])


def test_a_graph_without_constant_weights_is_refused(llama: Exported, tmp_path: Path) -> None:
    graph = onnx.load(llama.fp32 / "model.onnx")
    del graph.graph.node[3:]
    artifact = with_graph(llama.fp32, graph, tmp_path / "fp32")
    with pytest.raises(BadInput, match="no product with a constant weight to store in 4 bits"):
        export_onnx(llama.torch, tmp_path / "out", "int4", fp32_artifact=artifact)


@pytest.mark.parametrize("precision", ["int4", "int8-static"])
def test_text_without_tokens_is_no_text_to_quantize_by(llama: Exported, precision: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no text to"):
        export_onnx(
            llama.torch, tmp_path / "out", precision, fp32_artifact=llama.fp32, settings=QuantizationSettings(["", ""])
        )
    assert list(tmp_path.iterdir()) == []


def test_int4_is_made_again_where_it_may_lose_more(llama: Exported, tmp_path: Path) -> None:
    told: list[str] = []
    shutil.copytree(llama.fp32, tmp_path / "fp32")
    for most, new in ((1e9, True), (1e9, False), (1e-9, True)):
        settings = QuantizationSettings(max_change=most, report=told.append)
        (made,) = export_folder(llama.torch, tmp_path, ["int4"], ExportOptions(SAMPLE_TEXTS[:2], settings))
        assert made.new is new
    assert made.quantization is not None
    assert "raised_to_8_bits" in made.to_json()["quantization"]
    assert any("embedding in 8 bits" in line for line in told)
    assert not any("fp32: exporting" in line for line in told)


def test_text_to_quantize_by_is_what_is_nearest(
    store: Store, tiny_llama: Path, tmp_path: Path, limbeck_home: Path
) -> None:
    def corpus(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"path": "a", "text": text}) + "\n")
        return path

    corpus(limbeck_home / "data/coder/train.jsonl", "trained on")
    (limbeck_home / "data/coder/corpus.json").write_text(json.dumps({"digest": "d1"}))
    known = store.register(NewVersion(name="coder", kind="student", data_digest="d1"), tiny_llama)
    unknown = known.model_copy(update={"data_digest": "d2"})
    given, heldout = corpus(tmp_path / "given.jsonl", "given"), corpus(tmp_path / "heldout.jsonl", "held out")
    cases: list[tuple[dict[str, Path], object, list[str]]] = [
        ({"calibration": given, "texts": heldout}, known, ["given"]),
        ({"texts": heldout}, known, ["trained on"]),
        ({"texts": heldout}, unknown, ["held out"]),
        ({"texts": heldout}, None, ["held out"]),
        ({}, unknown, list(SAMPLE_TEXTS)),
    ]
    for options, version, texts in cases:
        assert list(quantization_settings(version, **options).texts) == texts, (options, version)  # type: ignore[arg-type]


def test_the_command_makes_each_precision_and_says_how(
    limbeck: Callable[..., tuple[int, str, str]], llama: Exported, tmp_path: Path, limbeck_home: Path
) -> None:
    shutil.copytree(llama.fp32, tmp_path / "to/fp32")
    command = ("export", llama.torch, "--output", tmp_path / "to", "--precision", "int8-weight,fp16", "--format", "json")
    code, out, err = limbeck(*command)
    assert code == 0, err
    rows = json.loads(out)
    assert [row["precision"] for row in rows] == ["fp16", "int8-weight"]
    assert rows[1]["quantization"]["chosen"]["bits"] == 8
    assert "8 bits, blocks of 32" in err
    code, _, err = limbeck("export", llama.torch, "--device", "cuda", "--precision", "fp16,int8")
    assert code == 2
    assert "on CUDA use one of: fp32, fp16" in err
