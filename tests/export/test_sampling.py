"""Choosing tokens: against transformers' logits warpers, and against the distribution itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from export.sampling import Sampling, choose, distribution, likeliest, log_softmax
from registry.errors import BadInput

LOGITS = np.random.default_rng(0).normal(size=200).astype(np.float32) * 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.3, None, None), (2.0, 10, None), (1.0, 1, None), (1.0, None, 0.9), (0.7, 40, 0.5),
     (1.0, None, 1e-6), (1.0, 500, 1.0)],
)  # fmt: skip
def test_the_distribution_is_that_of_transformers_warpers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.from_numpy(LOGITS).double()[None]
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    for warp in warpers:
        scores = warp(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    sampling = Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(distribution(LOGITS, sampling), expected, atol=1e-12)


def test_draws_have_the_frequencies_of_the_distribution() -> None:
    sampling = Sampling(1, temperature=1.2, top_k=12)
    random = np.random.default_rng(1)
    draws = np.bincount([choose(LOGITS, sampling, random) for _ in range(4000)], minlength=len(LOGITS))
    expected = distribution(LOGITS, sampling) * 4000
    assert draws[expected == 0].sum() == 0
    assert stats.chisquare(draws[expected > 0], expected[expected > 0]).pvalue > 0.001


def test_temperature_zero_takes_the_likeliest() -> None:
    assert choose(LOGITS, Sampling(1), np.random.default_rng()) == LOGITS.argmax()


def test_log_softmax_is_scipys_even_for_great_logits() -> None:
    from scipy.special import log_softmax as expected

    logits = np.array([[1e4, -1e4, 3.0], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(log_softmax(logits), expected(logits, axis=-1))


def test_likeliest_are_in_order() -> None:
    assert likeliest(np.array([-3.0, -1.0, -2.0, -1.0]), 3) == {1: -1.0, 3: -1.0, 2: -2.0}
    assert likeliest(LOGITS, 0) == {}


@pytest.mark.parametrize(
    "setting",
    [dict(max_new_tokens=0), dict(temperature=-0.1), dict(temperature=float("nan")), dict(temperature=float("inf")),
     dict(top_k=0), dict(top_p=0.0), dict(top_p=1.1), dict(seed=-1), dict(stop="text"), dict(stop=[""]),
     dict(logprobs=-1)],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(setting))):
        Sampling(**{"max_new_tokens": 1} | setting)
