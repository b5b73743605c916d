"""A verdict in words: the answer, and what would settle it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.evals.leaderboard.columns import describe_version
from limbeck.evals.stats.skew import FEW
from limbeck.registry.records import ComparedTask, Estimate, Noninferiority

if TYPE_CHECKING:
    from limbeck.evals.cost.payback import BreakEvenRange
    from limbeck.evals.verdict.records import Candidate, OpenTask, VerdictReport

SHORT_ANSWERS = {"yes": "Yes", "no": "No, not with these candidates", "not settled": "Not settled"}


def chosen_candidate(report: VerdictReport) -> Candidate:
    """The candidate that the answer is about."""
    return next(each for each in report.candidates if each.version == report.candidate)


def answer_sentence(report: VerdictReport) -> str:
    """The answer in one or two sentences, without its first word."""
    best = chosen_candidate(report)
    return {"yes": _yes, "no": _no, "not settled": _not_settled}[report.answer](report, best)


def _yes(report: VerdictReport, best: Candidate) -> str:
    words = f"{describe_candidate(best)} is as good as {report.teacher} within the margins on {_all_tasks(report)}, "
    words += f"at {_cost(best)}{_speed(best)}."
    if best.is_teacher:
        words += " It is the teacher itself in another form: the engine or precision is wasteful, not the size."
    return f"{words} {payback_sentence(best)}"


def _no(report: VerdictReport, best: Candidate) -> str:
    if best.quality == "pass":
        name = describe_candidate(best)
        return f"{name} is as good as {report.teacher} within the margins, but not cheaper: {_cost(best)}."
    worse = f"surely worse than {report.teacher} by more than the margin on some task"
    if any(each.quality != "fail" for each in report.candidates):
        worse += ", or surely not cheaper"
    rank = (
        f"retains {format_share(best.retention)} of the teacher's quality" if best.retention else "is the best of them"
    )
    if len(report.candidates) == 1:
        return f"{describe_candidate(best)}, the only candidate, is {worse}. It {rank}."
    words = f"each of the {len(report.candidates)} candidates is {worse}."
    return f"{words} The closest, {describe_candidate(best)}, {rank}."


def _not_settled(report: VerdictReport, best: Candidate) -> str:
    passed = sum(task.noninferiority.verdict == "pass" for task in best.tasks)
    total = len(report.margins)
    tasks = f"{passed} of {total} tasks" if passed else "any task"
    if passed == total:
        tasks = _all_tasks(report)
    shown = f"is {'' if passed else 'not '}shown to be as good as {report.teacher} on {tasks}"
    words = f"the most promising candidate, {describe_candidate(best)}, {shown}"
    words += ", and surely worse on none." if best.quality != "pass" else "."
    if best.cost_ratio is None:
        return f"{words} Its cost ratio to the teacher was not measured."
    doubt = "" if best.cheaper else ", which may not be less than the teacher's"
    return f"{words} It runs at {_cost(best)}{doubt}{_speed(best)}."


def payback_sentence(candidate: Candidate) -> str:
    """When the cost of making a candidate pays back."""
    found = candidate.payback
    if found is None:
        return "It is unknown when it pays back its making."
    if found.break_even_tokens.value is None:
        return "It never pays back its making."
    words = (
        f"Making it cost ${found.training_cost_usd:.2g}; it pays back after {_tokens(found.break_even_tokens)} tokens"
    )
    if found.break_even_days and found.tokens_per_day:
        words += f": {_days(found.break_even_days)} at {format_large_number(found.tokens_per_day)} tokens a day"
    return f"{words}."


def describe_next_steps(report: VerdictReport) -> tuple[str, ...]:
    """What would settle a verdict that is not settled, for its most promising candidate."""
    return tuple(_settle(report, chosen_candidate(report))) if report.answer == "not settled" else ()


def _settle(report: VerdictReport, best: Candidate) -> Iterator[str]:
    tasks = {task.task: task for task in best.tasks}
    for open_task in best.open_tasks:
        yield _settle_task(tasks[open_task.task], open_task, len(report.candidates))
    for name, why in best.unknown_tasks.items():
        yield f"{name}: {why}."
    again = f"limbeck eval {best.version} --tasks {','.join(report.margins)} --against {report.teacher}"
    if best.cost_ratio is None:
        yield f"Measure its cost in one run with the teacher's: {again}"
    elif best.cheaper is None:
        yield f"Measure its cost again on an idle machine: {again} --force"


def _settle_task(task: ComparedTask, open_task: OpenTask, candidates: int) -> str:
    test = task.noninferiority
    words = f"{task.task}: the difference is {format_difference(task.difference)}, the margin {test.margin:g}."
    if test.carried_by_few:
        return f"{words} {describe_carried(test)}"
    if test.uncorrected == "pass":
        words += f" Alone it would pass; corrected for {candidates} candidates it does not (p = {test.p_holm:.2g})."
    if open_task.documents:
        needed, now = format_large_number(open_task.documents), format_large_number(task.documents)
        words += f" About {needed} documents (now {now}) would settle it and show it "
        words += f"{'as good' if open_task.as_good else 'worse'}, if the difference stays the same."
    else:
        words += " The difference equals the margin, so more documents would not settle it."
    return f"{words} Or accept a wider margin of {round_up_margin(open_task.margin)}, and say so."


# --- numbers as text


def describe_carried(test: Noninferiority) -> str:
    """Why a test whose bound passes is inconclusive: the difference is that of a few documents."""
    return f"{FEW} documents carry {format_percent(test.carried_by_few or 0.0)} of its variance; add documents."


def describe_candidate(candidate: Candidate) -> str:
    """A candidate in a word or two, with its NAME/VERSION."""
    what = describe_version(candidate)
    return what if candidate.version in what else f"{what} ({candidate.version})"


def format_percent(share: float) -> str:
    return f"{share:.1%}" if abs(share) < 0.1 else f"{share:.0%}"


def format_share(estimate: Estimate) -> str:
    """A share with its interval."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def format_difference(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


def round_up_margin(margin: float) -> str:
    """A margin rounded up to two digits."""
    step = 10 ** (math.floor(math.log10(margin)) - 1)
    return f"{math.ceil(margin / step) * step:.2g}"


def format_large_number(number: float) -> str:
    """A number with two or three digits and its magnitude as a word, such as 1.2 million."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 1 else f"{number:.2g}"


def format_factor(factor: float) -> str:
    return f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"


def _tokens(span: BreakEvenRange) -> str:
    assert span.value is not None
    ends = [format_large_number(end) if end is not None else "never" for end in (span.low, span.high)]
    return f"{format_large_number(span.value)} [{', '.join(ends)}]"


def _days(span: BreakEvenRange) -> str:
    assert span.value is not None
    return f"{format_factor(24 * span.value)} hours" if span.value < 2 else f"{format_factor(span.value)} days"


def _all_tasks(report: VerdictReport) -> str:
    total = len(report.margins)
    return f"all {total} tasks" if total > 1 else next(iter(report.margins))


def _cost(candidate: Candidate) -> str:
    if candidate.cost_ratio_interval:
        return f"{format_share(candidate.cost_ratio_interval)} of its cost"
    return f"{format_percent(candidate.cost_ratio or 0)} of its cost"


def _speed(candidate: Candidate) -> str:
    return f" and {format_factor(candidate.speedup)} times its speed" if candidate.speedup is not None else ""
