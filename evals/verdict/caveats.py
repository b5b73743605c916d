"""What a verdict does not rest on, stated beside it so that nobody reads more into it than was measured."""

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
    """One or two sentences each, about the chosen candidate and about the others."""
    best = chosen_candidate(report)
    return (*_quality(report, best), *_cost(report, best), *_training_cost(best), *_versions(report))


def _quality(report: VerdictReport, best: Candidate) -> Iterator[str]:
    for task in best.tasks:
        if task.no_retention:
            yield f"Retention on {task.task}: {task.no_retention}."
    for name, why in best.unknown_tasks.items():
        yield f"Quality on {name}: {why}."
    tasks = ", ".join(report.margins)
    yield (
        f"Everything that these tasks do not test ({tasks}): other languages, other domains, longer texts, how an "
        "answer reads to a person, safety."
    )
    if report.other_tasks:
        yield f"Other tasks that versions of {report.name} are scored on: {', '.join(report.other_tasks)}."
    seeds = Counter(each.recipe for each in report.candidates if each.kind == "student" and each.recipe)
    if best.recipe and not best.is_teacher and seeds[best.recipe] < 2:
        yield f"Luck in training: only one student of {best.recipe} was trained; another seed may be better or worse."


def _cost(report: VerdictReport, best: Candidate) -> Iterator[str]:
    cost, teachers = best.cost, best.teacher_cost
    if cost is None:
        yield f"The cost of running {best.version}: speed, memory, dollars."
        return
    if best.cost_ratio is None:
        yield f"Cost ratio and speed-up: {best.version} was not timed in one run with {report.teacher}."
    batches = [load.batch for load in cost.loads] or [1]
    yield (
        f"Other requests than {cost.prompt_tokens} tokens in and {cost.new_tokens} out, in batches of "
        f"{' and '.join(map(str, batches))}; latency under overload."
    )
    yield from _machine(report, best, cost)
    if (cost.price or "").startswith(PLACEHOLDER):
        yield (
            f"Dollars: no price of this machine is known; ${cost.usd_per_hour:g} an hour is a placeholder (set "
            "--prices or --usd-per-hour). The ratios do not depend on it."
        )
    if teachers and best.engine != report.teacher_engine:
        yield _engines(report, best)


def _machine(report: VerdictReport, best: Candidate, cost: Cost) -> Iterator[str]:
    here = cost.machine.partition(";")[0]
    where = f"Other machines than {here}"
    yield f"{where}; no GPU was used." if cost.device == "cpu" else f"{where}."
    elsewhere = [each.version for each in report.candidates if each.cost and each.cost.setting != cost.setting]
    if elsewhere:
        yield (
            f"Costs side by side: {_join_names(elsewhere)} measured on another machine, or with other lengths, threads "
            f"or price, than {best.version}. Each ratio is from its own run."
        )


def _engines(report: VerdictReport, best: Candidate) -> str:
    words = (
        f"How much of the speed-up comes from the engine: {report.teacher} ran in {report.teacher_engine}, "
        f"{best.version} in {best.engine}."
    )
    exported = [each for each in report.candidates if each.is_teacher and each.cost_ratio is not None]
    if best.is_teacher:
        return f"{words} Both are the same model, so all of it comes from engine and precision."
    if not exported:
        return f"{words} To separate the two, run limbeck export {report.teacher}, then limbeck eval."
    other = min(exported, key=lambda each: each.cost_ratio or 0)
    ratio = (
        format_share(other.cost_ratio_interval) if other.cost_ratio_interval else format_percent(other.cost_ratio or 0)
    )
    return f"{words} The teacher itself, as {describe_candidate(other)}, runs at {ratio} of its cost."


def _training_cost(best: Candidate) -> Iterator[str]:
    if best.is_teacher:
        return
    if best.training_cost is None:
        yield (
            f"The cost of making {best.version}, and so when it pays back: it was not recorded, since it was made "
            "elsewhere."
        )
    elif best.payback is None:
        yield f"When {best.version} pays back: it and the teacher were not timed in one run."
    if best.training_cost is not None:
        yield "People's time, discarded trials, and the cost of making the teacher."


def _versions(report: VerdictReport) -> Iterator[str]:
    for ref, why in list(report.left_out.items())[:5]:
        yield f"{ref} is not a candidate: {why}."
    if (more := len(report.left_out) - 5) > 0:
        yield f"{more} more versions are not candidates."
    unknown = [each.version for each in report.candidates if each.cost_ratio is None]
    if unknown and report.answer != "yes":
        yield f"The cost ratio of {_join_names(unknown)}."


def _join_names(refs: list[str], at_most: int = 4) -> str:
    return ", ".join(refs[:at_most]) + (f" and {len(refs) - at_most} more" if len(refs) > at_most else "")
