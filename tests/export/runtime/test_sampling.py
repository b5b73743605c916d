"""Sampling, compared with transformers' logits processors and with the expected frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.export.runtime.sampling import Sampler, Sampling, candidates, log_softmax, top_tokens
from limbeck.registry.core.errors import BadInput

LOGITS = np.random.default_rng(0).normal(size=200).astype(np.float32) * 3


Settings = dict[str, Any]


def expected(logits: np.ndarray, settings: Settings, prompt: list[int], text: list[int]) -> np.ndarray:
    """(V,) probabilities by transformers' processors and OpenAI's formula of its penalties."""
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = logits.astype(np.float64)
    for token, bias in settings.get("logit_bias", {}).items():
        scores[token] += bias
    ids, warpers = torch.tensor([prompt + text]), LogitsProcessorList()
    if penalty := settings.get("repetition_penalty"):
        scores = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(scores)[None])[0].numpy()
    for token in set(text):
        scores[token] -= settings.get("presence_penalty", 0) + settings.get("frequency_penalty", 0) * text.count(token)
    for name, warper in [("temperature", TemperatureLogitsWarper), ("top_k", TopKLogitsWarper),
                         ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)]:  # fmt: skip
        if settings.get(name):
            warpers.append(warper(settings[name]))
    return warpers(ids, torch.from_numpy(scores)[None]).softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(temperature=0.3), dict(temperature=2.0, top_k=10), dict(top_k=1), dict(top_p=0.9), dict(min_p=0.1),
     dict(temperature=0.7, top_k=40, top_p=0.5), dict(top_p=1e-6), dict(top_k=500, top_p=1.0), dict(min_p=1.0),
     dict(temperature=4.0, top_p=0.97), dict(temperature=1.5, top_k=50, top_p=0.95, min_p=0.05)],
)  # fmt: skip
def test_candidates_equal_those_of_transformers(settings: Settings) -> None:
    settings = {"temperature": 1.0} | settings
    tokens, probabilities = candidates(LOGITS, Sampling(1, **settings))
    found = np.zeros(len(LOGITS))
    found[tokens] = probabilities
    np.testing.assert_allclose(found, expected(LOGITS, settings, [], []), atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [dict(repetition_penalty=1.3), dict(repetition_penalty=0.6), dict(presence_penalty=1.5),
     dict(frequency_penalty=-0.7), dict(logit_bias={3: 30.0, 199: -5.5}),
     dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.4, logit_bias={7: 2.0}, min_p=0.02)],
)  # fmt: skip
def test_draws_have_the_expected_frequencies_after_penalties(settings: Settings) -> None:
    settings = {"temperature": 0.8} | settings
    best = int(LOGITS.argmax())
    prompt, text = [3, 50, 60, 3, best], [best, 9, 9, 3]
    logits, counts = LOGITS.copy(), np.zeros(len(LOGITS))
    for seed in range(1000):
        sampler = Sampler(Sampling(1, seed=seed, **settings), prompt, 0)
        for token in text:
            assert sampler.choose(np.where(np.arange(len(LOGITS)) == token, 1e9, 0)) == token
        counts[sampler.choose(logits)] += 1
    np.testing.assert_array_equal(logits, LOGITS)
    wanted = 1000 * expected(LOGITS, settings, prompt, text)
    assert counts[wanted == 0].sum() == 0
    often = wanted >= 5
    rest = [wanted[~often].sum()] if wanted[~often].any() else []
    got = [*counts[often], *[counts[~often].sum() for _ in rest]]
    assert stats.chisquare(got, [*wanted[often], *rest]).pvalue > 0.001


def test_the_same_seed_and_place_give_the_same_draws() -> None:
    sampling = Sampling(1, temperature=1.5, seed=2)
    first, again, other = (Sampler(sampling, [1], place) for place in (0, 0, 1))
    draws = [[sampler.choose(LOGITS) for _ in range(30)] for sampler in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]


def test_temperature_0_takes_the_most_likely_token_after_penalties() -> None:
    assert Sampler(Sampling(1), [], 0).choose(LOGITS) == LOGITS.argmax()
    second = int(np.argsort(LOGITS)[-2])
    sampler = Sampler(Sampling(2, presence_penalty=50.0), [], 0)
    assert [sampler.choose(LOGITS) for _ in range(2)] == [LOGITS.argmax(), second]


def test_all_tied_tokens_are_candidates_of_top_k() -> None:
    logits = np.zeros(1000, np.float32)
    assert len(candidates(logits, Sampling(1, temperature=1.0, top_k=3))[0]) == 1000  # as transformers
    assert len(candidates(logits, Sampling(1, temperature=1.0, top_p=0.25))[0]) == 250


def test_log_softmax_equals_scipy_even_for_large_logits() -> None:
    from scipy.special import log_softmax as expected

    logits = np.array([[1e4, -1e4, 3.0], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(log_softmax(logits), expected(logits, axis=-1))


def test_top_tokens_are_in_order() -> None:
    assert top_tokens(np.array([-3.0, -1.0, -2.0, -1.0]), 3) == {1: -1.0, 3: -1.0, 2: -2.0}
    assert top_tokens(LOGITS, 0) == {}
    assert list(top_tokens(LOGITS, 20)) == np.argsort(-LOGITS)[:20].tolist()


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40),
    st.fixed_dictionaries(
        dict(
            temperature=st.floats(0, 1e308),
            top_p=st.none() | st.floats(0, 1, exclude_min=True),
            min_p=st.none() | st.floats(0, 1),
            top_k=st.none() | st.integers(1, 100),
            repetition_penalty=st.floats(0.01, 100),
            presence_penalty=st.floats(-1000, 1000),
            frequency_penalty=st.floats(-1000, 1000),
            logit_bias=st.dictionaries(st.integers(0, 1), st.floats(-1000, 1000)),
        )
    ),
)
def test_all_settings_within_their_ranges_choose_a_token(logits: list[float], settings: dict[str, Any]) -> None:
    sampler = Sampler(Sampling(3, **settings), [0, 1], 0)
    for _ in range(3):
        assert 0 <= sampler.choose(np.array(logits, np.float32)) < len(logits)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_choose_no_token(wrong: float, temperature: float) -> None:
    with pytest.raises(BadInput, match=f"highest logit is {wrong}"):
        Sampler(Sampling(1, temperature=temperature), [], 0).choose(np.array([0, wrong, 1], np.float32))
    forbidden = np.array([-np.inf, 0, -np.inf], np.float32)
    assert Sampler(Sampling(1, temperature=temperature), [], 0).choose(forbidden) == 1


@pytest.mark.parametrize(
    "setting",
    [dict(max_new_tokens=0), dict(temperature=-0.1), dict(temperature=float("nan")), dict(temperature=float("inf")),
     dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1), dict(seed=-1), dict(stop="text"), dict(stop=[""]),
     dict(logprobs=-1), dict(min_p=-0.1), dict(min_p=1.1), dict(repetition_penalty=0.0),
     dict(repetition_penalty=1e-308), dict(presence_penalty=1e300), dict(logit_bias={1: 1e308}),
     dict(presence_penalty=float("nan")), dict(frequency_penalty=float("inf")), dict(logit_bias={-1: 1.0})],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(setting))):
        Sampling(**{"max_new_tokens": 1} | setting)
