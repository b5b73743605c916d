"""A policy's rules applied to the evidence about a version: a verdict, rule by rule with the numbers."""

from __future__ import annotations

from collections.abc import Iterator

from registry.evidence import Evidence
from registry.policy import LineageRules, ParityLimits, Policy
from registry.records import Estimate, Outcome, Parity, RuleResult, Scorecard, Verdict, Version


def judge(policy: Policy, evidence: Evidence) -> Verdict:
    """Apply a policy to what is known of a version.

    Returns:
        A verdict bound to the digests of artifact, tasks and prompts: pass if every rule passes, fail if one
        fails, else inconclusive.
    """
    version, card = evidence.version, evidence.card
    rules = [*_quality(policy, version, card, evidence.teacher_digest), *_cost(policy, version, card)]
    rules += _lineage(policy.lineage, version, card)
    if version.kind == "onnx":
        rules += _parity(policy.parity, version, evidence.parity, evidence.parent_digest)
    outcomes = {rule.outcome for rule in rules}
    outcome: Outcome = "fail" if "fail" in outcomes else "inconclusive" if len(outcomes) > 1 else rules[0].outcome
    return Verdict(
        outcome=outcome,
        rules=tuple(rules),
        model=version.ref,
        artifact=version.digest,
        tasks_digest=card.tasks_digest if card else "",
        prompts_digest=card.prompts_digest if card else "",
        scorecard=card.digest() if card else "",
        policy=policy.digest(),
        created=evidence.now,
    )


def _quality(
    policy: Policy, version: Version, card: Scorecard | None, teacher_digest: str | None
) -> Iterator[RuleResult]:
    asked = policy.quality
    evaluate = f"limbeck eval {version.ref} --tasks {','.join(asked.tasks) or '...'} --against " + (
        version.teacher or "TEACHER"
    )
    if card is None:
        yield _rule("scorecard", "inconclusive", f"it has not been scored; run: {evaluate}")
        return
    if card.artifact != version.digest:
        words = f"the scorecard is of other files ({card.artifact[:12]}, not {version.digest[:12]})"
        yield _rule("scorecard", "inconclusive", f"{words}; run: {evaluate}")
        return
    if missing := [task for task in asked.tasks if task not in card.tasks]:
        yield _rule("quality.tasks", "inconclusive", f"not scored on {', '.join(missing)}; run: {evaluate}")
    elif asked.tasks:
        yield _rule("quality.tasks", "pass", f"scored on all {len(asked.tasks)} tasks")
    if asked.min_documents is not None and card.tasks:
        task, fewest = min(((task, r.documents) for task, r in card.tasks.items()), key=lambda pair: pair[1])
        words = f"{task} has {fewest} documents, at least {asked.min_documents} are asked"
        enough = fewest >= asked.min_documents
        yield _rule("quality.min_documents", "pass" if enough else "inconclusive", words)
    relative = card.relative
    if relative is None:
        words = f"it has not been scored against its teacher; run: {evaluate}"
        yield _rule("quality.min_retention", "inconclusive", words)
        return
    if relative.teacher_digest == version.digest:
        yield _rule("quality.teacher", "inconclusive", f"scored against itself; run: {evaluate}")
    elif teacher_digest is not None and relative.teacher_digest != teacher_digest:
        words = f"scored against {relative.teacher}, which is not its teacher {version.teacher}"
        yield _rule("quality.teacher", "inconclusive", f"{words}; run: {evaluate}")
    if relative.retention is None:
        words = f"{relative.teacher} is not clearly better than guessing on any task: there is nothing to keep"
        yield _rule("quality.min_retention", "inconclusive", words)
    else:
        yield _at_least("quality.min_retention", "retention", relative.retention, asked.min_retention)
    for task, limit in asked.min_task_retention.items():
        rule = f"quality.min_task_retention.{task}"
        estimate = relative.task_retention.get(task)
        if estimate is None:
            yield _rule(rule, "inconclusive", f"not scored against the teacher on {task}; run: {evaluate}")
        else:
            yield _at_least(rule, f"retention on {task}", estimate, limit)


def _cost(policy: Policy, version: Version, card: Scorecard | None) -> Iterator[RuleResult]:
    if card is None or card.artifact != version.digest:
        return  # said by _quality
    measure = f"run limbeck eval {version.ref} without --no-cost, against a teacher whose cost is known"
    ratio = card.relative.cost_ratio if card.relative else None
    for name, limit in policy.cost.model_dump(exclude_none=True).items():
        bound, _, field = name.partition("_")
        value = ratio if field == "cost_ratio" else getattr(card.cost, field, None)
        if value is None:
            yield _rule(f"cost.{name}", "inconclusive", f"{field} has not been measured; {measure}")
            continue
        good = value <= limit if bound == "max" else value >= limit
        asked = f"at {'most' if bound == 'max' else 'least'} {_number(limit)} is asked"
        yield _rule(f"cost.{name}", "pass" if good else "fail", f"{field} {_number(value)}, {asked}")


def _parity(
    asked: ParityLimits, version: Version, parity: Parity | None, parent_digest: str | None
) -> Iterator[RuleResult]:
    export = f"run: limbeck export {version.parent or 'MODEL'} --precision {version.precision}"
    limits = asked.model_dump(exclude={"required"}, exclude_none=True)
    if not asked.required and not limits:
        return
    if parity is None:
        yield _rule("parity.required", "inconclusive", f"not compared with its PyTorch model; {export}")
        return
    if parent_digest is not None and parity.reference != parent_digest:
        words = f"compared with another model than its parent {version.parent}"
        yield _rule("parity.required", "inconclusive", f"{words}; {export}")
        return
    if asked.required:
        words = f"largest difference in log-probability {parity.max_logprob_diff:.2g}"
        words += f", greedy text {'identical' if parity.greedy_identical else 'differs'}"
        ways = {"in a batch": parity.batch_diff, "padded": parity.left_padding_diff, "cached": parity.cache_diff}
        words += "".join(f", {way} {value:.2g}" for way, value in ways.items() if value is not None)
        yield _rule("parity.required", "pass" if parity.passed else "fail", words)
    known = {
        "mean_kl": ("mean KL in nats per token", parity.mean_kl),
        "p99_kl": ("99th percentile of KL in nats", parity.p99_kl),
        "top1_agreement": ("top-1 agreement", parity.top1_agreement),
        "bits_per_byte_increase": ("increase in bits per byte", parity.bits_per_byte - parity.bits_per_byte_reference),
    }
    for name, limit in limits.items():
        bound, _, field = name.partition("_")
        what, value = known[field]
        if value is None:
            yield _rule(f"parity.{name}", "inconclusive", f"{what} was not measured when it was exported")
            continue
        good = value <= limit if bound == "max" else value >= limit
        words = f"{what} {value:.4g}, at {'most' if bound == 'max' else 'least'} {limit:.4g} is asked"
        yield _rule(f"parity.{name}", "pass" if good else "fail", words)


def _lineage(asked: LineageRules, version: Version, card: Scorecard | None) -> Iterator[RuleResult]:
    if asked.require_distillation_licence:
        yield _licence(version)
    if asked.max_contamination is None or card is None or card.artifact != version.digest:
        return
    rule, found = "lineage.max_contamination", card.contamination
    if found is None:
        words = "its overlap with the training text has not been measured"
        yield _rule(rule, "inconclusive", f"{words}; run limbeck eval {version.ref} where that text lies")
        return
    for task, overlap in found.tasks.items():
        words = f"{overlap.contaminated} of {overlap.documents} documents of {task} occur in the training text"
        words += f" ({overlap.share:.4f}), at most {asked.max_contamination:.4f} is asked"
        yield _rule(f"{rule}.{task}", "pass" if overlap.share <= asked.max_contamination else "fail", words)


def _licence(version: Version) -> RuleResult:
    rule, allowed = "lineage.require_distillation_licence", version.licence_allows_distillation
    if version.kind == "teacher" and version.teacher is None:
        return _rule(rule, "pass", "it was distilled from no other model")
    if allowed is None:
        words = f"whether the licence of {version.teacher or 'its teacher'} lets a student learn from it is not known"
        fix = "say so in the recipe: teacher.licence_allows_distillation, and distil again"
        return _rule(rule, "inconclusive", f"{words}; {fix}")
    words = "allows it" if allowed else "forbids it"
    return _rule(rule, "pass" if allowed else "fail", f"to learn from {version.teacher}: its licence {words}")


def _at_least(rule: str, what: str, estimate: Estimate, limit: float) -> RuleResult:
    """Non-inferiority: the whole interval has to lie at or above the limit."""
    words = f"{what} {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}], at least {limit:.4f} is asked"
    if estimate.low >= limit:
        return _rule(rule, "pass", words)
    if estimate.high < limit:
        return _rule(rule, "fail", words)
    # Also where the interval is not a number.
    return _rule(rule, "inconclusive", f"{words}: the interval reaches across it; score more documents")


def _rule(rule: str, outcome: Outcome, message: str) -> RuleResult:
    return RuleResult(rule=rule, outcome=outcome, message=message)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
