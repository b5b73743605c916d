"""An estimate held against a limit: what passes, what fails, and about how many documents settle the rest."""

from __future__ import annotations

import math

from limbeck.registry.records import Estimate, Outcome, RuleResult

POWER = 0.8  # with which the documents that are said to settle a rule do so


def rule_result(name: str, outcome: Outcome, message: str) -> RuleResult:
    """What a rule says."""
    return RuleResult(rule=name, outcome=outcome, message=message)


def format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def check_bound(label: str, value: float, limit: float, *, is_maximum: bool) -> tuple[Outcome, str]:
    """A number that was measured, held against its limit."""
    good = value <= limit if is_maximum else value >= limit
    asked = f"at {'most' if is_maximum else 'least'} {format_number(limit)} is asked"
    return "pass" if good else "fail", f"{label} {format_number(value)}, {asked}"


def interval_outcome(low: float, high: float, limit: float) -> Outcome:
    """Where an interval of something of which more is better lies; inconclusive where it is not a number."""
    return "pass" if low >= limit else "fail" if high < limit else "inconclusive"


def estimate_at_confidence(estimate: Estimate, confidence: float, *, wilson: bool = False) -> Estimate | None:
    """An estimate with its interval at another confidence; None where that cannot be told.

    Each side is scaled by the ratio of the quantiles of Student's t, at the degrees of freedom that were kept with
    the estimate. Estimates of before have none: normal quantiles narrow them less than Student's would, and nothing
    widens them.

    Args:
        wilson: it is a paired difference, whose bounds are Wilson's where the scores are 0 or 1: these grow faster
            than the quantile, and never faster than its square, by which they are widened.
    """
    if confidence == estimate.confidence:
        return estimate
    wider = confidence > estimate.confidence
    if not 0 < estimate.confidence < 1 or (wider and estimate.degrees_of_freedom is None):
        return None
    scale = _quantile((1 + confidence) / 2, estimate.degrees_of_freedom) / _quantile(
        (1 + estimate.confidence) / 2, estimate.degrees_of_freedom
    )
    if wider and wilson:
        scale *= scale
    low, high = (estimate.value + scale * (end - estimate.value) for end in (estimate.low, estimate.high))
    return estimate.model_copy(update={"low": low, "high": high, "confidence": confidence})


def describe_documents_needed(estimate: Estimate, limit: float, documents: int) -> str:
    """About how many documents settle on which side of a limit an estimate is, in words.

    With POWER, if the estimate stays what it is and errors fall with the square root of the documents.

    Args:
        estimate: its interval reaches across the limit.
        documents: that it is of.
    """
    gap = abs(estimate.value - limit)
    if not math.isfinite(gap) or not gap:
        return "it lies at the limit itself: no number of documents settles on which side"
    # The side that reaches across the limit.
    reach = estimate.value - estimate.low if estimate.value > limit else estimate.high - estimate.value
    both = (
        _quantile((1 + estimate.confidence) / 2, estimate.degrees_of_freedom),
        _quantile(POWER, estimate.degrees_of_freedom),
    )
    times = (sum(both) / both[0] * reach / gap) ** 2
    needed = math.ceil(documents * times)
    words = f"about {needed:,} documents in place of {documents:,} would settle it"
    return f"{words}, as a fail if it stays what it is" if estimate.value < limit else words


def _quantile(probability: float, freedom: float | None) -> float:
    """Of Student's t; of the normal distribution where the degrees of freedom are not known."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(probability) if freedom is None else stdtrit(freedom, probability))
