"""The gate's rules: what a version's scorecard and parity must show before an alias may point at it.

A policy is a TOML file. Only `quality.min_retention` has to be there; a rule left out is not asked.

    [quality]
    min_retention = 0.95        # the LOWER end of retention's interval reaches it; 1 is the teacher's quality
    tasks = ["stdlib_next_line"]  # tasks that have to be in the scorecard
    min_documents = 200         # of each task

    [quality.min_task_retention]  # the same as min_retention, for one task
    stdlib_next_line = 0.9

    [cost]
    max_cost_ratio = 0.5        # dollars per million tokens over the teacher's
    max_p95_ms = 200
    max_disk_bytes = 50_000_000
    max_peak_rss_bytes = 500_000_000
    min_decode_tokens_per_s = 100

    [parity]                    # asked of ONNX variants
    required = true             # the default; it passed when it was exported: fp32 equals PyTorch, no other is broken
    max_mean_kl = 0.05          # nats per token
    max_p99_kl = 0.5            # of 99 tokens in 100
    min_top1_agreement = 0.9
    max_bits_per_byte_increase = 0.02  # over its PyTorch model

    [lineage]
    max_contamination = 0.01    # of each task: the share of documents that occur in the training text
    require_distillation_licence = true  # the teacher's licence has to allow that a student learns from it

What is not known, such as an overlap with text that is not at hand, or a licence, is inconclusive.
An interval wholly below a limit fails. One that reaches across it is inconclusive: more documents settle it.
Neither passes the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from registry import tomlfile
from registry.records import (
    Estimate,
    Frozen,
    Outcome,
    Parity,
    Record,
    RuleResult,
    Scorecard,
    Verdict,
    Version,
    later,
)


class Quality(Frozen):
    """How much of the teacher's quality has to be kept."""

    min_retention: float = Field(ge=0, le=1.5)
    tasks: tuple[str, ...] = ()
    min_documents: int | None = Field(default=None, ge=1)
    min_task_retention: dict[str, float] = {}


class CostLimits(Frozen):
    """How much it may cost to run."""

    max_cost_ratio: float | None = Field(default=None, gt=0)
    max_p95_ms: float | None = Field(default=None, gt=0)
    max_disk_bytes: int | None = Field(default=None, gt=0)
    max_peak_rss_bytes: int | None = Field(default=None, gt=0)
    min_decode_tokens_per_s: float | None = Field(default=None, gt=0)


NotNegative = Annotated[float, Field(ge=0)]


class ParityLimits(Frozen):
    """How close an ONNX variant has to be to its PyTorch model."""

    required: bool = True
    max_mean_kl: float | None = Field(default=None, ge=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    max_p99_kl: NotNegative | None = later(None)
    max_bits_per_byte_increase: NotNegative | None = later(None)


class LineageRules(Frozen):
    """What it may have been made from."""

    max_contamination: float | None = Field(default=None, ge=0, le=1)
    require_distillation_licence: bool = False


class Policy(Record):
    """The rules of one gate."""

    quality: Quality
    cost: CostLimits = CostLimits()
    parity: ParityLimits = ParityLimits()
    lineage: LineageRules = later(LineageRules())


def load(path: Path | str) -> Policy:
    """The policy in a TOML file. Raises BadInput with the line of what is wrong in it."""
    return tomlfile.load(path, Policy)


def judge(
    policy: Policy,
    version: Version,
    card: Scorecard | None,
    parity: Parity | None,
    *,
    teacher_digest: str | None = None,
    parent_digest: str | None = None,
) -> Verdict:
    """Apply a policy to what is known of a version.

    Args:
        policy: the rules.
        version: the candidate; the scorecard has to be of its very files.
        card: its scorecard, or None.
        parity: how an ONNX variant compares with its PyTorch model, or None.
        teacher_digest: of the version's teacher; the scorecard has to be relative to that very teacher.
        parent_digest: of the version's parent; the parity has to be with that very model.

    Returns:
        A verdict bound to the digests of artifact, tasks and prompts: pass if every rule passes, fail if one
        fails, else inconclusive.
    """
    rules = [*_quality(policy, version, card, teacher_digest), *_cost(policy, version, card)]
    rules += _lineage(policy.lineage, version, card)
    if version.kind == "onnx":
        rules += _parity(policy.parity, version, parity, parent_digest)
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
        created=datetime.now(UTC),
    )


def best_card(
    policy: Policy, version: Version, cards: Sequence[Scorecard], teacher_digest: str | None = None
) -> Scorecard | None:
    """The scorecard to judge by: the newest that answers all the policy asks, else the newest; or None.

    One that is relative to another model than the teacher of `teacher_digest` answers nothing.
    """
    asked = policy.quality

    def answers(card: Scorecard) -> bool:
        return (
            card.artifact == version.digest
            and card.relative is not None
            and card.relative.teacher_digest == (teacher_digest or card.relative.teacher_digest)
            and set(asked.tasks) <= card.tasks.keys()
            and asked.min_task_retention.keys() <= card.relative.task_retention.keys()
            and all(result.documents >= (asked.min_documents or 0) for result in card.tasks.values())
            and (card.cost is not None or policy.cost == CostLimits())
            and (card.contamination is not None or policy.lineage.max_contamination is None)
        )

    return next((card for card in reversed(cards) if answers(card)), cards[-1] if cards else None)


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
