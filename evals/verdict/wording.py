"""A judgement in words: the answer, and what would settle it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from limbeck.evals.leaderboard.columns import title
from limbeck.registry.records import ComparedTask, Estimate

if TYPE_CHECKING:
    from limbeck.evals.cost.payback import Span
    from limbeck.evals.verdict.records import Candidate, Judgement, Open

SHORT = {"yes": "Yes", "no": "No, not with these candidates", "not settled": "Not settled"}


def chosen(judgement: Judgement) -> Candidate:
    """The candidate that the answer is about."""
    return next(each for each in judgement.candidates if each.version == judgement.candidate)


def sentence(judgement: Judgement) -> str:
    """The answer in words, without its first word."""
    best = chosen(judgement)
    return {"yes": _yes, "no": _no, "not settled": _not_settled}[judgement.answer](judgement, best)


def _yes(judgement: Judgement, best: Candidate) -> str:
    words = f"{named(best)} is as good as {judgement.teacher} within the margins on {_all_tasks(judgement)}, "
    words += f"at {_cost(best)}{_speed(best)}."
    if best.is_teacher:
        words += " It is the teacher itself in another form: what is wasted is its engine or precision, not its size."
    return f"{words} {payback(best)}"


def _no(judgement: Judgement, best: Candidate) -> str:
    if best.quality == "pass":
        return f"{named(best)} is as good as {judgement.teacher} within the margins, but not cheaper: {_cost(best)}."
    worse = f"surely worse than {judgement.teacher} by more than the margin on some task"
    if any(each.quality != "fail" for each in judgement.candidates):
        worse += ", or surely not cheaper"
    kept = f"keeps {between(best.retention)} of the teacher's quality" if best.retention else "is the best of them"
    if len(judgement.candidates) == 1:
        return f"{named(best)}, the only candidate, is {worse}. It {kept}."
    words = f"each of the {len(judgement.candidates)} candidates is {worse}."
    return f"{words} The closest, {named(best)}, {kept}."


def _not_settled(judgement: Judgement, best: Candidate) -> str:
    passed = sum(task.noninferiority.verdict == "pass" for task in best.tasks)
    shown = f"is {'' if passed else 'not '}shown to be as good as {judgement.teacher} on "
    many = len(judgement.margins)
    on = _all_tasks(judgement) if passed == many else f"{passed} of {many} tasks" if passed else "any task"
    words = f"the most promising candidate, {named(best)}, {shown}{on}"
    words += ", and surely worse on none." if best.quality != "pass" else "."
    if best.cost_ratio is None:
        return f"{words} What it costs beside the teacher is not measured."
    doubt = "" if best.cheaper else ", which may be no less than the teacher's"
    return f"{words} It runs at {_cost(best)}{doubt}{_speed(best)}."


def payback(candidate: Candidate) -> str:
    """When the making of a candidate is paid back."""
    found = candidate.payback
    if found is None:
        return "When it has paid for its making is not known."
    if found.break_even_tokens.value is None:
        return "Its making is never paid back."
    words = f"Its making, ${found.making_usd:.2g}, is paid back after {_tokens(found.break_even_tokens)} tokens"
    if found.break_even_days and found.tokens_per_day:
        words += f": {_days(found.break_even_days)} at {large(found.tokens_per_day)} tokens a day"
    return f"{words}."


def settle(judgement: Judgement) -> tuple[str, ...]:
    """What would settle a judgement that is not settled: for its most promising candidate."""
    return tuple(_settle(judgement, chosen(judgement))) if judgement.answer == "not settled" else ()


def _settle(judgement: Judgement, best: Candidate) -> Iterator[str]:
    tasks = {task.task: task for task in best.tasks}
    for still in best.open:
        yield _settle_task(tasks[still.task], still, judgement.tests)
    for name, why in best.untold.items():
        yield f"{name}: {why}."
    again = f"limbeck eval {best.version} --tasks {','.join(judgement.margins)} --against {judgement.teacher}"
    if best.cost_ratio is None:
        yield f"Its cost, timed in one run with the teacher's: {again}"
    elif best.cheaper is None:
        yield f"Its cost, timed again on a machine with nothing else to do: {again} --force"


def _settle_task(task: ComparedTask, still: Open, tests: int) -> str:
    test = task.noninferiority
    words = f"{task.task}: the difference is {signed(task.difference)}, the margin {test.margin:g}."
    if test.uncorrected == "pass":
        words += f" Alone it would pass; corrected for all {tests} tests it does not (p = {test.p_holm:.2g})."
    if still.documents:
        words += f" About {large(still.documents)} documents (now {large(task.documents)}) would settle it and show it "
        words += f"{'as good' if still.as_good else 'worse'}, if the difference stays what it is."
    else:
        words += " The difference is at the margin itself: no number of documents settles it while it stays there."
    return f"{words} Or a margin of {wider(still.margin)}, if that is acceptable, and said to be wider."


# --- numbers in words


def named(candidate: Candidate) -> str:
    """What a candidate is, and its NAME/VERSION."""
    what = title(candidate)
    return what if candidate.version in what else f"{what} ({candidate.version})"


def percent(share: float) -> str:
    return f"{share:.1%}" if abs(share) < 0.1 else f"{share:.0%}"


def between(estimate: Estimate) -> str:
    """A share with its interval."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def signed(estimate: Estimate) -> str:
    """A difference with its interval."""
    return f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"


def wider(margin: float) -> str:
    """A margin rounded up to two digits."""
    step = 10 ** (math.floor(math.log10(margin)) - 1)
    return f"{math.ceil(margin / step) * step:.2g}"


def large(number: float) -> str:
    """Two or three digits of a number that may be large."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{float(f'{number:.3g}'):,.0f}" if number >= 1 else f"{number:.2g}"


def times(factor: float) -> str:
    return f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"


def _tokens(span: Span) -> str:
    assert span.value is not None
    ends = [large(end) if end is not None else "never" for end in (span.low, span.high)]
    return f"{large(span.value)} [{', '.join(ends)}]"


def _days(span: Span) -> str:
    assert span.value is not None
    return f"{times(24 * span.value)} hours" if span.value < 2 else f"{times(span.value)} days"


def _all_tasks(judgement: Judgement) -> str:
    many = len(judgement.margins)
    return f"all {many} tasks" if many > 1 else next(iter(judgement.margins))


def _cost(candidate: Candidate) -> str:
    sure = candidate.cost_ratio_interval
    if sure:
        return f"{between(sure)} of its cost"
    return f"{percent(candidate.cost_ratio or 0)} of its cost"


def _speed(candidate: Candidate) -> str:
    return f" and {times(candidate.speedup)} times its speed" if candidate.speedup is not None else ""
