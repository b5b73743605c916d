"""What a judgement does not rest on: said beside it, so that nobody reads more into it than was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.evals.cost.prices import PLACEHOLDER
from limbeck.evals.verdict.wording import chosen_candidate, describe_candidate, format_percent, format_share

if TYPE_CHECKING:
    from limbeck.evals.verdict.records import Candidate, VerdictReport
    from limbeck.registry.records import Cost


def describe_caveats(report: VerdictReport) -> tuple[str, ...]:
    """In words, one sentence or two each; of the candidate that the judgement is about, and of the others."""
    best = chosen_candidate(report)
    said = [*_quality(report, best), *_cost(report, best), *_training_cost(best), *_versions(report)]
    return tuple(said)


def _quality(report: VerdictReport, best: Candidate) -> Iterator[str]:
    for task in best.tasks:
        if task.no_retention:
            yield f"Quality kept on {task.task}: {task.no_retention}."
    for name, why in best.unknown_tasks.items():
        yield f"Quality on {name}: {why}."
    asked = ", ".join(report.margins)
    yield (
        f"Whatever these tasks do not ask ({asked}): other languages, other domains, longer texts, how an answer "
        "reads to a person, safety."
    )
    if report.other_tasks:
        yield f"Tasks that versions of {report.name} are scored on too: {', '.join(report.other_tasks)}."
    alike = Counter(each.recipe for each in report.candidates if each.kind == "student" and each.recipe)
    if best.recipe and not best.is_teacher and alike[best.recipe] < 2:
        yield f"Luck in training: one student of {best.recipe} was trained; another seed gives a better or a worse one."


def _cost(report: VerdictReport, best: Candidate) -> Iterator[str]:
    cost, teachers = best.cost, best.teacher_cost
    if cost is None:
        yield f"What {best.version} costs to run: speed, memory, dollars."
        return
    if best.cost_ratio is None:
        yield f"Cost ratio and speed-up: {best.version} was not timed in one run with {report.teacher}."
    elif best.cost_ratio_interval is None:
        yield (
            "How sure the cost ratio and the speed-up are: they are of an older protocol, without intervals, "
            "and the two models were timed one after the other."
        )
    batches = [load.batch for load in cost.loads] or [1]
    yield (
        f"Other requests than {cost.prompt_tokens} tokens in and {cost.new_tokens} out, in batches of "
        f"{' and '.join(map(str, batches))}; latency while requests come in faster than they are answered."
    )
    yield from _machine(report, best, cost)
    if (cost.price or "").startswith(PLACEHOLDER):
        yield (
            f"Dollars: no price of this machine is known, and ${cost.usd_per_hour:g} an hour is a placeholder (give "
            "--prices or --usd-per-hour). The ratios do not depend on it."
        )
    if teachers and best.engine != report.teacher_engine:
        yield _engines(report, best)


def _machine(report: VerdictReport, best: Candidate, cost: Cost) -> Iterator[str]:
    here = cost.machine.partition(";")[0]
    where = f"Other machines than {here}"
    yield f"{where}." if cost.device != "cpu" else f"{where}; no GPU was used."
    elsewhere = [each.version for each in report.candidates if each.cost and each.cost.setting != cost.setting]
    if elsewhere:
        yield (
            f"Costs side by side: {_join_names(elsewhere)} measured on another machine, or at other lengths, threads "
            f"or price, than {best.version}. Each ratio is of its own run."
        )


def _engines(report: VerdictReport, best: Candidate) -> str:
    words = (
        f"How much of the speed-up is the engine's: {report.teacher} ran in {report.teacher_engine}, "
        f"{best.version} in {best.engine}."
    )
    exported = [each for each in report.candidates if each.is_teacher and each.cost_ratio is not None]
    if best.is_teacher:
        return f"{words} The two are one model, so that all of it is the engine's and the precision's."
    if not exported:
        return f"{words} limbeck export {report.teacher}, then limbeck eval, tells them apart."
    other = min(exported, key=lambda each: each.cost_ratio or 0)
    ratio = (
        format_share(other.cost_ratio_interval) if other.cost_ratio_interval else format_percent(other.cost_ratio or 0)
    )
    return f"{words} The teacher itself, as {describe_candidate(other)}, is at {ratio} of its cost."


def _training_cost(best: Candidate) -> Iterator[str]:
    if best.is_teacher:
        return
    if best.making is None:
        yield (
            f"What making {best.version} took, and so when it is paid back: it was made before that was recorded, or "
            "elsewhere."
        )
    elif best.payback is None:
        yield f"When {best.version} is paid back: it and the teacher were not timed in one run."
    if best.making is not None:
        yield "People's time, trials that were thrown away, and what making the teacher took."


def _versions(report: VerdictReport) -> Iterator[str]:
    for ref, why in list(report.left_out.items())[:5]:
        yield f"{ref}, which is no candidate: {why}."
    if (more := len(report.left_out) - 5) > 0:
        yield f"{more} more versions that are no candidates."
    unknown = [each.version for each in report.candidates if each.cost_ratio is None]
    if unknown and report.answer != "yes":
        yield f"The cost ratio of {_join_names(unknown)}."


def _join_names(refs: list[str], at_most: int = 4) -> str:
    return ", ".join(refs[:at_most]) + (f" and {len(refs) - at_most} more" if len(refs) > at_most else "")
