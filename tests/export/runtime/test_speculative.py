"""Speculative decoding: the tokens are those that the model chooses alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.export.artifact.export import export_onnx
from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.speculative import draft_model
from limbeck.export.runtime.speculative.draft_model import DraftModel
from limbeck.export.runtime.speculative.prompt_lookup import MAX_NGRAM, MIN_NGRAM, PromptLookup
from limbeck.registry.core.errors import BadInput
from tests.conftest import make_model
from tests.export.export_helpers import Exported

PROMPTS = ["def add(a, b):\n    return a + b\n\ndef add(", "import os\nimport sys\nimport", "for i in range(10"]
GREEDY = [{}, {"logprobs": 2}, {"stop": ["\n\n"]}, {"repetition_penalty": 1.3}, {"min_tokens": 20}]
SAMPLED = [{"temperature": 0.3, "seed": 1}, {"temperature": 1.0, "seed": 2, "top_k": 5}]


@pytest.fixture
def plain(family: Exported) -> Runtime:
    """An artifact of each family."""
    return Runtime.load(family.fp32, threads=1)


@pytest.fixture(scope="module")
def sliding(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A Mistral whose tokens see 8 tokens back."""
    folder = tmp_path_factory.mktemp("sliding")
    export_onnx(make_model(folder / "torch", tokenizer_folder, "mistral", sliding_window=8), folder / "fp32")
    return Runtime.load(folder / "fp32", threads=1)


def completions(runtime: Runtime, sampling: Sequence[dict[str, Any]]) -> list[Any]:
    """Token ids, text and log-probabilities of each prompt alone in each setting."""
    found = []
    for settings in sampling:
        for prompt in PROMPTS:
            [done] = runtime.generate([prompt], **{"max_new_tokens": 40} | settings)
            found.append((done.token_ids, done.text, done.finish_reason, done.logprobs or []))
    return found


def check_completions(runtime: Runtime, expected: list[Any]) -> None:
    for found, wanted in zip(completions(runtime, GREEDY + SAMPLED), expected, strict=True):
        assert found[:3] == wanted[:3]
        np.testing.assert_allclose(found[3], wanted[3], atol=1e-4)


def test_the_text_is_the_same_with_prompt_lookup(plain: Runtime) -> None:
    expected = completions(plain, GREEDY + SAMPLED)
    plain.speculate(prompt_lookup_num_tokens=8)
    check_completions(plain, expected)
    assert plain.speculation
    counts = plain.speculation.counts
    assert 0 < counts.accepted < counts.proposed
    assert counts.tokens == counts.plain_steps + counts.verifications + counts.accepted


def test_the_text_is_the_same_with_a_sliding_window(sliding: Runtime) -> None:
    expected = completions(sliding, GREEDY + SAMPLED)
    sliding.speculate(prompt_lookup_num_tokens=8)
    check_completions(sliding, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_text_is_the_same_with_a_draft_model(
    llama: Exported, tokenizer_folder: Path, tmp_path: Path, seed: int
) -> None:
    """A draft of the same weights, which is always right where decoding is greedy, and one of others."""
    export_onnx(make_model(tmp_path / "torch", tokenizer_folder, "llama", seed=seed), tmp_path / "draft")
    runtime = Runtime.load(llama.fp32, threads=1)
    expected = completions(runtime, GREEDY + SAMPLED)
    runtime.speculate(draft=Runtime.load(tmp_path / "draft", threads=1))
    check_completions(runtime, expected)
    assert runtime.speculation
    length = runtime.speculation.counts.acceptance_length
    assert length
    assert length > 3 or seed == 1


def test_a_draft_model_reads_what_it_missed_in_parts(llama: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a while in which the text decoded in a batch, without proposals."""
    draft, text = Runtime.load(llama.fp32, threads=1), list(range(2, 42))
    expected = DraftModel(draft).propose(text, 4)
    monkeypatch.setattr(draft_model, "PREFILL_LOGITS", 8 * draft.vocab_size)  # 8 tokens at a time
    late = DraftModel(draft)
    late.propose(text[:3], 2)
    assert late.propose(text, 4) == expected
    assert late.propose([*text, draft.vocab_size], 4) == []


def test_a_text_at_the_end_of_the_context_ends_where_it_would_alone(llama: Exported) -> None:
    runtime = Runtime.load(llama.fp32, threads=1)
    prompt = runtime.encode("a b a b a b a b a b a b")
    settings: dict[str, Any] = {"max_new_tokens": 10_000, "ignore_eos": True}
    [expected] = runtime.generate([prompt], **settings)
    runtime.speculate(prompt_lookup_num_tokens=50)
    [found] = runtime.generate([prompt], **settings)
    assert found.token_ids == expected.token_ids
    assert len(prompt) + len(found.token_ids) == runtime.max_length


def test_rows_that_decode_together_do_not_speculate_until_one_is_left(llama: Exported) -> None:
    runtime = Runtime.load(llama.fp32, threads=1)
    settings: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
    expected = [done.token_ids for done in runtime.generate(PROMPTS, **settings)]
    runtime.speculate(prompt_lookup_num_tokens=8)
    assert [done.token_ids for done in runtime.generate(PROMPTS, **settings)] == expected


def test_what_cannot_take_tokens_back_is_refused(llama: Exported, optimum_artifact: Any) -> None:
    dynamic = Runtime.load(optimum_artifact(llama.torch), threads=1)
    with pytest.raises(BadInput, match="the model's graph cannot take proposed tokens back"):
        dynamic.speculate(prompt_lookup_num_tokens=4)
    with pytest.raises(BadInput, match="the draft model's graph cannot"):
        Runtime.load(llama.fp32, threads=1).speculate(draft=dynamic)


def test_a_draft_of_another_vocabulary_is_refused(llama: Exported) -> None:
    other = Runtime.load(llama.fp32, threads=1)
    other.tokenizer.add_tokens(["another"])
    with pytest.raises(BadInput, match="another vocabulary"):
        Runtime.load(llama.fp32, threads=1).speculate(draft=other)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8))
def test_lookup_proposes_what_followed_the_last_occurrence(text: list[int], count: int) -> None:
    lookup = PromptLookup()
    for end in range(1, len(text) + 1):
        assert lookup.propose(text[:end], count) == searched(text[:end], count)


def searched(text: list[int], count: int) -> list[int]:
    """The same, by search."""
    for size in range(min(MAX_NGRAM, len(text)), MIN_NGRAM - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return text[start + size :][:count]
    return []
