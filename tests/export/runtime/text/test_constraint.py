"""Texts under a grammar, and the other settings of what may follow and what ends a text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from limbeck.export.runtime.runtime import Runtime
from limbeck.export.runtime.sampling import Sampling
from limbeck.export.runtime.text.constraint import GrammarCompiler
from limbeck.registry.core.errors import BadInput

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Rom", "Bern é"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "size"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = f"start: %json {json.dumps(SCHEMA)}"


@pytest.fixture(scope="module")
def compiler(runtime: Runtime) -> GrammarCompiler:
    return GrammarCompiler(runtime.tokenizer, runtime.vocab_size, runtime.eos_token_ids)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 4, "top_k": 5}, {"repetition_penalty": 1.9}])
def test_texts_follow_the_schema(runtime: Runtime, compiler: GrammarCompiler, settings: dict[str, Any]) -> None:
    constraint = compiler.compile(GRAMMAR)
    for done in runtime.generate(["def", "x"], max_new_tokens=60, logprobs=2, constraint=constraint, **settings):
        value = json.loads(done.text)
        assert value["city"] in ("Rom", "Bern é")
        assert 0 <= value["size"] <= 99
        assert done.finish_reason == "stop"
        assert len(done.logprobs or []) == len(done.token_ids)


def test_a_text_without_a_constraint_is_the_same_beside_one_with(runtime: Runtime, compiler: GrammarCompiler) -> None:
    ids = runtime.prompt_ids("def f(")
    (alone,) = runtime.generate([ids], max_new_tokens=8)
    constrained = runtime.start_generation(0, ids, Sampling(8, constraint=compiler.compile(GRAMMAR)))
    free = runtime.start_generation(1, ids, Sampling(8))
    logits = list(runtime.prompt_logits(ids))[-1][-1]
    kept = logits.copy()
    first = constrained.choose_token(logits)
    assert free.choose_token(logits).token_id == alone.token_ids[0]
    assert runtime.decode([first.token_id]).startswith("{")
    assert (logits == kept).all()


def test_a_text_may_end_where_the_grammar_allows_it(runtime: Runtime, compiler: GrammarCompiler) -> None:
    constraint = compiler.compile('start: "a" "b"*').start()
    (a, b), (end,) = runtime.encode("ab"), runtime.eos_token_ids
    assert np.flatnonzero(constraint.allowed_tokens()).tolist() == [a]
    assert not constraint.accept(a)
    allowed = constraint.allowed_tokens()
    assert allowed[end]
    assert allowed[b]
    with pytest.raises(BadInput, match="constraint failed"):
        constraint.accept(a)


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    assert compiler.compile(GRAMMAR) is compiler.compile(GRAMMAR)
    with pytest.raises(BadInput, match="Invalid type: foo"):
        compiler.compile('start: %json {"type": "foo"}')


def test_no_end_before_min_tokens(runtime: Runtime) -> None:
    (end,) = runtime.eos_token_ids
    likely_end: dict[str, Any] = dict(max_new_tokens=9, logit_bias={end: 100})
    assert runtime.generate(["x"], **likely_end)[0].token_ids == [end]
    done = runtime.generate(["x"], **likely_end, min_tokens=4)[0]
    assert [token == end for token in done.token_ids] == [False] * 4 + [True]
    with pytest.raises(BadInput, match="min_tokens"):
        Sampling(4, min_tokens=5)


def test_stop_token_ids_end_a_text(runtime: Runtime) -> None:
    (whole,) = runtime.generate(["def f("], max_new_tokens=8, ignore_eos=True)
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    (done,) = runtime.generate(["def f("], max_new_tokens=8, ignore_eos=True, stop_token_ids=[token])
    assert done.token_ids == whole.token_ids[: first + 1]
    assert done.text == runtime.decode(whole.token_ids[:first])
    assert done.finish_reason == "stop"
    with pytest.raises(BadInput, match="stop_token_ids"):
        runtime.generate(["x"], max_new_tokens=1, stop_token_ids=[runtime.vocab_size])


def test_special_tokens_can_stay_in_the_text(runtime: Runtime) -> None:
    (end,) = runtime.eos_token_ids
    settings: dict[str, Any] = dict(max_new_tokens=2, logit_bias={end: 100}, ignore_eos=True)
    assert runtime.generate(["x"], **settings)[0].text == ""
    assert runtime.generate(["x"], **settings, skip_special_tokens=False)[0].text == "<|endoftext|>" * 2
