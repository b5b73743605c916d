"""The gate's rules on quality: a scorecard of the very files, against the very teacher, and what it shows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.bounds import at_confidence, rule, settled_by, side
from limbeck.registry.policy.schema import Policy, Quality
from limbeck.registry.records import Estimate, Relative, RuleResult, Scorecard, Version, top_level

CLOCKS = timedelta(days=1)  # so far may the clocks of two machines be apart


def judge(policy: Policy, evidence: Evidence) -> Iterator[RuleResult]:
    """What the rules on quality say, and whether there is a scorecard to say it of."""
    asked, version, card = policy.quality, evidence.version, evidence.card
    evaluate = _evaluate(asked, version)
    if not needs_card(policy):
        return
    if card is None:
        yield rule("scorecard", "inconclusive", f"it has not been scored; run: {evaluate}")
        return
    if card.artifact != version.digest:
        words = f"the scorecard is of other files ({card.artifact[:12]}, not {version.digest[:12]})"
        yield rule("scorecard", "inconclusive", f"{words}; run: {evaluate}")
        return
    yield from _scored(asked, evidence, card, evaluate)
    if asked.min_retention is None and not asked.min_task_retention and not asked.margin:
        return
    if card.relative is None:
        words = f"it has not been scored against its teacher; run: {evaluate}"
        yield rule("quality.teacher", "inconclusive", words)
        return
    yield from _relative(asked, evidence, card, card.relative, evaluate)


def needs_card(policy: Policy) -> bool:
    """Whether any rule is about the scorecard."""
    nothing = Policy()
    return (policy.quality, policy.cost, policy.lineage.max_contamination) != (nothing.quality, nothing.cost, None)


def _evaluate(asked: Quality, version: Version) -> str:
    tasks = dict.fromkeys([*asked.tasks, *asked.min_task_retention])
    return f"limbeck eval {version.ref} --tasks {','.join(tasks) or '...'} --against {version.teacher or 'TEACHER'}"


def _scored(asked: Quality, evidence: Evidence, card: Scorecard, evaluate: str) -> Iterator[RuleResult]:
    """What the scorecard is of, and how old it is."""
    if missing := [task for task in asked.tasks if task not in card.tasks]:
        yield rule("quality.tasks", "inconclusive", f"not scored on {', '.join(missing)}; run: {evaluate}")
    elif asked.tasks:
        yield rule("quality.tasks", "pass", f"scored on all {len(asked.tasks)} tasks")
    if asked.min_documents is not None and card.tasks:
        task, fewest = min(((task, r.documents) for task, r in card.tasks.items()), key=lambda pair: pair[1])
        words = f"{task} has {fewest} documents, at least {asked.min_documents} are asked"
        enough = fewest >= asked.min_documents
        yield rule("quality.min_documents", "pass" if enough else "inconclusive", words)
    if asked.max_age_days is not None:
        age = evidence.now - card.created
        words = f"scored on {card.created:%Y-%m-%d}, at most {asked.max_age_days:g} days ago is asked"
        if -CLOCKS <= age <= timedelta(days=asked.max_age_days):
            yield rule("quality.max_age_days", "pass", words)
        else:
            yield rule("quality.max_age_days", "inconclusive", f"{words}; run: {evaluate} --force")


def _relative(
    asked: Quality, evidence: Evidence, card: Scorecard, relative: Relative, evaluate: str
) -> Iterator[RuleResult]:
    """What it keeps of its teacher's quality."""
    version = evidence.version
    if relative.teacher_digest == version.digest:
        yield rule("quality.teacher", "inconclusive", f"scored against itself; run: {evaluate}")
    elif evidence.teacher_digest is not None and relative.teacher_digest != evidence.teacher_digest:
        words = f"scored against {relative.teacher}, which is not its teacher {version.teacher}"
        yield rule("quality.teacher", "inconclusive", f"{words}; run: {evaluate}")
    if asked.min_retention is not None:
        yield _retention(asked, card, relative, evaluate)
    for task, limit in asked.min_task_retention.items():
        name = f"quality.min_task_retention.{task}"
        if task not in relative.task_retention:
            yield rule(name, "inconclusive", f"not scored against the teacher on {task}; run: {evaluate}")
            continue
        held = at_confidence(relative.task_retention[task], asked.confidence)
        documents = card.tasks[task].documents if task in card.tasks else 0
        yield _at_least(name, f"retention on {task}", held, limit, documents, asked, evaluate)
    yield from _margins(asked, card, relative, evaluate)


def _retention(asked: Quality, card: Scorecard, relative: Relative, evaluate: str) -> RuleResult:
    name, limit = "quality.min_retention", asked.min_retention or 0.0
    if relative.retention is None:
        words = f"{relative.teacher} is not clearly better than guessing on any task: there is nothing to keep"
        return rule(name, "inconclusive", words)
    documents = sum(card.tasks[task].documents for task in top_level(card.tasks) if task in relative.task_retention)
    held = at_confidence(relative.retention, asked.confidence)
    return _at_least(name, "retention", held, limit, documents, asked, evaluate)


def _margins(asked: Quality, card: Scorecard, relative: Relative, evaluate: str) -> Iterator[RuleResult]:
    """Non-inferiority on each task that has a margin."""
    margins: dict[str, float] = {}
    for key, margin in asked.margin.items():
        of_metric = [task for task in top_level(card.tasks) if card.tasks[task].metric == key]
        tasks = [key] if key in card.tasks else [task for task in of_metric if task not in asked.margin]
        margins |= dict.fromkeys(tasks, margin)
        if not tasks and not of_metric:
            words = f"{key} is no task or metric that it was scored on; run: {evaluate}"
            yield rule(f"quality.margin.{key}", "inconclusive", words)
    for task, margin in margins.items():
        name, result = f"quality.margin.{task}", card.tasks[task]
        if task not in relative.difference:
            yield rule(name, "inconclusive", f"not held against the teacher on {task}; run: {evaluate}")
            continue
        held = at_confidence(relative.difference[task], asked.confidence, wilson=True)
        if held and not result.higher_is_better:
            held = held.model_copy(update={"value": 0 - held.value, "low": 0 - held.high, "high": 0 - held.low})
        what = f"advantage over the teacher in {result.metric} on {task}"
        yield _at_least(name, what, held, -margin, result.documents, asked, evaluate)


def _at_least(
    name: str, what: str, estimate: Estimate | None, limit: float, documents: int, asked: Quality, evaluate: str
) -> RuleResult:
    """The whole interval has to lie at or above the limit. None: it is not known at the confidence that is asked."""
    sure = f"{asked.confidence * 100:g}%"
    if estimate is None:
        words = f"{what} has no interval at {sure} that can be told from the one that was kept"
        return rule(name, "inconclusive", f"{words}; run: {evaluate} --force")
    words = f"{what} {estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"
    words += f"{'' if asked.confidence == Quality().confidence else f' at {sure}'}, at least {limit:.4f} is asked"
    outcome = side(estimate.low, estimate.high, limit)
    if outcome == "inconclusive":
        words += f": the interval reaches across it; {settled_by(estimate, limit, documents)}"
    return rule(name, outcome, words)
