"""Sampled answers: equal to transformers' greedy ones, drawn from the right distribution, ended by stop strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.distill.models.sampling import SeededSampling, TextSampler


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_equal_those_of_transformers_one_by_one(family: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = load(request.getfixturevalue(f"tiny_{family}"))
    encoded = [
        tokenizer(text)["input_ids"] for text in ("def add(", "class Vessel:\n    def", "import", "for i in range")
    ]
    writer = TextSampler(model, tokenizer, vocab_size=300, max_new_tokens=12, temperature=0.0)
    for ids, answer in zip(encoded, writer.answers(encoded, [0] * len(encoded)), strict=True):
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)
        assert answer.finished == (wanted[-1] == tokenizer.eos_token_id)
        assert answer.tokens == len(wanted) - answer.finished
        with torch.no_grad():  # the mean log-probability, from one pass over prompt and answer
            whole = torch.cat([torch.tensor(ids), wanted])
            logprobs = model(whole[None]).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert answer.logprob == pytest.approx(float(logprobs.gather(-1, wanted[:, None]).mean()), abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.5)])
def test_tokens_are_drawn_from_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0, 9.0])  # the last logit is padding of the vocabulary
    rows = 20_000
    draws = SeededSampling(range(rows), 3, 1, 5, temperature, top_p)
    chosen = draws(torch.zeros((rows, 3), dtype=torch.long), logits.expand(rows, -1)).argmax(-1).numpy()
    probs = np.exp(np.array([2.0, 1.0, 0.5, -1.0, 0.0]) / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs)
    inside = order[: np.searchsorted(probs[order].cumsum(), top_p - 1e-9) + 1]  # the fewest tokens that reach top_p
    wanted = np.zeros(6)
    wanted[inside] = probs[inside] / probs[inside].sum()
    frequencies = np.bincount(chosen, minlength=6) / rows
    assert (frequencies[wanted == 0] == 0).all()
    assert frequencies == pytest.approx(wanted, abs=4 * np.sqrt(0.25 / rows))
    # Log-probabilities are those at temperature 1, whatever the sampling temperature.
    assert float(draws.logprobs[0][0]) == pytest.approx(float(logits[:5].log_softmax(-1)[chosen[0]]))


def test_an_answer_depends_on_its_seed_but_not_on_its_batch(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    writer = TextSampler(model, tokenizer, vocab_size=300, max_new_tokens=10)
    encoded = [tokenizer(text)["input_ids"] for text in ("def add(", "class Vessel:\n    def", "import")]
    together = [answer.text for answer in writer.answers(encoded, [1, 2, 3])]
    assert [writer.answers([ids], [seed])[0].text for ids, seed in zip(encoded, [1, 2, 3], strict=True)] == together
    assert writer.answers(encoded[:1], [4])[0].text != together[0]


def test_a_stop_string_ends_an_answer(tiny_llama: Path) -> None:
    model, tokenizer = load(tiny_llama)
    encoded = [tokenizer(text)["input_ids"] for text in ("def add(", "class Vessel:")]
    settings: dict[str, Any] = dict(vocab_size=300, max_new_tokens=20, temperature=0.0)
    whole = [answer.text for answer in TextSampler(model, tokenizer, **settings).answers(encoded, [0, 0])]
    stop = whole[0][4:7]
    first, second = TextSampler(model, tokenizer, stop=(stop,), **settings).answers(encoded, [0, 0])
    assert first.text == whole[0][: whole[0].index(stop)]
    assert first.finished
    assert first.tokens < 20
    assert second.text == whole[1].partition(stop)[0]
