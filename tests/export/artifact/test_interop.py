"""The same artifact, unchanged, in other programs: bare onnxruntime, optimum, onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from limbeck.export.artifact import genai
from limbeck.export.artifact.export import export_onnx
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.digest import folder_digest, read_manifest
from tests.export.export_helpers import Exported
from limbeck.export.graph.families import FAMILIES as GRAPH_FAMILIES
from tests.families import FAMILIES, Family, checkpoint

PROMPTS = ["def add(a, b):\n    return", "x", "for i in range(10):"]
NEW = 12


@pytest.fixture(scope="module", params=["fused", "int4", "optimum"])
def artifact(
    request: pytest.FixtureRequest, llama: Exported, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """An artifact with each kind of graph, and one with weights in 4 bits; nobody writes to it."""
    folder = llama.fp32 if request.param == "fused" else tmp_path_factory.mktemp("other") / "onnx"
    if request.param == "optimum":
        export_onnx(llama.torch, folder, fused=False)
    elif request.param == "int4":
        export_onnx(llama.torch, folder, "int4", fp32_artifact=llama.fp32)
    before = folder_digest(folder)
    yield folder
    assert folder_digest(folder) == before


@pytest.fixture(scope="module")
def expected(artifact: Path) -> list[list[int]]:
    """What Limbeck's runtime generates, prompt by prompt."""
    runtime = Runtime.load(artifact, threads=1)
    done = [runtime.generate([p], max_new_tokens=NEW, ignore_eos=True)[0].token_ids for p in PROMPTS]
    assert len({tuple(ids) for ids in done}) == len(PROMPTS)
    return done


def test_a_bare_onnxruntime_session_runs_it(artifact: Path, expected: list[list[int]]) -> None:
    from tokenizers import Tokenizer

    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    caches = [item for item in session.get_inputs() if item.name.startswith("past_key_values.")]
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        past = {item.name: np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32) for item in caches}
        ids, length, new = tokenizer.encode(prompt).ids, 0, []
        for _ in range(NEW):
            length += len(ids)
            feed = {"input_ids": [ids], "attention_mask": [[1] * length], "position_ids": [range(length)[-len(ids) :]]}
            logits, *present = session.run(None, {k: np.array(v, np.int64) for k, v in feed.items()} | past)
            past, ids = dict(zip(past, present, strict=True)), [int(logits[0, -1].argmax())]
            new += ids
        assert new == wanted


def test_the_manifest_tells_the_tensors(artifact: Path) -> None:
    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    manifest = read_manifest(artifact)
    types = {"int64": "tensor(int64)", "float32": "tensor(float)"}
    for key, items in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        told = {name: (types[said.split("[")[0]], said) for name, said in manifest[key].items()}
        assert list(told) == [item.name for item in items]
        for item in items:
            kind, said = told[item.name]
            assert kind == item.type
            assert said.endswith(f"[{', '.join(map(str, item.shape))}]")
    assert manifest["inputs"]["input_ids"] == "int64[batch_size, sequence_length]"


def test_optimum_runs_it_in_left_padded_batches_too(artifact: Path, expected: list[list[int]]) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    model = ORTModelForCausalLM.from_pretrained(artifact, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(artifact, local_files_only=True, padding_side="left")
    model.generation_config.eos_token_id = None  # to compare all tokens
    for prompts in [*([p] for p in PROMPTS), PROMPTS]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        new = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        texts = new[:, batch["input_ids"].shape[1] :].tolist()
        assert texts == [expected[PROMPTS.index(prompt)] for prompt in prompts]


GENAI_TYPES = {model_type for model_type, family in GRAPH_FAMILIES.items() if family.genai_type}
READ_BY_GENAI = [family for family in FAMILIES if family.model_type in GENAI_TYPES]


@pytest.mark.parametrize("family", READ_BY_GENAI, ids=lambda family: family.name.split(",")[0])
def test_onnxruntime_genai_runs_it(family: Family, tokenizer_folder: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    artifact = tmp_path / "onnx"
    digest = export_onnx(checkpoint(family, tokenizer_folder, tmp_path / "torch"), artifact)
    _compare_with_genai(og, artifact)
    assert folder_digest(artifact) == digest


@pytest.mark.parametrize("artifact", ["int4"], indirect=True)
def test_onnxruntime_genai_runs_weights_in_4_bits(artifact: Path) -> None:
    _compare_with_genai(pytest.importorskip("onnxruntime_genai"), artifact)


def _compare_with_genai(og: Any, artifact: Path) -> None:
    """Its greedy tokens are those of Limbeck's runtime."""
    runtime = Runtime.load(artifact, threads=1)
    model = og.Model(str(artifact))
    for prompt in PROMPTS[:2]:
        ids = [int(token) for token in og.Tokenizer(model).encode(prompt)]
        assert ids == runtime.encode(prompt)
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + NEW)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        new = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
        wanted = runtime.generate([prompt], max_new_tokens=NEW)[0].token_ids
        ends = runtime.eos_token_ids  # which onnxruntime-genai leaves out
        assert new
        assert new == [token for token in wanted if token not in ends]


def test_what_onnxruntime_genai_cannot_read_tells_it_nothing(
    llama: Exported, tiny_gpt2: Path, artifact: Path, tmp_path: Path
) -> None:
    export_onnx(tiny_gpt2, tmp_path / "gpt2")
    assert not (tmp_path / "gpt2" / genai.CONFIG_FILE).exists()
    assert (artifact / genai.CONFIG_FILE).exists() == (read_manifest(artifact)["graph"] == "fused")
    assert (llama.int8 / genai.CONFIG_FILE).read_bytes() == (llama.fp32 / genai.CONFIG_FILE).read_bytes()
