"""The gate's rules on quality: a scorecard of the very files, against the very teacher, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.bounds import (
    describe_documents_needed,
    estimate_at_confidence,
    interval_outcome,
    rule_result,
)
from limbeck.registry.policy.schema import Policy, QualityRules
from limbeck.registry.records import Estimate, Relative, RuleResult, Scorecard, Version, top_level_tasks

CLOCK_TOLERANCE = timedelta(days=1)  # so far may the clocks of two machines be apart


def quality_results(policy: Policy, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on quality say, and whether there is a scorecard to say it of."""
    asked, version, card = policy.quality, evidence.version, evidence.scorecard
    evaluate = _eval_command(asked, version)
    if not needs_scorecard(policy):
        return
    if card is None:
        yield rule_result("scorecard", "inconclusive", f"it has not been scored; run: {evaluate}")
        return
    if card.artifact != version.digest:
        words = f"the scorecard is of other files ({card.artifact[:12]}, not {version.digest[:12]})"
        yield rule_result("scorecard", "inconclusive", f"{words}; run: {evaluate}")
        return
    yield from _scorecard_results(asked, evidence, card, evaluate)
    if asked.min_retention is None and not asked.min_task_retention and not asked.margin:
        return
    if card.relative is None:
        words = f"it has not been scored against its teacher; run: {evaluate}"
        yield rule_result("quality.teacher", "inconclusive", words)
        return
    yield from _teacher_results(asked, evidence, card, card.relative, evaluate)


def needs_scorecard(policy: Policy) -> bool:
    """Whether any rule is about the scorecard."""
    nothing = Policy()
    return (policy.quality, policy.cost, policy.lineage.max_contamination) != (nothing.quality, nothing.cost, None)


def _eval_command(rules: QualityRules, version: Version) -> str:
    tasks = dict.fromkeys([*rules.tasks, *rules.min_task_retention])
    return f"limbeck eval {version.ref} --tasks {','.join(tasks) or '...'} --against {version.teacher or 'TEACHER'}"


def _scorecard_results(
    rules: QualityRules, evidence: Evidence, card: Scorecard, eval_command: str
) -> Iterator[RuleResult]:
    """What the scorecard is of, and how old it is."""
    if missing := [task for task in rules.tasks if task not in card.tasks]:
        yield rule_result("quality.tasks", "inconclusive", f"not scored on {', '.join(missing)}; run: {eval_command}")
    elif rules.tasks:
        yield rule_result("quality.tasks", "pass", f"scored on all {len(rules.tasks)} tasks")
    if rules.min_documents is not None and card.tasks:
        task, fewest = min(((task, r.documents) for task, r in card.tasks.items()), key=lambda pair: pair[1])
        words = f"{task} has {fewest} documents, at least {rules.min_documents} are asked"
        enough = fewest >= rules.min_documents
        yield rule_result("quality.min_documents", "pass" if enough else "inconclusive", words)
    if rules.max_age_days is not None:
        age = evidence.judged_at - card.created
        words = f"scored on {card.created:%Y-%m-%d}, at most {rules.max_age_days:g} days ago is asked"
        if -CLOCK_TOLERANCE <= age <= timedelta(days=rules.max_age_days):
            yield rule_result("quality.max_age_days", "pass", words)
        else:
            yield rule_result("quality.max_age_days", "inconclusive", f"{words}; run: {eval_command} --force")


def _teacher_results(
    rules: QualityRules, evidence: Evidence, card: Scorecard, relative: Relative, eval_command: str
) -> Iterator[RuleResult]:
    """What it keeps of its teacher's quality."""
    version = evidence.version
    if relative.teacher_digest == version.digest:
        yield rule_result("quality.teacher", "inconclusive", f"scored against itself; run: {eval_command}")
    elif evidence.teacher_digest is not None and relative.teacher_digest != evidence.teacher_digest:
        words = f"scored against {relative.teacher}, which is not its teacher {version.teacher}"
        yield rule_result("quality.teacher", "inconclusive", f"{words}; run: {eval_command}")
    if rules.min_retention is not None:
        yield _retention(rules, card, relative, eval_command)
    for task, limit in rules.min_task_retention.items():
        name = f"quality.min_task_retention.{task}"
        if task not in relative.task_retention:
            yield rule_result(name, "inconclusive", f"not scored against the teacher on {task}; run: {eval_command}")
            continue
        held = estimate_at_confidence(relative.task_retention[task], rules.confidence)
        documents = card.tasks[task].documents if task in card.tasks else 0
        yield _at_least(name, f"retention on {task}", held, limit, documents, rules, eval_command)
    yield from _margin_results(rules, card, relative, eval_command)


def _retention(rules: QualityRules, card: Scorecard, relative: Relative, eval_command: str) -> RuleResult:
    name, limit = "quality.min_retention", rules.min_retention or 0.0
    if relative.retention is None:
        words = f"{relative.teacher} is not clearly better than guessing on any task: there is nothing to keep"
        return rule_result(name, "inconclusive", words)
    documents = sum(
        card.tasks[task].documents for task in top_level_tasks(card.tasks) if task in relative.task_retention
    )
    held = estimate_at_confidence(relative.retention, rules.confidence)
    return _at_least(name, "retention", held, limit, documents, rules, eval_command)


def _margin_results(
    rules: QualityRules, card: Scorecard, relative: Relative, eval_command: str
) -> Iterator[RuleResult]:
    """Non-inferiority on each task that has a margin."""
    margins: dict[str, float] = {}
    for key, margin in rules.margin.items():
        of_metric = [task for task in top_level_tasks(card.tasks) if card.tasks[task].metric == key]
        tasks = [key] if key in card.tasks else [task for task in of_metric if task not in rules.margin]
        margins |= dict.fromkeys(tasks, margin)
        if not tasks and not of_metric:
            words = f"{key} is no task or metric that it was scored on; run: {eval_command}"
            yield rule_result(f"quality.margin.{key}", "inconclusive", words)
    for task, margin in margins.items():
        name, result = f"quality.margin.{task}", card.tasks[task]
        if task not in relative.difference:
            yield rule_result(name, "inconclusive", f"not held against the teacher on {task}; run: {eval_command}")
            continue
        held = estimate_at_confidence(relative.difference[task], rules.confidence, wilson=True)
        if held and not result.higher_is_better:
            held = held.model_copy(update={"value": 0 - held.value, "low": 0 - held.high, "high": 0 - held.low})
        what = f"advantage over the teacher in {result.metric} on {task}"
        yield _at_least(name, what, held, -margin, result.documents, rules, eval_command)


def _at_least(
    name: str,
    label: str,
    estimate: Estimate | None,
    limit: float,
    documents: int,
    rules: QualityRules,
    eval_command: str,
) -> RuleResult:
    """The whole interval has to lie at or above the limit. None: it is not known at the confidence that is asked."""
    sure = f"{rules.confidence * 100:g}%"
    if estimate is None:
        words = f"{label} has no interval at {sure} that can be told from the one that was kept"
        return rule_result(name, "inconclusive", f"{words}; run: {eval_command} --force")
    words = f"{label} {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
    words += f"{'' if rules.confidence == QualityRules().confidence else f' at {sure}'}, at least {limit:.4f} is asked"
    outcome = interval_outcome(estimate.low, estimate.high, limit)
    if outcome == "inconclusive":
        words += f": the interval reaches across it; {describe_documents_needed(estimate, limit, documents)}"
    return rule_result(name, outcome, words)
