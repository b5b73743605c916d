"""Is the giant a waste here? Decide from the stored scores of a model's versions; no model runs.

Compares every candidate with the teacher, document by document, on the tasks that both were scored on. A candidate
is as good if every top-level task passes a one-sided test of non-inferiority. Passing on all of them owes no correction
for their number; but the best of many candidates could be as good by luck, so the tests are corrected for the number
of candidates (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from limbeck.evals.cost.measure import reprice, scale_estimate
from limbeck.evals.cost.payback import Payback, api_usd_per_million_tokens, compute_payback
from limbeck.evals.cost.prices import Prices
from limbeck.evals.scores.candidates import Teacher, find_teacher, scorecards_of_version, select_comparable_scores
from limbeck.evals.scores.compare import LazyScorecard, read_documents
from limbeck.evals.stats.diagnostics import DIAGNOSTIC_COLUMNS
from limbeck.evals.stats.noninferiority import SIGNIFICANCE_LEVEL, Margins, documents_factor, passing_margin
from limbeck.evals.stats.paired_comparison import PairedComparison, compare_to_reference, correct_candidates
from limbeck.evals.stats.retention import pair_documents
from limbeck.evals.verdict.caveats import describe_caveats
from limbeck.evals.verdict.records import Candidate, OpenTask, VerdictAnswer, VerdictReport
from limbeck.evals.verdict.wording import answer_sentence, describe_next_steps
from limbeck.registry.records import (
    USD,
    ComparedTask,
    Cost,
    Estimate,
    Outcome,
    Relative,
    Scorecard,
    TaskResult,
    TrainingCost,
    Version,
    top_level_tasks,
)

if TYPE_CHECKING:
    from limbeck.evals.stats.estimates import Difference
    from limbeck.registry.mlflow.store import Store


def decide_verdict(
    store: Store,
    name: str,
    *,
    against: str | None = None,
    tasks: Sequence[str] = (),
    margins: Margins | None = None,
    tokens_per_day: float | None = None,
    prices: Prices | None = None,
) -> VerdictReport:
    """Decide whether some version of `name` is as good as the teacher, and cheaper.

    Args:
        against: NAME/VERSION or NAME@ALIAS of the teacher; None for the one that most versions were scored against.
        tasks: tasks to decide by; if empty, the top-level tasks of the largest setting
            (`limbeck.evals.scores.candidates`).
        margins: how much worse is still as good; None for the default.
        tokens_per_day: the load, prompt and new tokens together.
        prices: of machines; None for those that Limbeck ships.

    Raises:
        BadInput: there is no such model or task, or the teacher or all candidates have no scores.
    """
    found = {each.version.ref: each for each in store.versions_with_findings(name)}
    if not found:
        raise store.not_found_error(name)
    all_cards = [card for each in found.values() for card in each.scorecards]
    teacher = find_teacher(store, name, against, all_cards)
    others = {
        ref: scorecards_of_version(store, each.version, each.scorecards)
        for ref, each in found.items()
        if each.version.digest != teacher.digest
    }
    chosen = select_comparable_scores(teacher, others, tasks)
    card = chosen.teacher.card
    results = {task: result for task, result in card.tasks.items() if not tasks or {task, result.group} & {*tasks}}
    margins_of = margins or Margins()
    margins_of.check([*top_level_tasks(results), *(results[task].metric for task in top_level_tasks(results))])
    context = _VerdictContext(
        store, teacher, chosen.teacher, results, margins_of, prices or Prices.load(), tokens_per_day
    )
    tested = [_test_candidate(found[ref].version, scored, context) for ref, scored in chosen.candidates.items()]
    candidates = sorted(_correct_candidates(tested), key=_rank)
    answer = _answer(candidates)
    best = _best(candidates, answer)
    report = VerdictReport(
        name=name,
        answer=answer,
        sentence="",
        candidate=best.version,
        next_steps=(),
        not_measured=(),
        teacher=teacher.label,
        teacher_digest=teacher.digest,
        teacher_engine=teacher.engine,
        requested_tasks=tuple(tasks),
        margins={task: margins_of.margin_for(task, results[task].metric) for task in top_level_tasks(results)},
        default_margins=margins is None,
        candidates=tuple(candidates),
        left_out=chosen.left_out,
        other_tasks=tuple(
            sorted({task for each in all_cards for task in top_level_tasks(each.tasks)} - results.keys())
        ),
        tokens_per_day=tokens_per_day,
        tasks_digest=card.tasks_digest,
        prompts_digest=card.prompts_digest,
        harness=card.harness,
        created=datetime.now(UTC),
    )
    texts = {
        "sentence": answer_sentence(report),
        "next_steps": describe_next_steps(report),
        "not_measured": describe_caveats(report),
    }
    return report.model_copy(update=texts)


class _VerdictContext(NamedTuple):
    """What all candidates have in common."""

    store: Store
    teacher: Teacher
    teacher_scores: LazyScorecard
    teacher_results: dict[str, TaskResult]  # the teacher's results on the tasks to decide by
    margins: Margins
    prices: Prices
    tokens_per_day: float | None

    @property
    def api_name(self) -> str | None:
        """The teacher's name at its API; None if no price is known for it."""
        name = self.teacher.label.rpartition("#")[2]
        return name if self.teacher.engine == "endpoint" and name in self.prices.apis else None


def _test_candidate(
    version: Version, scored: LazyScorecard, context: _VerdictContext
) -> tuple[Candidate, PairedComparison]:
    """A candidate with every task tested alone, before the correction."""
    card, teacher = scored.card, context.teacher
    names = version.ref, teacher.label
    pairs = pair_documents(
        read_documents(scored, context.teacher_results),
        read_documents(context.teacher_scores, context.teacher_results),
        DIAGNOSTIC_COLUMNS,
        names,
    )
    comparison = compare_to_reference(pairs, context.teacher_results, context.margins, names)
    relative = card.relative if card.relative and card.relative.teacher_digest == teacher.digest else None
    costs = card.cost, relative.teacher_cost if relative else None
    cost, teacher_cost = (reprice(c, *context.prices.machine_price(c.machine)) if c else None for c in costs)
    ratio, interval = _ratio(cost, relative, context)
    training_cost = context.store.runs.training_cost(version)
    candidate = Candidate(
        version=version.ref,
        artifact_digest=version.digest,
        kind=version.kind,
        engine=version.engine,
        precision=version.precision,
        recipe=version.recipe,
        is_teacher=version.kind == "onnx" and version.parent == teacher.label,
        scorecard=card.digest(),
        quality="inconclusive",
        cheaper=_is_cheaper(ratio, interval),
        retention=comparison.retention,
        tasks=tuple(comparison.tasks),
        open_tasks=(),
        unknown_tasks=comparison.unknown_tasks,
        cost=cost,
        teacher_cost=teacher_cost,
        cost_ratio=ratio,
        cost_ratio_interval=interval,
        speedup=relative.speedup if relative else None,
        speedup_interval=relative.speedup_interval if relative else None,
        training_cost=training_cost,
        payback=_payback(card.model_copy(update={"relative": relative}), training_cost, context),
    )
    return candidate, comparison


def _ratio(
    cost: Cost | None, relative: Relative | None, context: _VerdictContext
) -> tuple[float | None, Estimate | None]:
    """The cost ratio to the teacher and its interval: from one run, or from the price of the teacher's API."""
    if relative and relative.cost_ratio is not None:
        return relative.cost_ratio, relative.cost_ratio_interval
    if cost and context.api_name:
        share = 1 / api_usd_per_million_tokens(context.api_name, cost, context.prices)[0]
        interval = scale_estimate(cost.intervals[USD], share) if USD in cost.intervals else None
        return cost.usd_per_million_tokens * share, interval
    return None, None


def _is_cheaper(ratio: float | None, interval: Estimate | None) -> bool | None:
    """Whether the candidate is surely cheaper, or surely not; None if the interval of the ratio contains 1."""
    if ratio is None:
        return None
    if (interval.high if interval else ratio) < 1:
        return True
    return False if (interval.low if interval else ratio) >= 1 else None


def _payback(card: Scorecard, training_cost: TrainingCost | None, context: _VerdictContext) -> Payback | None:
    """When the training cost is paid back; None if the cost or the saving is unknown."""
    known = context.api_name or (card.relative and card.relative.teacher_cost)
    if training_cost is None or card.cost is None or not card.cost.loads or not known:
        return None
    return compute_payback(
        card, training_cost, context.prices, tokens_per_day=context.tokens_per_day, api_teacher=context.api_name
    )


def _correct_candidates(tested: Sequence[tuple[Candidate, PairedComparison]]) -> Iterator[Candidate]:
    """Correct for the number of candidates, and decide the quality of each."""
    families = correct_candidates([each.tasks for each, _ in tested])
    for (candidate, comparison), tasks in zip(tested, families, strict=True):
        outcomes = {task.noninferiority.verdict for task in tasks}
        quality: Outcome = "inconclusive"
        if "fail" in outcomes:
            quality = "fail"
        elif outcomes == {"pass"} and not candidate.unknown_tasks:
            quality = "pass"
        inconclusive = [task for task in tasks if task.noninferiority.verdict == "inconclusive"]
        open_tasks = tuple(_open_task(task, comparison.differences[task.task], len(tested)) for task in inconclusive)
        yield candidate.model_copy(update={"tasks": tuple(tasks), "quality": quality, "open_tasks": open_tasks})


def _open_task(task: ComparedTask, difference: Difference, candidates: int) -> OpenTask:
    """What would settle an inconclusive task. To pass, it must at worst be the first of Holm's steps; failing needs no
    correction."""
    advantage, margin = difference if task.higher_is_better else difference.negate(), task.noninferiority.margin
    as_good = advantage.estimate.value > -margin
    times = documents_factor(advantage, margin, SIGNIFICANCE_LEVEL / candidates if as_good else SIGNIFICANCE_LEVEL)
    return OpenTask(
        task=task.task,
        documents=max(math.ceil(task.documents * times), task.documents + 1) if times is not None else None,
        as_good=as_good,
        margin=passing_margin(advantage, SIGNIFICANCE_LEVEL / candidates),
    )


def _rank(candidate: Candidate) -> tuple[int, float]:
    return ("pass", "inconclusive", "fail").index(candidate.quality), _cost_ratio_or_infinity(candidate)


def _cost_ratio_or_infinity(candidate: Candidate) -> float:
    return math.inf if candidate.cost_ratio is None else candidate.cost_ratio


def _answer(candidates: Sequence[Candidate]) -> VerdictAnswer:
    if any(each.quality == "pass" and each.cheaper for each in candidates):
        return "yes"
    return "no" if all(map(_is_ruled_out, candidates)) else "not settled"


def _is_ruled_out(candidate: Candidate) -> bool:
    return candidate.quality == "fail" or candidate.cheaper is False


def _best(candidates: Sequence[Candidate], answer: VerdictAnswer) -> Candidate:
    """The candidate that the answer is about: the cheapest that is as good, or the one that comes closest."""
    if answer == "yes":
        return min(
            (each for each in candidates if each.quality == "pass" and each.cheaper), key=_cost_ratio_or_infinity
        )
    if answer == "no":
        passed = [each for each in candidates if each.quality == "pass"]
        return min(passed, key=_cost_ratio_or_infinity) if passed else max(candidates, key=_retention_value)

    def missing(candidate: Candidate) -> tuple[int, int, float, float]:
        """A sort key: tasks on which it looks worse, tasks that are not settled, factor of documents needed, cost."""
        bad = sum(not task.as_good for task in candidate.open_tasks)
        documents = {task.task: task.documents for task in candidate.tasks}
        more = (
            max((task.documents or math.inf) / documents[task.task] for task in candidate.open_tasks)
            if candidate.open_tasks
            else 0
        )
        return bad, len(candidate.open_tasks) + len(candidate.unknown_tasks), more, _cost_ratio_or_infinity(candidate)

    return min((each for each in candidates if not _is_ruled_out(each)), key=missing)


def _retention_value(candidate: Candidate) -> float:
    return candidate.retention.value if candidate.retention else -math.inf
