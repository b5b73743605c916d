"""A mean of clustered documents, a paired difference of two, and the bounds of both. numpy and scipy.

Documents of one file are alike, so the error of a mean is the jackknife's over whole clusters (CR3: Bell &
McCaffrey 2002; Cameron & Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015). It stays honest where
clusters are few and of unequal size, as G / (G - 1) alone does not, and for clusters of one size it is the same.
The t quantile takes the effective number of clusters less one (Carter, Schnepel & Steigerwald 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from limbeck.registry.records import Estimate

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ClusteredEstimate:
    """A number that is, near the truth, a sum over clusters.

    Attributes:
        value: the number.
        errors: (C,) float64, what each cluster adds to its error, small-sample factor included; NaN where there
            are fewer than two clusters.
        degrees_of_freedom: the effective number of clusters, less one; at least 1.
    """

    value: float
    errors: np.ndarray
    degrees_of_freedom: float

    @property
    def stderr(self) -> float:
        return float(np.sqrt((self.errors**2).sum()))

    def interval(self) -> Estimate:
        half = self.quantile((1 + CONFIDENCE) / 2) * self.stderr
        low, high = self.value - half, self.value + half
        return Estimate(
            value=self.value, low=low, high=high, confidence=CONFIDENCE, degrees_of_freedom=self.degrees_of_freedom
        )

    def quantile(self, probability: float) -> float:
        return float(stdtrit(self.degrees_of_freedom, probability))


def clustered_mean(values: np.ndarray, weights: np.ndarray, codes: np.ndarray) -> ClusteredEstimate:
    """Weighted mean of (N,) values of documents in clusters (N,) int64.

    It is a ratio estimator, sum(w x) / sum(w). Leaving out cluster c moves it by its linearized error over
    1 - (c's share of the weight), which is what the jackknife adds up.
    """
    weights = weights / weights.sum()
    value = float((weights * values).sum())
    shares = np.bincount(codes, weights)
    clusters = np.count_nonzero(shares)
    left = 1 - shares if clusters > 1 else np.full_like(shares, np.nan)
    errors = np.sqrt(1 - 1 / clusters) / left * np.bincount(codes, weights * (values - value))
    return ClusteredEstimate(value, errors, max(1.0, 1 / float((shares**2).sum()) - 1))


def delta_method(value: float, *terms: tuple[float, ClusteredEstimate]) -> ClusteredEstimate:
    """A function of estimates, given its value and its derivative by each; as free as the least free."""
    errors = np.zeros(max(len(estimate.errors) for _, estimate in terms))
    for derivative, estimate in terms:
        errors[: len(estimate.errors)] += derivative * estimate.errors
    return ClusteredEstimate(value, errors, min(estimate.degrees_of_freedom for _, estimate in terms))


@dataclass(frozen=True)
class Difference:
    """Candidate less reference, document by document.

    Scores of 0 and 1 need more than the standard error. A mean difference of d needs a share |d| of documents, or
    more, that changed: where the standard error claims to know better, as it does where few changed or only
    those that got worse, Wilson's interval of that share is the bound. And they move in steps, so one document is
    taken off. Without both, a student that is worse by the margin would pass far more often than 5% of the time.

    Attributes:
        estimate: of the mean difference.
        independent: for scores of 0 and 1, how many independent documents would tell as much about a share;
            None for others.
        step: for scores of 0 and 1, what one document moves the mean by; else 0.
    """

    estimate: ClusteredEstimate
    effective_documents: float | None = None
    step: float = 0.0

    def negate(self) -> Difference:
        """Reference less candidate."""
        return replace(self, estimate=replace(self.estimate, value=-self.estimate.value, errors=-self.estimate.errors))

    def bounds(self, probability: float) -> tuple[float, float]:
        """The bounds that are each on the right side of the truth with `probability`."""
        return self._bounds(self.estimate.value, self.estimate.quantile(probability))

    def interval(self) -> Estimate:
        low, high = self.bounds((1 + CONFIDENCE) / 2)
        freedom = self.estimate.degrees_of_freedom
        return Estimate(
            value=self.estimate.value, low=low, high=high, confidence=CONFIDENCE, degrees_of_freedom=freedom
        )

    def p_value_above(self, threshold: float) -> float:
        """p-value of the one-sided test of "at most `threshold`"; below 0.05 just where the lower bound is above it."""
        gap = self.estimate.value - self.step - threshold
        return float(stdtr(self.estimate.degrees_of_freedom, -self._t_statistic(gap, threshold)))

    def stderr_at(self, truth: float) -> float:
        """The standard error were the true difference `truth`, in -1..1 for scores of 0 and 1."""
        if self.effective_documents is None:
            return self.estimate.stderr
        share = min(abs(truth), 1.0)
        return max(self.estimate.stderr, float(np.sqrt(share * (1 - share) / self.effective_documents)))

    def detectable(self, probability: float, power: float) -> float:
        """The smallest distance from 0 that a one-sided test finds with `power`."""
        quantile = self.estimate.quantile(probability) + self.estimate.quantile(power)
        return self._bounds(0.0, quantile)[1]

    def _bounds(self, value: float, quantile: float) -> tuple[float, float]:
        reach = quantile * self.estimate.stderr
        low, high = value - self.step, value + self.step
        if self.effective_documents is None:
            return low - reach, high + reach
        return (
            min(low - reach, -_wilson(-low, self.effective_documents, quantile)),
            max(high + reach, _wilson(high, self.effective_documents, quantile)),
        )

    def _t_statistic(self, gap: float, truth: float) -> float:
        stderr = self.stderr_at(truth)
        return gap / stderr if stderr else float(np.copysign(np.inf, gap)) if gap else 0.0


def clustered_difference(
    candidate: np.ndarray, reference: np.ndarray, weights: np.ndarray, codes: np.ndarray
) -> Difference:
    """Mean difference of (N,) values of the same documents, weighted, in clusters (N,) int64.

    How much clusters take from the documents of 0/1 scores is the largest of three design effects (Kish 1965):
    that of the difference, which a few changed documents tell little about, and those of both models' scores.
    """
    estimate = clustered_mean(candidate - reference, weights, codes)
    if not np.isin((candidate, reference), (0, 1)).all():
        return Difference(estimate)
    documents = float(weights.sum() ** 2 / (weights**2).sum())
    apart = np.arange(len(weights))
    effects = []
    for values in (candidate - reference, candidate, reference):
        if alone := clustered_mean(values, weights, apart).stderr:
            effects.append((clustered_mean(values, weights, codes).stderr / alone) ** 2)
    # Where both are right, or both wrong, on all: as if the documents of a cluster were all the same.
    independent = documents / max(1.0, *effects) if effects else min(documents, estimate.degrees_of_freedom + 1)
    return Difference(estimate, independent, 1 / documents)


def average_differences(differences: Sequence[Difference]) -> Difference:
    """The mean of the differences of K tasks (macro)."""
    share = 1 / len(differences)
    value = float(np.mean([each.estimate.value for each in differences]))
    estimate = delta_method(value, *((share, each.estimate) for each in differences))
    known = [each.effective_documents for each in differences if each.effective_documents is not None]
    if len(known) < len(differences):
        return Difference(estimate)
    independent = 1 / float(np.sum(share**2 / np.array(known)))
    return Difference(estimate, independent, float(np.sum([share**2 * each.step for each in differences])))


def cluster_codes(clusters: Any) -> np.ndarray:
    """(N,) labels of any kind -> (N,) int64 from 0."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1].reshape(-1)


def _wilson(share: float, documents: float, quantile: float) -> float:
    """The largest d that is within `quantile` of `share`, where d has a variance of |d| (1 - |d|) / documents.

    It is Wilson's upper bound (1927) of a share of documents, and goes on below 0: there it is less his lower
    bound of -share, but for a share so near 0 that some d above 0 is not excluded.
    """
    p, z2 = max(min(share, 1.0), -1.0), quantile**2
    if p * (1 - p) + z2 / (4 * documents) >= 0:
        sign = 1.0
    else:
        sign, p = -1.0, -p
    half = quantile * np.sqrt(p * (1 - p) / documents + z2 / (4 * documents**2))
    return float((sign * (p + z2 / (2 * documents)) + half) / (1 + z2 / documents))
