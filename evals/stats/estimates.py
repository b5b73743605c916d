"""Means of clustered documents, paired differences of two models, and their confidence bounds; numpy and scipy only.

Documents of one file are correlated, so the standard error of a mean is the jackknife over whole clusters (CR3: Bell &
McCaffrey 2002; Cameron & Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015). It holds with few
clusters of unequal size, where G / (G - 1) alone is too small; for clusters of equal size the two agree. The t quantile
has the effective number of clusters minus one degrees of freedom (Carter, Schnepel & Steigerwald 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from limbeck.evals.stats.skew import heaviest_share, upper_p_value, upper_reach
from limbeck.registry.records import Estimate

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ClusteredEstimate:
    """An estimate whose error is, to first order, a sum over independent clusters.

    Attributes:
        value: the estimate.
        errors: (C,) float64, each cluster's contribution to the error, with the small-sample factor; NaN if there
            are fewer than two clusters.
        degrees_of_freedom: the effective number of clusters minus one; at least 1.
    """

    value: float
    errors: np.ndarray
    degrees_of_freedom: float

    @property
    def stderr(self) -> float:
        """The standard error; NaN if there are fewer than two clusters."""
        return float(np.sqrt((self.errors**2).sum()))

    def interval(self) -> Estimate:
        """The value with its 95% interval."""
        half = self.quantile((1 + CONFIDENCE) / 2) * self.stderr
        low, high = self.value - half, self.value + half
        return Estimate(
            value=self.value, low=low, high=high, confidence=CONFIDENCE, degrees_of_freedom=self.degrees_of_freedom
        )

    def negate(self) -> ClusteredEstimate:
        """The estimate with the opposite sign."""
        return replace(self, value=-self.value, errors=-self.errors)

    def quantile(self, probability: float) -> float:
        """A quantile of the t distribution."""
        return float(stdtrit(self.degrees_of_freedom, probability))


def clustered_mean(values: np.ndarray, weights: np.ndarray, codes: np.ndarray) -> ClusteredEstimate:
    """Weighted mean of (N,) values of documents, with (N,) weights and (N,) int64 cluster codes.

    It is the ratio estimator sum(w x) / sum(w). Leaving out cluster c changes it by c's linearized error over
    1 - (c's share of the weight); the jackknife sums the squares of these changes.
    """
    weights = weights / weights.sum()
    value = float((weights * values).sum())
    shares = np.bincount(codes, weights)
    clusters = np.count_nonzero(shares)
    remaining = 1 - shares if clusters > 1 else np.full_like(shares, np.nan)
    errors = np.sqrt(1 - 1 / clusters) / remaining * np.bincount(codes, weights * (values - value))
    return ClusteredEstimate(value, errors, max(1.0, 1 / float((shares**2).sum()) - 1))


def delta_method(value: float, *terms: tuple[float, ClusteredEstimate]) -> ClusteredEstimate:
    """A function of estimates by the delta method, with the smallest of their degrees of freedom.

    Args:
        value: of the function.
        terms: (derivative of the function by the estimate, the estimate); their clusters have the same codes.
    """
    errors = np.zeros(max(len(estimate.errors) for _, estimate in terms))
    for derivative, estimate in terms:
        errors[: len(estimate.errors)] += derivative * estimate.errors
    return ClusteredEstimate(value, errors, min(estimate.degrees_of_freedom for _, estimate in terms))


@dataclass(frozen=True)
class Difference:
    """The mean difference, candidate minus reference, over the same documents.

    Scores of 0 and 1 need more than the standard error. A mean difference d needs at least a share |d| of changed
    documents. The standard error is too small if few documents changed, or if all changes go one way; then the bound
    is that of Wilson's interval for this share. Scores of 0 and 1 also move in steps, so the bounds are one independent
    document wider. Without both, a student that is worse by exactly the margin would pass far more often than 5% of the
    time. Other scores may be skewed: see `limbeck.evals.stats.skew`.

    Attributes:
        estimate: of the mean difference.
        effective_documents: for scores of 0 and 1, the number of independent documents with the same information
            about a share; None for other scores.
        step: for scores of 0 and 1, the change of the mean by one independent document; else 0.
    """

    estimate: ClusteredEstimate
    effective_documents: float | None = None
    step: float = 0.0

    def negate(self) -> Difference:
        """The difference reference minus candidate."""
        return replace(self, estimate=self.estimate.negate())

    def bounds(self, probability: float) -> tuple[float, float]:
        """One-sided lower and upper bounds, each with this confidence."""
        return self._bounds(self.estimate.value, self.estimate.quantile(probability))

    def interval(self) -> Estimate:
        """The mean difference with its 95% interval."""
        low, high = self.bounds((1 + CONFIDENCE) / 2)
        freedom = self.estimate.degrees_of_freedom
        return Estimate(
            value=self.estimate.value, low=low, high=high, confidence=CONFIDENCE, degrees_of_freedom=freedom
        )

    def p_value_above(self, threshold: float) -> float:
        """The p-value of "at most `threshold`": it is below 0.05 if and only if the 95% lower bound is above."""
        if self.effective_documents is None:
            errors, distance = -self.estimate.errors, self.estimate.value - threshold
            return upper_p_value(errors, distance, self.estimate.degrees_of_freedom)
        gap = self.estimate.value - self.step - threshold
        return float(stdtr(self.estimate.degrees_of_freedom, -self._t_statistic(gap, threshold)))

    @property
    def heaviest_share(self) -> float:
        """The share of the variance that `skew.FEW` clusters carry; 0 for scores of 0 and 1."""
        return heaviest_share(self.estimate.errors) if self.effective_documents is None else 0.0

    def stderr_at(self, truth: float) -> float:
        """The standard error if the true difference were `truth`."""
        if self.effective_documents is None:
            return self.estimate.stderr
        share = min(abs(truth), 1.0)
        return max(self.estimate.stderr, float(np.sqrt(share * (1 - share) / self.effective_documents)))

    def detectable(self, probability: float, power: float) -> float:
        """The smallest distance from 0 that a one-sided test detects with `power`."""
        quantile = self.estimate.quantile(probability) + self.estimate.quantile(power)
        return self._bounds(0.0, quantile)[1]

    def _bounds(self, value: float, quantile: float) -> tuple[float, float]:
        if self.effective_documents is None:
            errors = self.estimate.errors
            return value - upper_reach(-errors, quantile), value + upper_reach(errors, quantile)
        reach = quantile * self.estimate.stderr
        low, high = value - self.step, value + self.step
        return (
            min(low - reach, -_wilson(-low, self.effective_documents, quantile)),
            max(high + reach, _wilson(high, self.effective_documents, quantile)),
        )

    def _t_statistic(self, gap: float, truth: float) -> float:
        stderr = self.stderr_at(truth)
        if stderr:
            return gap / stderr
        return float(np.copysign(np.inf, gap)) if gap else 0.0


def clustered_difference(
    candidate: np.ndarray, reference: np.ndarray, weights: np.ndarray, codes: np.ndarray
) -> Difference:
    """The weighted mean difference of (N,) values of the same documents, with (N,) int64 cluster codes.

    For scores of 0 and 1 the effective number of documents is their number over the largest of three design effects
    of clusters (Kish 1965): that of the difference, which is unreliable if few documents changed, and those of the
    two models' scores.
    """
    estimate = clustered_mean(candidate - reference, weights, codes)
    if not np.isin((candidate, reference), (0, 1)).all():
        return Difference(estimate)
    documents = float(weights.sum() ** 2 / (weights**2).sum())
    single_codes = np.arange(len(weights))  # each document as a cluster of its own
    effects = []
    for values in (candidate - reference, candidate, reference):
        unclustered = clustered_mean(values, weights, single_codes).stderr
        if unclustered:
            effects.append((clustered_mean(values, weights, codes).stderr / unclustered) ** 2)
    # Without effects both models are right on all documents, or wrong on all: a cluster counts as one document.
    clusters = min(documents, estimate.degrees_of_freedom + 1)
    effective = documents / max(1.0, *effects) if effects else clusters
    return Difference(estimate, effective, 1 / effective)


def average_differences(differences: Sequence[Difference]) -> Difference:
    """The macro average: the mean of the differences of several tasks."""
    share = 1 / len(differences)
    value = float(np.mean([each.estimate.value for each in differences]))
    estimate = delta_method(value, *((share, each.estimate) for each in differences))
    known = [each.effective_documents for each in differences if each.effective_documents is not None]
    if len(known) < len(differences):
        return Difference(estimate)
    effective = 1 / float(np.sum(share**2 / np.array(known)))
    return Difference(estimate, effective, float(np.sum([share**2 * each.step for each in differences])))


def cluster_codes(clusters: Any) -> np.ndarray:
    """(N,) labels of any type as (N,) int64 codes from 0."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1].reshape(-1)


def _wilson(share: float, documents: float, quantile: float) -> float:
    """The largest d within `quantile` standard errors of `share`, if d has the variance |d| (1 - |d|) / documents.

    For a share above 0 it is Wilson's upper bound (1927). Below 0 it is minus his lower bound of -share, unless the
    share is so near 0 that some d above 0 is not excluded.
    """
    p, z2 = max(min(share, 1.0), -1.0), quantile**2
    sign = 1.0 if p * (1 - p) + z2 / (4 * documents) >= 0 else -1.0
    p *= sign
    half = quantile * np.sqrt(p * (1 - p) / documents + z2 / (4 * documents**2))
    return float((sign * (p + z2 / (2 * documents)) + half) / (1 + z2 / documents))
