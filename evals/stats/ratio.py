"""Retention as a ratio of two clustered means, with bounds as strict as those of the difference.

The bound of a ratio kept / whole at a limit r asks whether kept - r * whole is above 0. It is a mean over the same
documents, so its error counts that of the teacher too (Fieller 1954, "Some Problems in Interval Estimation"). For
scores of 0 and 1 that error is 0 where no answer flipped: it is at least the error that a student would have who
keeps just r and whose answers all flip one way, and the bound is one independent document wider, as for `Difference`.
The lower bound is never above what the difference's own bound says with the teacher as measured, so that what passes by
retention passes by the margin (1 - r) * whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from limbeck.evals.stats.estimates import CONFIDENCE, ClusteredEstimate, Difference
from limbeck.registry.records import Estimate

FARTHEST = 1e6  # a bound that is farther from the value is infinite


@dataclass(frozen=True)
class Ratio:
    """kept / whole, two means above chance over the same documents and clusters.

    Attributes:
        kept, whole: the quality above chance of student and teacher; more is better.
        difference: kept minus whole, with the bounds of its own.
        chance: the score that counts as 0.
    """

    kept: ClusteredEstimate
    whole: ClusteredEstimate
    difference: Difference
    chance: float = 0.0

    @property
    def value(self) -> float:
        """The share that is kept."""
        return self.kept.value / self.whole.value

    @property
    def degrees_of_freedom(self) -> float:
        """Of its bounds."""
        return self._with_fewest_clusters.degrees_of_freedom

    @property
    def _with_fewest_clusters(self) -> ClusteredEstimate:
        return min(self.kept, self.whole, key=lambda each: each.degrees_of_freedom)

    @property
    def errors(self) -> np.ndarray:
        """(C,) each cluster's contribution to the error, to first order."""
        kept, whole = _equal_lengths(self.kept.errors, self.whole.errors)
        return (kept - self.value * whole) / self.whole.value

    def bounds(self, probability: float) -> tuple[float, float]:
        """One-sided lower and upper bounds, each with this confidence."""
        quantile = self._with_fewest_clusters.quantile(probability)
        by_difference = [1 + bound / self.whole.value for bound in self.difference.bounds(probability)]
        low, high = (self._end(sign, quantile) for sign in (-1, 1))
        low = min(low, by_difference[0])
        return low, high if np.isfinite(high) else max(self.value, by_difference[1])

    def interval(self) -> Estimate:
        """The share with its 95% interval."""
        return _estimate(self.value, *self.bounds((1 + CONFIDENCE) / 2), self.degrees_of_freedom)

    def _end(self, sign: int, quantile: float) -> float:
        """The r below (sign -1) or above the value at which kept - r * whole is `quantile` standard errors from 0.

        Infinite if there is none: then the whole may be 0.
        """

        def excess(r: float) -> float:
            gap = sign * (r * self.whole.value - self.kept.value)
            return gap - self.difference.step - quantile * self._stderr_at(r)

        reach = 2.0**-6
        while excess(self.value + sign * reach) < 0:
            reach *= 2
            if reach > FARTHEST:
                return np.inf
        return float(brentq(excess, self.value, self.value + sign * reach)) if excess(self.value) < 0 else self.value

    @functools.cached_property
    def _products(self) -> tuple[float, float, float]:
        """The variances and the covariance of kept and whole: (kept, covariance, whole)."""
        kept, whole = _equal_lengths(self.kept.errors, self.whole.errors)
        return float(kept @ kept), float(kept @ whole), float(whole @ whole)

    def _stderr_at(self, r: float) -> float:
        """The standard error of kept - r * whole, at least that of answers that flip one way only."""
        kept2, both, whole2 = self._products
        measured = math.sqrt(max(0.0, kept2 - 2 * r * both + r * r * whole2))
        if self.difference.effective_documents is None:
            return measured
        right = min(1.0, self.whole.value + self.chance)  # of the teacher
        flipped = abs(1 - r) * self.whole.value
        if r <= 1:  # lost: the teacher alone is right
            flipped = min(flipped, right)
            square = (right - flipped) * (1 - r) ** 2 + flipped * r**2
        else:  # gained: the student alone is right
            flipped = min(flipped, 1 - right)
            square = right * (1 - r) ** 2 + flipped
        variance = square - ((1 - r) * self.chance) ** 2
        return max(measured, math.sqrt(max(0.0, variance) / self.difference.effective_documents))


def mean_ratio(ratios: Sequence[Ratio]) -> Estimate:
    """The mean of the ratios of several tasks, with its 95% interval.

    The interval is put together from those of the tasks, so it keeps what makes them wide (MOVER: Zou & Donner 2008,
    "Construction of confidence limits about effect measures"; with correlations from the errors of shared clusters).
    """
    value = float(np.mean([each.value for each in ratios]))
    bounds = np.array([each.bounds((1 + CONFIDENCE) / 2) for each in ratios])
    reach = np.abs(bounds - np.array([[each.value] for each in ratios]))  # (tasks, 2)
    correlation = _correlation([each.errors for each in ratios])
    low, high = (np.sqrt(max(0.0, side @ correlation @ side)) / len(ratios) for side in reach.T)
    return _estimate(value, value - low, value + high, min(each.degrees_of_freedom for each in ratios))


def _correlation(errors: Sequence[np.ndarray]) -> np.ndarray:
    """(K, K) correlations of K estimates from their errors by cluster; 0 where one has no error."""
    rows = np.stack(_equal_lengths(*errors))
    products = rows @ rows.T
    scale = np.sqrt(np.diag(products))
    scale = np.where(scale > 0, scale, np.inf)
    correlation = products / np.outer(scale, scale)
    np.fill_diagonal(correlation, 1.0)
    return correlation


def _equal_lengths(*errors: np.ndarray) -> list[np.ndarray]:
    """The errors with zeros for the clusters that only others have."""
    length = max(map(len, errors))
    return [np.pad(each, (0, length - len(each))) for each in errors]


def _estimate(value: float, low: float, high: float, degrees_of_freedom: float) -> Estimate:
    return Estimate(
        value=value, low=float(low), high=float(high), confidence=CONFIDENCE, degrees_of_freedom=degrees_of_freedom
    )
