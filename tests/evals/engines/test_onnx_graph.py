"""Scores of fused and quantised graphs: those of a plain run of the graph for each text, prefixes shared or not."""

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

KINDS = ["fp32", "optimum", "int8", "int4", "fp16", "int8-static"]


@pytest.fixture(scope="module")
def artifact(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, onnx: Callable[[Path], Path]
) -> Callable[[str, str], Path]:
    """(model, kind) -> its artifact; "optimum" is the graph that is not fused."""
    made: dict[tuple[str, str], Path] = {}

    def of(name: str, kind: str) -> Path:
        from limbeck.export.artifact.export import export_onnx

        if (name, kind) not in made:
            model, out = request.getfixturevalue(name), tmp_path_factory.mktemp("fused") / kind
            if kind == "fp32":
                out = onnx(model)
            elif kind == "int4":
                four_bits(onnx(model), out)
            else:
                export_onnx(model, out, "fp32" if kind == "optimum" else kind, fused=kind != "optimum")
            made[name, kind] = out
        return made[name, kind]

    return of


def four_bits(source: Path, out: Path) -> None:
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


def shared(seed: int = 0) -> list[TokenPair]:
    """Texts below one long beginning, more than one row of them, and some that are alone."""
    random = np.random.default_rng(seed)

    def tokens(count: int) -> list[int]:
        return random.integers(1, 300, count).tolist()

    trunk = tokens(50)
    contexts = [trunk + tokens(int(random.integers(3, 25))) for _ in range(12)] + [tokens(30), tokens(90)]
    return [(context, tokens(int(random.integers(1, 6)))) for context in contexts for _ in range(3)]


def alone(folder: Path, pairs: list[TokenPair]) -> np.ndarray:
    """Each pair's log-probability by one run of the unchanged graph."""
    runtime = Runtime.load(folder, threads=1, verify=False)
    found = []
    for context, continuation in pairs:
        text = np.array([(context + continuation)[:-1]])
        logits = runtime.logits(text, np.ones_like(text))[0, -len(continuation) :].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found.append(logprobs[np.arange(len(continuation)), continuation].sum())
    return np.array(found)


def engine_of(folder: Path) -> OnnxEngine:
    engine = load_engine(resolve_model(str(folder)))
    assert isinstance(engine, OnnxEngine)
    return engine


@pytest.mark.parametrize("batch_tokens", [60, 1024])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_scores_are_those_of_each_text_alone(
    artifact: Callable[[str, str], Path], name: str, kind: str, batch_tokens: int
) -> None:
    folder, pairs = artifact(name, kind), shared()
    engine = engine_of(folder)
    found = dict(engine.scores(pairs, batch_tokens))
    scores = np.array([found[index][0] for index in range(len(pairs))])
    differences = np.abs(scores - alone(folder, pairs))
    if kind.startswith("int8"):  # activations, of a static graph those of the tied head, are quantised batch by batch
        assert np.median(differences) < 0.05 * np.std(scores)
    elif kind == "int4":  # rounded token by token: a last bit may tip one over
        assert np.median(differences) < 1e-5
        assert differences.max() < 0.01
    else:
        assert differences.max() < (0.01 if kind == "fp16" else 1e-4)
    assert engine.work.tokens_run < 1.3 * engine.work.min_tokens, "prefixes were not shared"
    assert engine.work.min_tokens < 0.5 * sum(len(context + continuation) - 1 for context, continuation in pairs)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_fused_and_quantised_graphs_have_the_form_that_sharing_needs(
    artifact: Callable[[str, str], Path], name: str
) -> None:
    for kind in KINDS:
        session, quantizes = open_session(artifact(name, kind))
        assert {"logit_positions", "tree_mask", "position_ids"} <= {item.name for item in session.get_inputs()}
        assert session.get_outputs()[0].shape[1] == "selected"
        assert quantizes == kind.startswith("int")


def test_the_model_is_asked_with_activations_as_they_are(artifact: Callable[[str, str], Path]) -> None:
    """Then a graph that rounds them is exact too: shared and plain rows agree to the last bits."""
    for kind in ("int8", "int4"):
        asked: Any = engine_of(artifact("tiny_llama", kind))
        list(asked.scores([([1], [2])], 100))
        exact = asked._forward._probe.model()
        float_scores = alone_by(exact, shared())
        plain = alone(artifact("tiny_llama", kind), shared())
        assert np.abs(float_scores - plain).max() > 1e-3, "activations were rounded all the same"


def alone_by(forward: Any, pairs: list[TokenPair]) -> np.ndarray:
    from limbeck.evals.engines import batches

    requests = batches.Requests(pairs, forward.max_length)
    found = dict(batches.run_groups(forward, requests, requests.inputs.chains(), 100))
    return np.array([found[index][0] for index in range(len(pairs))])


def test_a_row_may_be_longer_than_the_context(artifact: Callable[[str, str], Path]) -> None:
    """RotaryEmbedding's table has a row for each position, and refuses more tokens than that at once."""
    engine: Any = engine_of(artifact("tiny_llama", "fp32"))
    list(engine.scores([([1], [2])], 100))
    assert engine.max_length == 128
    assert engine._forward.max_shared_tokens(300) == 512
