"""The gate's rules on what an artifact costs to run, and on how close an ONNX variant is to its PyTorch model."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.bounds import check_bound, format_number, rule_result
from limbeck.registry.policy.schema import CostLimits, ParityLimits
from limbeck.registry.records import Cost, Estimate, RuleResult, Scorecard


def cost_results(rules: CostLimits, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on cost say; nothing where there is no scorecard of these files, which is said elsewhere."""
    version, card = evidence.version, evidence.scorecard
    if card is None or card.artifact != version.digest:
        return
    measure = f"run limbeck eval {version.ref} without --no-cost, against a teacher whose cost is known"
    for name, limit in rules.model_dump(exclude_none=True).items():
        bound, _, field = name.partition("_")
        value, interval = _measured_value(card, field)
        if value is None:
            yield rule_result(f"cost.{name}", "inconclusive", f"{field} has not been measured; {measure}")
        elif interval is not None:
            yield _at_most(f"cost.{name}", field, interval, limit, f"limbeck eval {version.ref} --force")
        else:
            yield rule_result(f"cost.{name}", *check_bound(field, value, limit, is_maximum=bound == "max"))


def _measured_value(card: Scorecard, field: str) -> tuple[float | None, Estimate | None]:
    """A figure, and its interval where rounds gave one."""
    if field == "cost_ratio":
        relative = card.relative
        return (relative.cost_ratio, relative.cost_ratio_interval) if relative else (None, None)
    if card.cost is None:
        return None, None
    if field == "peak_device_bytes" and _on_cpu(card.cost):
        return 0, None
    return getattr(card.cost, field), card.cost.intervals.get(field)


def _on_cpu(cost: Cost) -> bool:
    return cost.device == "cpu" and cost.peak_device_bytes is None


def _at_most(name: str, field: str, estimate: Estimate, limit: float, rerun_command: str) -> RuleResult:
    """The whole interval has to lie at or below the limit."""
    low, high = format_number(estimate.low), format_number(estimate.high)
    words = f"{field} {format_number(estimate.value)} [{low}, {high}], at most {format_number(limit)} is asked"
    if estimate.high <= limit:
        return rule_result(name, "pass", words)
    if estimate.low > limit:
        return rule_result(name, "fail", words)
    fix = f"measure it again on a machine that does nothing else: {rerun_command}"
    return rule_result(name, "inconclusive", f"{words}: the interval reaches across it; {fix}")


def parity_results(rules: ParityLimits, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on parity say of an ONNX variant."""
    version, found = evidence.version, evidence.parity
    export = f"run: limbeck export {version.parent or 'MODEL'} --precision {version.precision}"
    limits = rules.model_dump(exclude={"required"}, exclude_none=True)
    if not rules.required and not limits:
        return
    if found is None:
        yield rule_result("parity.required", "inconclusive", f"not compared with its PyTorch model; {export}")
        return
    if evidence.parent_digest is not None and found.reference != evidence.parent_digest:
        words = f"compared with another model than its parent {version.parent}"
        yield rule_result("parity.required", "inconclusive", f"{words}; {export}")
        return
    if rules.required:
        words = f"largest difference in log-probability {found.max_logprob_diff:.2g}"
        words += f", greedy text {'identical' if found.greedy_identical else 'differs'}"
        ways = {"in a batch": found.batch_diff, "padded": found.left_padding_diff, "cached": found.cache_diff}
        words += "".join(f", {way} {value:.2g}" for way, value in ways.items() if value is not None)
        yield rule_result("parity.required", "pass" if found.passed else "fail", words)
    known = {
        "mean_kl": ("mean KL in nats per token", found.mean_kl),
        "p99_kl": ("99th percentile of KL in nats", found.p99_kl),
        "top1_agreement": ("top-1 agreement", found.top1_agreement),
        "bits_per_byte_increase": ("increase in bits per byte", found.bits_per_byte - found.bits_per_byte_reference),
    }
    for name, limit in limits.items():
        bound, _, field = name.partition("_")
        what, value = known[field]
        if value is None:
            words = f"{what} was not measured when it was exported; {export}"
            yield rule_result(f"parity.{name}", "inconclusive", words)
        else:
            yield rule_result(f"parity.{name}", *check_bound(what, value, limit, is_maximum=bound == "max"))
