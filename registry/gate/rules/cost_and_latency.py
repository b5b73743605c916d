"""Rules on cost: latency (`max_p50_ms`, `max_p95_ms`), price, throughput, memory and size on disk.

The limits follow from `limbeck.registry.records.cost.FIGURES`, one for each cost figure, and the ratio to the
teacher's cost.
"""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.limits import (
    check_limit,
    format_number,
    format_requirement,
    interval_outcome,
    rule_result,
)
from limbeck.registry.policy.schema import CostLimits
from limbeck.registry.records import Cost, Estimate, RuleResult, Scorecard


def cost_results(limits: CostLimits, evidence: Evidence) -> Iterator[RuleResult]:
    """The results of the cost limits.

    Empty if there is no scorecard of the version's files: `limbeck.registry.gate.rules.quality` reports that.
    """
    version, scorecard = evidence.version, evidence.scorecard
    if scorecard is None or scorecard.artifact != version.digest:
        return
    measure = f"run limbeck eval {version.ref} without --no-cost, against a teacher whose cost is known"
    for key, limit in limits.model_dump(exclude_none=True).items():
        bound, _, figure = key.partition("_")
        value, interval = _measured_value(scorecard, figure)
        name, is_maximum = f"cost.{key}", bound == "max"
        if value is None:
            yield rule_result(name, "inconclusive", f"{figure} has not been measured; {measure}")
        elif interval is None:
            yield rule_result(name, *check_limit(figure, value, limit, is_maximum=is_maximum))
        else:
            outcome = interval_outcome(interval.low, interval.high, limit, is_maximum=is_maximum)
            message = f"{figure} {_format_interval(interval)}, {format_requirement(limit, is_maximum=is_maximum)}"
            if outcome == "inconclusive":
                message += ": the interval contains the limit; measure it again on a machine that does nothing else: "
                message += f"limbeck eval {version.ref} --force"
            yield rule_result(name, outcome, message)


def _measured_value(scorecard: Scorecard, figure: str) -> tuple[float | None, Estimate | None]:
    """A cost figure, and its interval if the cost was measured in several rounds."""
    if figure == "cost_ratio":
        relative = scorecard.relative
        return (relative.cost_ratio, relative.cost_ratio_interval) if relative else (None, None)
    if scorecard.cost is None:
        return None, None
    if figure == "peak_device_bytes" and _ran_on_cpu(scorecard.cost):
        return 0, None
    return getattr(scorecard.cost, figure), scorecard.cost.intervals.get(figure)


def _ran_on_cpu(cost: Cost) -> bool:
    return cost.device == "cpu" and cost.peak_device_bytes is None


def _format_interval(estimate: Estimate) -> str:
    return f"{format_number(estimate.value)} [{format_number(estimate.low)}, {format_number(estimate.high)}]"
