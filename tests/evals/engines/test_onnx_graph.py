"""Scores of fused and quantised graphs equal those of a plain run for each text, with prefixes shared or not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from limbeck.evals.engines.batches import TokenPair
from limbeck.evals.engines.engine import OnnxEngine, load_engine
from limbeck.evals.engines.onnx_graph import open_session
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.catalog.model_ref import resolve_model

KINDS = ["fp32", "optimum", "int8-weight", "int4", "fp16"]


@pytest.fixture(scope="module")
def artifact(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    onnx: Callable[[Path], Path],
    optimum_artifact: Callable[[Path], Path],
) -> Callable[[str, str], Path]:
    """(model fixture, kind) -> the artifact of this kind; "optimum" is the graph that is not fused."""
    made: dict[tuple[str, str], Path] = {}

    def export(name: str, kind: str) -> Path:
        from limbeck.export.artifact.export import export_onnx

        if (name, kind) not in made:
            model, out = request.getfixturevalue(name), tmp_path_factory.mktemp("fused") / kind
            if kind == "fp32":
                out = onnx(model)
            elif kind == "optimum":
                out = optimum_artifact(model)
            elif kind == "int4":
                quantize_to_int4(onnx(model), out)
            else:
                export_onnx(model, out, kind)
            made[name, kind] = out
        return made[name, kind]

    return export


def quantize_to_int4(source: Path, out: Path) -> None:
    """Weights in blocks of 4 bits, activations rounded to int8, by onnxruntime's own quantizer."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    logging.getLogger(nbits.__name__).setLevel(logging.WARNING)
    shutil.copytree(source, out)
    config = nbits.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, accuracy_level=4, bits=4)
    quantizer = nbits.MatMulNBitsQuantizer(onnx.load(source / "model.onnx"), algo_config=config)
    quantizer.process()
    assert any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node)
    onnx.save_model(quantizer.model.model, out / "model.onnx")
    (out / "limbeck.json").unlink()


def pairs_with_a_common_prefix(seed: int = 0) -> list[TokenPair]:
    """Texts with one long common prefix, which need more than one row, and some without it."""
    random = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return random.integers(1, 300, count).tolist()

    trunk = tokens(50)
    contexts = [trunk + tokens(int(random.integers(3, 25))) for _ in range(12)] + [tokens(30), tokens(90)]
    return [(context, tokens(int(random.integers(1, 6)))) for context in contexts for _ in range(3)]


def scores_alone(folder: Path, pairs: list[TokenPair]) -> np.ndarray:
    """The log-probability of each pair, from one run of the unchanged graph."""
    runtime = Runtime.load(folder, threads=1, verify=False)
    found = []
    for context, continuation in pairs:
        text = np.array([(context + continuation)[:-1]])
        logits = runtime.logits(text, np.ones_like(text))[0, -len(continuation) :].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found.append(logprobs[np.arange(len(continuation)), continuation].sum())
    return np.array(found)


def load_onnx_engine(folder: Path) -> OnnxEngine:
    engine = load_engine(resolve_model(str(folder)))
    assert isinstance(engine, OnnxEngine)
    return engine


@pytest.mark.parametrize("batch_tokens", [60, 1024])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_scores_equal_those_of_each_text_alone(
    artifact: Callable[[str, str], Path], name: str, kind: str, batch_tokens: int
) -> None:
    folder, pairs = artifact(name, kind), pairs_with_a_common_prefix()
    engine = load_onnx_engine(folder)
    found = dict(engine.scores(pairs, batch_tokens))
    scores = np.array([found[index][0] for index in range(len(pairs))])
    differences = np.abs(scores - scores_alone(folder, pairs))
    if kind.startswith("int"):  # rounded token by token: the last bit may change one
        assert np.median(differences) < 1e-5
        assert differences.max() < 0.01
    else:
        assert differences.max() < (0.01 if kind == "fp16" else 1e-4)
    assert engine.work.tokens_run < 1.3 * engine.work.min_tokens, "prefixes were not shared"
    assert engine.work.min_tokens < 0.5 * sum(len(context + continuation) - 1 for context, continuation in pairs)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_fused_and_quantised_graphs_get_the_inputs_that_sharing_needs(
    artifact: Callable[[str, str], Path], name: str
) -> None:
    for kind in KINDS:
        session, quantizes = open_session(artifact(name, kind))
        assert {"logit_positions", "tree_mask", "position_ids"} <= {item.name for item in session.get_inputs()}
        assert session.get_outputs()[0].shape[1] == "selected"
        assert quantizes == kind.startswith("int")


def test_the_sharing_probe_runs_with_float_activations(artifact: Callable[[str, str], Path]) -> None:
    """Without rounding, shared and plain rows agree to the last bits."""
    for kind in ("int8-weight", "int4"):
        engine: Any = load_onnx_engine(artifact("tiny_llama", kind))
        list(engine.scores([([1], [2])], 100))
        exact = engine._forward._probe.model()
        float_scores = scores_of_chains(exact, pairs_with_a_common_prefix())
        plain = scores_alone(artifact("tiny_llama", kind), pairs_with_a_common_prefix())
        assert np.abs(float_scores - plain).max() > 1e-3, "activations were rounded"


def scores_of_chains(forward: Any, pairs: list[TokenPair]) -> np.ndarray:
    from limbeck.evals.engines import batches

    requests = batches.Requests(pairs, forward.max_length)
    found = dict(batches.run_groups(forward, requests, requests.inputs.chains(), 100))
    return np.array([found[index][0] for index in range(len(pairs))])


def test_a_row_may_be_longer_than_the_context(artifact: Callable[[str, str], Path]) -> None:
    """RotaryEmbedding refuses rows of more tokens than its table has positions."""
    engine: Any = load_onnx_engine(artifact("tiny_llama", "fp32"))
    list(engine.scores([([1], [2])], 100))
    assert engine.max_length == 128
    assert engine._forward.max_shared_tokens(300) == 512
