"""Rules on parity: how close an ONNX variant is to its PyTorch model."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import DELETED, Evidence
from limbeck.registry.gate.rules.limits import check_limit, rule_result
from limbeck.registry.policy.schema import ParityLimits
from limbeck.registry.records import Parity, RuleResult


def parity_results(limits: ParityLimits, evidence: Evidence) -> Iterator[RuleResult]:
    """The results of the parity limits for an ONNX variant."""
    version, parity = evidence.version, evidence.parity
    export = f"run: limbeck export {version.parent or 'MODEL'} --precision {version.precision}"
    given_limits = limits.model_dump(exclude={"required"}, exclude_none=True)
    if not limits.required and not given_limits:
        return
    if parity is None:
        yield rule_result("parity.required", "inconclusive", f"not compared with its PyTorch model; {export}")
        return
    if evidence.parent_digest is not None and parity.reference != evidence.parent_digest:
        message = f"compared with another model than its parent {version.parent}; {export}"
        if evidence.parent_digest == DELETED:
            message = f"its parent {version.parent} is deleted, so it is unknown whether it was compared with that"
        yield rule_result("parity.required", "inconclusive", message)
        return
    if limits.required:
        # A variant above Limbeck's own limits needs a policy that has limits of its own.
        passed = parity.passed and not (parity.is_above_limits and not given_limits)
        yield rule_result("parity.required", "pass" if passed else "fail", _describe_parity(parity))
    figures = {
        "mean_kl": ("mean KL in nats per token", parity.mean_kl),
        "p99_kl": ("99th percentile of KL in nats", parity.p99_kl),
        "top1_agreement": ("top-1 agreement", parity.top1_agreement),
        "bits_per_byte_increase": ("increase in bits per byte", parity.bits_per_byte - parity.bits_per_byte_reference),
    }
    for key, limit in given_limits.items():
        bound, _, figure = key.partition("_")
        label, value = figures[figure]
        yield rule_result(f"parity.{key}", *check_limit(label, value, limit, is_maximum=bound == "max"))


def _describe_parity(parity: Parity) -> str:
    """The largest differences from PyTorch in log-probability, as text."""
    text = f"largest difference in log-probability {parity.max_logprob_diff:.2g}"
    text += f", greedy text {'identical' if parity.greedy_identical else 'differs'}"
    modes = {"in a batch": parity.batch_diff, "padded": parity.left_padding_diff, "cached": parity.cache_diff}
    if parity.lengths:
        modes[f"past {parity.lengths[-1]:,} tokens"] = parity.long_diff
    text += "".join(f", {mode} {value:.2g}" for mode, value in modes.items())
    return f"{text}; {parity.describe_limits()}" if parity.is_above_limits else text
