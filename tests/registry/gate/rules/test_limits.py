"""Intervals at another confidence, and the number of documents that settles a rule, against the bounds themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from limbeck.evals.stats.estimates import clustered_difference
from limbeck.registry.gate.rules.limits import describe_documents_needed, estimate_at_confidence
from limbeck.registry.records import Estimate


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_an_interval_at_another_confidence(confidence: float) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.1, 1, 12), rng.normal(0, 1, 12)
    difference = clustered_difference(ours, theirs, np.ones(12), np.arange(12))
    found = estimate_at_confidence(difference.interval(), confidence)
    low, high = difference.bounds((1 + confidence) / 2)
    assert found is not None
    assert found.confidence == confidence
    # At least as wide as the bound at this confidence if it is widened, and nearly so if it is narrowed.
    least = 1.0 if confidence >= 0.95 else 0.8
    assert found.high - found.value >= least * (high - found.value) - 1e-12
    assert found.value - found.low >= least * (found.value - low) - 1e-12


def test_bounds_of_0_and_1_are_never_too_narrow_when_widened() -> None:
    rng = np.random.default_rng(1)
    for share in (0.0, 0.02, 0.3):
        theirs = rng.integers(0, 2, 200).astype(float)
        ours = np.where(rng.random(200) < share, 1 - theirs, theirs)
        exact = clustered_difference(ours, theirs, np.ones(200), np.arange(200))
        found = estimate_at_confidence(exact.interval(), 0.99)
        low, high = exact.bounds(0.995)
        assert found is not None
        assert found.low <= low
        assert found.high >= high


def test_without_degrees_of_freedom_nothing_is_widened() -> None:
    estimate = Estimate(value=1.0, low=0.0, high=2.0)
    assert estimate_at_confidence(estimate, 0.99) is None
    narrow = estimate_at_confidence(estimate, 0.9)
    assert narrow is not None
    assert narrow.high - 1 == pytest.approx(stats.norm.ppf(0.95) / stats.norm.ppf(0.975))
    few = estimate_at_confidence(estimate.model_copy(update={"degrees_of_freedom": 5.0}), 0.9)
    assert few is not None
    assert few.high < narrow.high  # without them an interval is not narrowed too far
    assert estimate_at_confidence(estimate, 0.95) == estimate
    assert estimate_at_confidence(estimate.model_copy(update={"confidence": 0.0}), 0.5) is None


def test_the_needed_documents_settle_a_rule_with_the_stated_power() -> None:
    stderr, documents, limit = 0.02, 400, 0.9
    half = stats.norm.ppf(0.975) * stderr
    text = describe_documents_needed(Estimate(value=0.93, low=0.93 - half, high=0.93 + half), limit, documents)
    needed = int(re.findall(r"about ([\d,]+) documents", text)[0].replace(",", ""))
    smaller = stderr * (documents / needed) ** 0.5
    assert stats.norm.sf((limit + stats.norm.ppf(0.975) * smaller - 0.93) / smaller) == pytest.approx(0.8, abs=0.002)
    below = describe_documents_needed(Estimate(value=0.89, low=0.85, high=0.93), limit, documents)
    assert "as a fail if the estimate stays the same" in below
    assert "no number of documents" in describe_documents_needed(
        Estimate(value=0.9, low=0.8, high=1.0), limit, documents
    )
    assert "no number of documents" in describe_documents_needed(
        Estimate(value=np.nan, low=np.nan, high=np.nan), limit, documents
    )
