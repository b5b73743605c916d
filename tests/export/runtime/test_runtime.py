"""The torch-free runtime, compared with transformers on the same weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from limbeck.export.runtime import session
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from tests.export.export_helpers import Exported, rewrite_manifest

PROMPTS = ["def add(a", "class Vessel:\n    def", "i"]


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> Callable[[list[int]], np.ndarray]:
    """(T,) token ids -> (T, V) natural-log probabilities by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()

    def logprobs(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    return logprobs


def test_greedy_tokens_equal_those_of_transformers_for_every_family(family: Exported) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    runtime = Runtime.load(family.fp32, threads=1)
    model = AutoModelForCausalLM.from_pretrained(family.torch).eval()
    batch = runtime.generate(PROMPTS, max_new_tokens=20)
    for prompt, completion in zip(PROMPTS, batch, strict=True):
        ids = torch.tensor([runtime.encode(prompt)])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert ids[0].tolist() + completion.token_ids == expected[0].tolist()
        # Without other rows and padding, a prompt has the same completion.
        assert runtime.generate([prompt], max_new_tokens=20)[0].token_ids == completion.token_ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_does_not_change_logits(runtime: Runtime, side: str) -> None:
    ids = runtime.encode("def add(a, b):")
    plain = np.array([ids])
    alone = runtime.logits(plain, np.ones_like(plain))[0]
    pad, zeros = [7] * 5, [0] * 5
    padded = pad + ids if side == "left" else ids + pad
    mask = zeros + [1] * len(ids) if side == "left" else [1] * len(ids) + zeros
    both = runtime.logits(np.array([padded, padded]), np.array([mask, mask]))
    unpadded = both[:, 5:] if side == "left" else both[:, : len(ids)]
    np.testing.assert_allclose(unpadded, np.stack([alone, alone]), atol=1e-5)


def test_logprobs_equal_those_of_transformers(runtime: Runtime, reference: Callable[[list[int]], np.ndarray]) -> None:
    (completion,) = runtime.generate(["for i in"], max_new_tokens=12, temperature=1.0, seed=3, logprobs=2)
    prompt = runtime.encode("for i in")
    expected = reference(prompt + completion.token_ids)[len(prompt) - 1 : -1]
    assert completion.logprobs == pytest.approx(
        [step[token] for step, token in zip(expected, completion.token_ids, strict=True)], abs=1e-4
    )
    assert completion.top_logprobs is not None
    for step, top in zip(expected, completion.top_logprobs, strict=True):
        assert list(top.values()) == pytest.approx(sorted(step)[:-3:-1], abs=1e-4)
        assert [step[token] for token in top] == pytest.approx(list(top.values()), abs=1e-4)


def test_a_prompt_in_chunks_gives_the_same_logits_and_tokens(
    runtime: Runtime, reference: Callable[[list[int]], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = runtime.encode("The quick brown fox jumps over the lazy dog.")
    whole = runtime.generate([ids, ids[:4]], max_new_tokens=8)
    monkeypatch.setattr(session, "PREFILL_LOGITS", 5 * runtime.vocab_size)
    pieces = list(runtime.prompt_logits(ids))
    assert {len(piece) for piece in pieces[:-1]} == {5}
    logits = np.concatenate(pieces).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(logprobs, reference(ids), atol=1e-4)
    again = runtime.generate([ids, ids[:4]], max_new_tokens=8)
    assert [completion.token_ids for completion in again] == [completion.token_ids for completion in whole]


def test_streamed_texts_join_to_the_completion(runtime: Runtime) -> None:
    settings = dict(max_new_tokens=60, temperature=1.5, seed=11, ignore_eos=True)
    pieces = list(runtime.stream("print(", **settings))
    (completion,) = runtime.generate(["print("], **settings)
    assert len(pieces) > 5
    assert "".join(pieces) == completion.text
    prompt = runtime.encode("print(")
    assert runtime.decode(prompt) + completion.text == runtime.decode(prompt + completion.token_ids)


def test_a_seed_reproduces_the_draws_and_rows_draw_independently(runtime: Runtime) -> None:
    settings = dict(max_new_tokens=10, temperature=1.0)
    first, second = runtime.generate(["def", "def"], seed=5, **settings)
    assert first.token_ids != second.token_ids
    assert runtime.generate(["def"], seed=5, **settings)[0].token_ids == first.token_ids
    assert runtime.generate(["def"], seed=6, **settings)[0].token_ids != first.token_ids


def test_generation_ends_before_a_stop_string(runtime: Runtime) -> None:
    settings = dict(max_new_tokens=40, temperature=1.0, seed=2, ignore_eos=True)
    (free,) = runtime.generate(["x ="], **settings)
    stop = free.text[10:13]
    (stopped,) = runtime.generate(["x ="], stop=["never this", stop], **settings)
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < len(free.token_ids)


def test_an_end_of_text_token_ends_a_row_unless_it_is_ignored(runtime: Runtime) -> None:
    (free,) = runtime.generate(["if"], max_new_tokens=12)
    eos, runtime.eos_token_ids = runtime.eos_token_ids, {free.token_ids[4]}
    try:
        place = free.token_ids.index(free.token_ids[4])
        ended, other = runtime.generate(["if", "class A"], max_new_tokens=12)
        assert ended.token_ids == free.token_ids[: place + 1]
        assert ended.finish_reason == "stop"
        assert other.token_ids == runtime.generate(["class A"], max_new_tokens=12)[0].token_ids
        (going_on,) = runtime.generate(["if"], max_new_tokens=12, ignore_eos=True)
        assert going_on.token_ids == free.token_ids
        assert going_on.finish_reason == "length"
    finally:
        runtime.eos_token_ids = eos


def test_generation_ends_at_the_end_of_the_context(runtime: Runtime) -> None:
    ids = [5] * (runtime.max_length - 3)
    (completion,) = runtime.generate([ids], max_new_tokens=50, ignore_eos=True)
    assert len(completion.token_ids) == 3
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 128, "the context is 128"),
        ([300], "outside 0 to 299"),
        ([-1], "outside"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_invalid_prompts_are_refused(runtime: Runtime, prompt: list[int] | str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        runtime.generate([prompt], max_new_tokens=1)


def test_an_empty_prompt_becomes_the_bos_token(runtime: Runtime) -> None:
    assert runtime.generate([""], max_new_tokens=5)[0].token_ids == (
        runtime.generate([[runtime.bos_token_id]], max_new_tokens=5)[0].token_ids
    )


@pytest.fixture
def copy(llama: Exported, tmp_path: Path) -> Path:
    return shutil.copytree(llama.fp32, tmp_path / "artifact")


def test_a_flipped_bit_is_detected_before_the_graph_is_loaded(copy: Path) -> None:
    graph = bytearray((copy / "model.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (copy / "model.onnx").write_bytes(graph)
    with pytest.raises(DamagedArtifact, match=r"model\.onnx has sha256"):
        Runtime.load(copy)


def test_another_digest_than_expected_is_damage(copy: Path) -> None:
    with pytest.raises(DamagedArtifact, match="expected 000000000000"):
        Runtime.load(copy, expected_digest="0" * 64)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(DamagedArtifact, match=r"tokenizer\.json is missing"):
        Runtime.load(copy)
    (copy / "limbeck.json").unlink()
    with pytest.raises(BadInput, match=r"it has no tokenizer\.json"):
        Runtime.load(copy)


def test_a_truncated_graph_is_damage_even_if_the_manifest_agrees(copy: Path) -> None:
    graph = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(graph[: len(graph) // 2])
    rewrite_manifest(copy)
    with pytest.raises(DamagedArtifact):
        Runtime.load(copy)


def test_a_graph_of_another_kind_is_refused(copy: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 300]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, copy / "model.onnx")
    rewrite_manifest(copy)
    with pytest.raises(BadInput, match="not a causal language model with a key-value cache"):
        Runtime.load(copy)


def test_a_serving_host_needs_no_torch() -> None:
    """Import runtime, server and bundle in a new process and check the loaded modules."""
    code = (
        "import sys, limbeck.export.runtime.runtime, limbeck.export.server.app, limbeck.export.bundle.layout; "
        "print(*{'torch', 'transformers', 'optimum', 'onnx', 'mlflow', 'scipy', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
