"""Compares numbers and intervals with a policy's limits, and estimates how many documents would settle a rule."""

from __future__ import annotations

import math

from limbeck.registry.records import Estimate, Outcome, RuleResult

POWER = 0.8  # of the test that the estimated number of documents is for


def rule_result(name: str, outcome: Outcome, message: str) -> RuleResult:
    """The result of one rule."""
    return RuleResult(rule=name, outcome=outcome, message=message)


def format_number(value: float) -> str:
    """Whole thousands with commas, smaller numbers to four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def format_requirement(limit: float, *, is_maximum: bool) -> str:
    """What a limit requires, such as `at most 100 is required`."""
    return f"at {'most' if is_maximum else 'least'} {format_number(limit)} is required"


def check_limit(label: str, value: float, limit: float, *, is_maximum: bool) -> tuple[Outcome, str]:
    """Compare a measured number with its limit. Returns the outcome and a message with both numbers."""
    passes = value <= limit if is_maximum else value >= limit
    message = f"{label} {format_number(value)}, {format_requirement(limit, is_maximum=is_maximum)}"
    return "pass" if passes else "fail", message


def interval_outcome(low: float, high: float, limit: float, *, is_maximum: bool = False) -> Outcome:
    """Pass if the whole interval is on the right side of the limit, fail if it is wholly on the wrong side.

    An interval that contains the limit, or that is NaN, is inconclusive. An end that equals the limit is on the right
    side.
    """
    if is_maximum:
        passes, fails = high <= limit, low > limit
    else:
        passes, fails = low >= limit, high < limit
    if passes:
        return "pass"
    return "fail" if fails else "inconclusive"


def estimate_at_confidence(estimate: Estimate, confidence: float) -> Estimate | None:
    """The estimate with its interval at another confidence; None if the stored interval does not allow that.

    Each side is narrowed by the ratio of the quantiles of Student's t at the estimate's degrees of freedom. It is
    widened by the square of that ratio: bounds of scores of 0 and 1, and of skewed ones, grow faster than the quantile.
    Without degrees of freedom an interval is only narrowed: normal quantiles narrow it less than Student's t would, and
    would widen it too little.

    Args:
        estimate: the value with its interval.
        confidence: two-sided, between 0 and 1.
    """
    if confidence == estimate.confidence:
        return estimate
    widens = confidence > estimate.confidence
    if not 0 < estimate.confidence < 1 or (widens and estimate.degrees_of_freedom is None):
        return None
    scale = _quantile((1 + confidence) / 2, estimate.degrees_of_freedom) / _quantile(
        (1 + estimate.confidence) / 2, estimate.degrees_of_freedom
    )
    if widens:
        scale *= scale
    low, high = (estimate.value + scale * (end - estimate.value) for end in (estimate.low, estimate.high))
    return estimate.model_copy(update={"low": low, "high": high, "confidence": confidence})


def describe_documents_needed(estimate: Estimate, limit: float, documents: int) -> str:
    """How many documents would settle on which side of the limit the estimate is, as text.

    The number holds with a power of POWER, if the estimate stays the same and its error falls with the square root of
    the number of documents.

    Args:
        estimate: its interval contains the limit.
        limit: in the unit of the estimate; more is better.
        documents: the number of documents that the estimate is based on.
    """
    gap = abs(estimate.value - limit)
    if not math.isfinite(gap) or not gap:
        return "it equals the limit: no number of documents settles on which side it is"
    # The side of the interval that contains the limit.
    reach = estimate.value - estimate.low if estimate.value > limit else estimate.high - estimate.value
    quantile = _quantile((1 + estimate.confidence) / 2, estimate.degrees_of_freedom)
    factor = ((quantile + _quantile(POWER, estimate.degrees_of_freedom)) / quantile * reach / gap) ** 2
    needed = math.ceil(documents * factor)
    text = f"about {needed:,} documents instead of {documents:,} would settle it"
    return f"{text}, as a fail if the estimate stays the same" if estimate.value < limit else text


def _quantile(probability: float, degrees_of_freedom: float | None) -> float:
    """A quantile of Student's t; of the normal distribution if the degrees of freedom are unknown."""
    from scipy.special import ndtri, stdtrit

    if degrees_of_freedom is None:
        return float(ndtri(probability))
    return float(stdtrit(degrees_of_freedom, probability))
