"""Rules on quality: a scorecard of the exact files, against the exact teacher, and the retention and margins on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from limbeck.registry.gate.evidence import DELETED, Evidence
from limbeck.registry.gate.rules.limits import (
    describe_documents_needed,
    estimate_at_confidence,
    interval_outcome,
    rule_result,
)
from limbeck.registry.policy.schema import Policy, QualityRules
from limbeck.registry.records import Estimate, Outcome, Relative, RuleResult, Scorecard, Version, top_level_tasks

CLOCK_TOLERANCE = timedelta(days=1)  # the clocks of two machines differ by at most this


@dataclass(frozen=True)
class _Bound:
    """A lower limit on an estimate."""

    rule: str  # such as quality.min_retention
    label: str  # of the estimate, for the message
    limit: float
    documents: int  # that the estimate is based on


def quality_results(policy: Policy, evidence: Evidence) -> Iterator[RuleResult]:
    """The results of the quality rules, and whether there is a scorecard to apply them to."""
    rules, version, scorecard = policy.quality, evidence.version, evidence.scorecard
    if not needs_scorecard(policy):
        return
    command = _eval_command(rules, version)
    if scorecard is None:
        yield rule_result("scorecard", "inconclusive", f"it has not been scored; run: {command}")
        return
    if scorecard.artifact != version.digest:
        message = f"the scorecard is of other files ({scorecard.artifact[:12]}, not {version.digest[:12]})"
        yield rule_result("scorecard", "inconclusive", f"{message}; run: {command}")
        return
    yield from _scorecard_results(rules, evidence, scorecard, command)
    if rules.min_retention is None and not rules.min_task_retention and not rules.margin:
        return
    if scorecard.relative is None:
        message = f"it has not been scored against its teacher; run: {command}"
        yield rule_result("quality.teacher", "inconclusive", message)
        return
    yield from _teacher_results(evidence, scorecard.relative, command)
    if rules.min_retention is not None:
        yield _retention_result(rules, rules.min_retention, scorecard, scorecard.relative, command)
    yield from _task_retention_results(rules, scorecard, scorecard.relative, command)
    yield from _margin_results(rules, scorecard, scorecard.relative, command)


def needs_scorecard(policy: Policy) -> bool:
    """Whether any rule of the policy is about the scorecard."""
    empty = Policy()
    return (policy.quality, policy.cost, policy.lineage.max_contamination) != (empty.quality, empty.cost, None)


def _eval_command(rules: QualityRules, version: Version) -> str:
    tasks = dict.fromkeys([*rules.tasks, *rules.min_task_retention])
    return f"limbeck eval {version.ref} --tasks {','.join(tasks) or '...'} --against {version.teacher or 'TEACHER'}"


def _scorecard_results(
    rules: QualityRules, evidence: Evidence, scorecard: Scorecard, eval_command: str
) -> Iterator[RuleResult]:
    """The rules on the tasks, documents and age of the scorecard."""
    missing = [task for task in rules.tasks if task not in scorecard.tasks]
    if missing:
        message = f"not scored on {', '.join(missing)}; run: {eval_command}"
        yield rule_result("quality.tasks", "inconclusive", message)
    elif rules.tasks:
        yield rule_result("quality.tasks", "pass", f"scored on all {len(rules.tasks)} tasks")
    if rules.min_documents is not None and scorecard.tasks:
        task, fewest = min(((task, r.documents) for task, r in scorecard.tasks.items()), key=lambda pair: pair[1])
        message = f"{task} has {fewest} documents, at least {rules.min_documents} are required"
        outcome: Outcome = "pass" if fewest >= rules.min_documents else "inconclusive"
        yield rule_result("quality.min_documents", outcome, message)
    if rules.max_age_days is not None:
        age = evidence.judged_at - scorecard.created
        message = f"scored on {scorecard.created:%Y-%m-%d}, at most {rules.max_age_days:g} days ago is required"
        if -CLOCK_TOLERANCE <= age <= timedelta(days=rules.max_age_days):
            yield rule_result("quality.max_age_days", "pass", message)
        else:
            yield rule_result("quality.max_age_days", "inconclusive", f"{message}; run: {eval_command} --force")


def _teacher_results(evidence: Evidence, relative: Relative, eval_command: str) -> Iterator[RuleResult]:
    """Inconclusive if the scorecard compares the version with itself, or with another model than its teacher.

    If no teacher is recorded, any other model will do; the result names it.
    """
    version = evidence.version
    if relative.teacher_digest == version.digest:
        yield rule_result("quality.teacher", "inconclusive", f"scored against itself; run: {eval_command}")
    elif evidence.teacher_digest is not None and relative.teacher_digest != evidence.teacher_digest:
        message = f"scored against {relative.teacher}, which is not its teacher {version.teacher}"
        if evidence.teacher_digest == DELETED:
            message = f"its teacher {version.teacher} is deleted, so it is unknown whether it was scored against that"
        yield rule_result("quality.teacher", "inconclusive", f"{message}; run: {eval_command}")
    elif version.teacher is None:
        message = f"no teacher is recorded for it; it was scored against {relative.teacher}"
        yield rule_result("quality.teacher", "pass", message)


def _retention_result(
    rules: QualityRules, limit: float, scorecard: Scorecard, relative: Relative, eval_command: str
) -> RuleResult:
    """The rule on retention, as a mean over the tasks."""
    name = "quality.min_retention"
    if relative.retention is None:
        message = f"{relative.teacher} is not clearly better than guessing on any task, so there is no retention"
        return rule_result(name, "inconclusive", message)
    tasks = [task for task in top_level_tasks(scorecard.tasks) if task in relative.task_retention]
    estimate = estimate_at_confidence(relative.retention, rules.confidence)
    bound = _Bound(name, "retention", limit, sum(scorecard.tasks[task].documents for task in tasks))
    return _lower_bound_result(bound, estimate, rules, eval_command)


def _task_retention_results(
    rules: QualityRules, scorecard: Scorecard, relative: Relative, eval_command: str
) -> Iterator[RuleResult]:
    """The rules on the retention of single tasks."""
    for task, limit in rules.min_task_retention.items():
        name = f"quality.min_task_retention.{task}"
        if task not in relative.task_retention:
            yield rule_result(name, "inconclusive", f"not scored against the teacher on {task}; run: {eval_command}")
            continue
        estimate = estimate_at_confidence(relative.task_retention[task], rules.confidence)
        documents = scorecard.tasks[task].documents if task in scorecard.tasks else 0
        bound = _Bound(name, f"retention on {task}", limit, documents)
        yield _lower_bound_result(bound, estimate, rules, eval_command)


def _margin_results(
    rules: QualityRules, scorecard: Scorecard, relative: Relative, eval_command: str
) -> Iterator[RuleResult]:
    """Non-inferiority on each task that has a margin."""
    margins: dict[str, float] = {}
    for key, margin in rules.margin.items():
        of_metric = [task for task in top_level_tasks(scorecard.tasks) if scorecard.tasks[task].metric == key]
        tasks = [key] if key in scorecard.tasks else [task for task in of_metric if task not in rules.margin]
        margins |= dict.fromkeys(tasks, margin)
        if not tasks and not of_metric:
            message = f"{key} is not a task or metric of the scorecard; run: {eval_command}"
            yield rule_result(f"quality.margin.{key}", "inconclusive", message)
    for task, margin in margins.items():
        name, result = f"quality.margin.{task}", scorecard.tasks[task]
        if task not in relative.difference:
            yield rule_result(name, "inconclusive", f"not compared with the teacher on {task}; run: {eval_command}")
            continue
        advantage = estimate_at_confidence(relative.difference[task], rules.confidence)
        if advantage and not result.higher_is_better:
            advantage = _negated(advantage)
        bound = _Bound(name, f"advantage over the teacher in {result.metric} on {task}", -margin, result.documents)
        yield _lower_bound_result(bound, advantage, rules, eval_command)


def _negated(estimate: Estimate) -> Estimate:
    return estimate.model_copy(update={"value": 0 - estimate.value, "low": 0 - estimate.high, "high": 0 - estimate.low})


def _lower_bound_result(bound: _Bound, estimate: Estimate | None, rules: QualityRules, eval_command: str) -> RuleResult:
    """Pass if the whole interval is at or above the limit. `estimate` is None if it is unknown at this confidence."""
    confidence = f"{rules.confidence * 100:g}%"
    if estimate is None:
        message = f"{bound.label} has no interval at {confidence}: the scorecard's interval cannot be converted"
        return rule_result(bound.rule, "inconclusive", f"{message}; run: {eval_command} --force")
    message = f"{bound.label} {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
    if rules.confidence != QualityRules().confidence:
        message += f" at {confidence}"
    message += f", at least {bound.limit:.4f} is required"
    outcome = interval_outcome(estimate.low, estimate.high, bound.limit)
    if outcome == "inconclusive":
        documents_needed = describe_documents_needed(estimate, bound.limit, bound.documents)
        message += f": the interval contains the limit; {documents_needed}"
    return rule_result(bound.rule, outcome, message)
