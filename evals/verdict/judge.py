"""Is the giant a waste here? What is kept of a model's versions, judged: no model runs.

Every candidate is held against the teacher, document by document, on the tasks that both were scored on. It is as
good where every top-level task passes a one-sided test of non-inferiority, corrected over all tasks and all
candidates (Holm): picking the best of many would else find one that is as good by luck.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from limbeck.evals.cost.measure import priced, scaled
from limbeck.evals.cost.payback import Payback, api_usd, payback
from limbeck.evals.cost.prices import Prices
from limbeck.evals.scores.candidates import Teacher, alike, find_teacher, scores_of
from limbeck.evals.scores.compare import Scored, documents
from limbeck.evals.stats.diagnostics import COLUMNS
from limbeck.evals.stats.noninferiority import LEVEL, Margins, passing_margin, times_the_documents
from limbeck.evals.stats.paired_comparison import Held, correct, hold
from limbeck.evals.stats.retention import pair
from limbeck.evals.verdict.caveats import not_measured
from limbeck.evals.verdict.records import Answer, Candidate, Judgement, Open
from limbeck.evals.verdict.wording import sentence, settle
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


def judge(
    store: Store,
    name: str,
    *,
    against: str | None = None,
    tasks: Sequence[str] = (),
    margins: Margins | None = None,
    tokens_per_day: float | None = None,
    prices: Prices | None = None,
) -> Judgement:
    """Judge the versions of `name` against their teacher.

    Args:
        against: NAME/VERSION or NAME@ALIAS of the teacher; where None, the one that most were scored against.
        tasks: to judge by; where empty, the top-level ones of the largest setting (`limbeck.evals.scores.candidates`).
        margins: how much worse is still as good; the default where None.
        tokens_per_day: the load, prompt and new tokens together.
        prices: of machines; those that come with Limbeck where None.

    Raises:
        BadInput: no such model or task; a teacher, or candidates, without scores.
    """
    found = {each.version.ref: each for each in store.findings(name)}
    if not found:
        raise store.not_found_error(name)
    every = [card for each in found.values() for card in each.scorecards]
    teacher = find_teacher(store, name, against, every)
    others = {
        ref: scores_of(store, each.version, each.scorecards)
        for ref, each in found.items()
        if each.version.digest != teacher.digest
    }
    chosen = alike(teacher, others, tasks)
    card = chosen.teacher.card
    results = {task: result for task, result in card.tasks.items() if not tasks or {task, result.group} & {*tasks}}
    margins_of = margins or Margins()
    margins_of.check([*top_level_tasks(results), *(results[task].metric for task in top_level_tasks(results))])
    setting = _Setting(store, teacher, chosen.teacher, results, margins_of, prices or Prices.load(), tokens_per_day)
    held = [_held(found[ref].version, scored, setting) for ref, scored in chosen.candidates.items()]
    judged = sorted(_judged(held), key=_rank)
    answer = _answer(judged)
    best = _best(judged, answer)
    judgement = Judgement(
        name=name,
        answer=answer,
        sentence="",
        candidate=best.version,
        settle=(),
        not_measured=(),
        teacher=teacher.label,
        teacher_digest=teacher.digest,
        teacher_engine=teacher.engine,
        asked=tuple(tasks),
        margins={task: margins_of.of(task, results[task].metric) for task in top_level_tasks(results)},
        default_margins=margins is None,
        tests=sum(len(each.tasks) for each in judged),
        candidates=tuple(judged),
        left_out=chosen.left_out,
        other_tasks=tuple(sorted({task for each in every for task in top_level_tasks(each.tasks)} - results.keys())),
        tokens_per_day=tokens_per_day,
        tasks_digest=card.tasks_digest,
        prompts_digest=card.prompts_digest,
        harness=card.harness,
        created=datetime.now(UTC),
    )
    words = {"sentence": sentence(judgement), "settle": settle(judgement), "not_measured": not_measured(judgement)}
    return judgement.model_copy(update=words)


class _Setting(NamedTuple):
    """What all candidates have in common."""

    store: Store
    teacher: Teacher
    scored: Scored
    results: dict[str, TaskResult]  # the teacher's, of the tasks that are judged by
    margins: Margins
    prices: Prices
    tokens_per_day: float | None

    @property
    def api(self) -> str | None:
        """The teacher's name at its API, where that has a price."""
        name = self.teacher.label.rpartition("#")[2]
        return name if self.teacher.engine == "endpoint" and name in self.prices.apis else None


def _held(version: Version, scored: Scored, setting: _Setting) -> tuple[Candidate, Held]:
    """A candidate with every task tested alone, and not yet judged."""
    card, teacher = scored.card, setting.teacher
    names = version.ref, teacher.label
    pairs = pair(documents(scored, setting.results), documents(setting.scored, setting.results), COLUMNS, names)
    held = hold(pairs, setting.results, setting.margins, names)
    relative = card.relative if card.relative and card.relative.teacher_digest == teacher.digest else None
    costs = card.cost, relative.teacher_cost if relative else None
    cost, teacher_cost = (priced(c, *setting.prices.of_machine(c.machine)) if c else None for c in costs)
    ratio, interval = _ratio(cost, relative, setting)
    making = setting.store.training_cost(version)
    candidate = Candidate(
        version=version.ref,
        files=version.digest,
        kind=version.kind,
        engine=version.engine,
        precision=version.precision,
        recipe=version.recipe,
        is_teacher=version.kind == "onnx" and version.parent == teacher.label,
        scorecard=card.digest(),
        quality="inconclusive",
        cheaper=_cheaper(ratio, interval),
        retention=held.retention,
        tasks=tuple(held.tasks),
        open=(),
        untold=held.untold,
        cost=cost,
        teacher_cost=teacher_cost,
        cost_ratio=ratio,
        cost_ratio_interval=interval,
        speedup=relative.speedup if relative else None,
        speedup_interval=relative.speedup_interval if relative else None,
        making=making,
        payback=_payback(card.model_copy(update={"relative": relative}), making, setting),
    )
    return candidate, held


def _ratio(cost: Cost | None, relative: Relative | None, setting: _Setting) -> tuple[float | None, Estimate | None]:
    """Its cost over the teacher's, and the interval of that: of one run, or over the price of the teacher's API."""
    if relative and relative.cost_ratio is not None:
        return relative.cost_ratio, relative.cost_ratio_interval
    if cost and setting.api:
        share = 1 / api_usd(setting.api, cost, setting.prices)[0]
        interval = scaled(cost.intervals[USD], share) if USD in cost.intervals else None
        return cost.usd_per_million_tokens * share, interval
    return None, None


def _cheaper(ratio: float | None, interval: Estimate | None) -> bool | None:
    """Whether it surely is, by the interval of the cost ratio where there is one."""
    if ratio is None:
        return None
    low, high = (interval.low, interval.high) if interval else (ratio, ratio)
    return True if high < 1 else False if low >= 1 else None


def _payback(card: Scorecard, making: TrainingCost | None, setting: _Setting) -> Payback | None:
    """When its making is paid back; None where what it took, or what it saves, is not known."""
    known = setting.api or (card.relative and card.relative.teacher_cost)
    if making is None or card.cost is None or not card.cost.loads or not known:
        return None
    return payback(card, making, setting.prices, tokens_per_day=setting.tokens_per_day, api_teacher=setting.api)


def _judged(held: Sequence[tuple[Candidate, Held]]) -> Iterator[Candidate]:
    """The candidates with every test corrected for all the others, and what follows from it."""
    families = correct([each.tasks for each, _ in held])
    tests = sum(map(len, families))
    for (candidate, kept), tasks in zip(held, families, strict=True):
        outcomes = {task.noninferiority.verdict for task in tasks}
        quality: Outcome = "inconclusive"
        if "fail" in outcomes:
            quality = "fail"
        elif outcomes == {"pass"} and not candidate.untold:
            quality = "pass"
        still = [task for task in tasks if task.noninferiority.verdict == "inconclusive"]
        settling = tuple(_open(task, kept.differences[task.task], tests) for task in still)
        yield candidate.model_copy(update={"tasks": tuple(tasks), "quality": quality, "open": settling})


def _open(task: ComparedTask, difference: Difference, tests: int) -> Open:
    """To pass, a test has to be the first of Holm's steps at worst; to fail it needs no correction."""
    advantage, margin = difference if task.higher_is_better else difference.turned(), task.noninferiority.margin
    as_good = advantage.estimate.value > -margin
    times = times_the_documents(advantage, margin, LEVEL / tests if as_good else LEVEL)
    return Open(
        task=task.task,
        documents=max(math.ceil(task.documents * times), task.documents + 1) if times is not None else None,
        as_good=as_good,
        margin=passing_margin(advantage, LEVEL / tests),
    )


def _rank(candidate: Candidate) -> tuple[int, float]:
    return ("pass", "inconclusive", "fail").index(candidate.quality), _price(candidate)


def _price(candidate: Candidate) -> float:
    return math.inf if candidate.cost_ratio is None else candidate.cost_ratio


def _answer(candidates: Sequence[Candidate]) -> Answer:
    if any(each.quality == "pass" and each.cheaper for each in candidates):
        return "yes"
    return "no" if all(map(_ruled_out, candidates)) else "not settled"


def _ruled_out(candidate: Candidate) -> bool:
    return candidate.quality == "fail" or candidate.cheaper is False


def _best(candidates: Sequence[Candidate], answer: Answer) -> Candidate:
    """The one that the answer is about: the cheapest that is as good, or the one that comes closest to it."""
    if answer == "yes":
        return min((each for each in candidates if each.quality == "pass" and each.cheaper), key=_price)
    if answer == "no":
        passed = [each for each in candidates if each.quality == "pass"]
        return min(passed, key=_price) if passed else max(candidates, key=_kept)

    def missing(candidate: Candidate) -> tuple[int, int, float, float]:
        """Tasks on which it looks worse, tasks that it does not pass, how many times the documents; cost."""
        bad = sum(not task.as_good for task in candidate.open)
        documents = {task.task: task.documents for task in candidate.tasks}
        more = (
            max((task.documents or math.inf) / documents[task.task] for task in candidate.open) if candidate.open else 0
        )
        return bad, len(candidate.open) + len(candidate.untold), more, _price(candidate)

    return min((each for each in candidates if not _ruled_out(each)), key=missing)


def _kept(candidate: Candidate) -> float:
    return candidate.retention.value if candidate.retention else -math.inf
