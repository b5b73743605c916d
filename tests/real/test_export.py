"""Each precision against PyTorch, on text that nothing was chosen on; batches of mixed lengths; a long prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import log_softmax
from limbeck.registry.checkpoints.load import load_model, load_tokenizer
from tests.conftest import Result
from tests.real.conftest import PRECISIONS


@pytest.fixture(scope="session")
def parity(artifacts: Path) -> dict[str, dict[str, Any]]:
    """Precision -> its parity report."""
    variants = json.loads((artifacts / "variants.json").read_text())
    return {variant["precision"]: variant["parity"] for variant in variants}


def test_fp32_equals_pytorch(parity: dict[str, dict[str, Any]]) -> None:
    assert parity["fp32"]["max_logprob_diff"] < 1e-3
    assert parity["fp32"]["greedy_identical"]
    assert parity["fp32"]["passed"]


def test_int8_weights_are_within_the_limits_in_text_and_in_chat(parity: dict[str, dict[str, Any]]) -> None:
    report = parity["int8-weight"]
    assert report["conversations"] == 8
    assert report["exceeded"] == []
    assert report["quality"]["mean_kl"]["high"] < 0.015
    assert report["quality"]["p99_kl"]["high"] < 0.15


def test_int4_keeps_the_blocks_of_the_gguf(parity: dict[str, dict[str, Any]]) -> None:
    """The weights were quantized to Q4_1 before: only the rounding of activations changes numbers."""
    report = parity["int4"]
    assert report["mean_kl"] < 0.02
    assert report["bits_per_byte"] < 1.01 * report["bits_per_byte_reference"]


def test_each_precision_computes_the_same_in_batches_and_with_its_cache(parity: dict[str, dict[str, Any]]) -> None:
    assert set(parity) == set(PRECISIONS.split(","))
    for precision, report in parity.items():
        for condition in ("batch", "left_padding", "cache"):
            assert report[f"{condition}_kl"] <= max(1e-5, report["mean_kl"]), (precision, condition)


def test_greedy_text_equals_that_of_transformers(artifacts: Path, smollm2: Path) -> None:
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2)
    prompts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in 1984,", "1 2 3 4 5"]
    runtime = Runtime.load(artifacts / "fp32")
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for ids, completion in zip(rows, runtime.generate(rows, max_new_tokens=32), strict=True):
        row = torch.tensor([ids])
        expected = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=32, do_sample=False)
        assert ids + completion.token_ids == expected[0].tolist()


def test_proposed_tokens_change_no_text_in_fp32(artifacts: Path, paragraphs: list[str]) -> None:
    """A passage, and the beginning of the passage again: greedy, sampled, and with int4 as the draft model."""
    runtime, draft = (Runtime.load(artifacts / name) for name in ("fp32", "int4"))
    prompts = [f"{text[:400]}\n\n{text[:40]}" for text in paragraphs[:3]]
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.7, "seed": 5}]
    texts = []
    for lookup, model in ((0, None), (10, None), (0, draft)):
        runtime.speculate(lookup, model)
        done = [runtime.generate([prompt], max_new_tokens=48, **each)[0] for prompt in prompts for each in settings]
        texts.append([completion.token_ids for completion in done])
        if runtime.speculation:
            assert (runtime.speculation.counts.acceptance_length or 0) > 1
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]


def test_a_batch_of_mixed_lengths(artifacts: Path, smollm2: Path, paragraphs: list[str]) -> None:
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2)
    ids = tokenizer(" ".join(paragraphs[:30]))["input_ids"]
    rows = [ids[:2], ids[:700], ids[5:45], ids[50:51]]
    width = max(map(len, rows))
    tokens, mask = np.zeros((2, len(rows), width), np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], mask[number, : len(row)] = row, 1
    found = Runtime.load(artifacts / "fp32").logits(tokens, mask)
    for number, row in enumerate(rows):
        with torch.inference_mode():
            alone = model(torch.tensor([row])).logits[0, -1].numpy()
        difference = log_softmax(found[number, len(row) - 1].astype(float)) - log_softmax(alone.astype(float))
        assert np.abs(difference).max() < 1e-3


def test_a_prompt_of_4000_tokens(artifacts: Path, smollm2: Path, paragraphs: list[str]) -> None:
    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2)
    ids = tokenizer(" ".join(paragraphs))["input_ids"][:4000]
    assert len(ids) == 4000
    [completion] = Runtime.load(artifacts / "fp32").generate([ids], max_new_tokens=8, logprobs=0)
    row = torch.tensor([ids])
    expected = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False)
    assert ids + completion.token_ids == expected[0].tolist()


def test_the_server_answers_in_chat(artifacts: Path) -> None:
    import openai

    from tests.export.export_helpers import serving

    with serving(artifacts / "fp32") as served:
        client = openai.OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=120)
        [model] = client.models.list()
        question: Any = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=model.id, messages=question, temperature=0, max_tokens=32)
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop"
        stream = client.chat.completions.create(
            model=model.id, messages=question, temperature=0, max_tokens=32, stream=True
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert streamed == answer.choices[0].message.content


def test_a_registered_artifact_is_run_by_its_name(
    smollm2: Path, artifacts: Path, store: Any, limbeck: Callable[..., Result]
) -> None:
    """Register the checkpoint that exists already, and what was exported of it."""
    del store
    for folder in (smollm2, artifacts / "fp32"):
        registered = limbeck("register", folder, "--name", "smollm2", "--licence", "Apache-2.0", "--format", "json")
        assert registered.code == 0, registered.err
    command = ("generate", "smollm2/2", "The capital of France is", "--max-new-tokens", 1, "--format", "json")
    assert json.loads(limbeck(*command).out)[0]["text"] == " Paris"
