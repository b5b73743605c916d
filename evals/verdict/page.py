"""A verdict as one page, written in Markdown; the terminal and HTML render it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from limbeck.evals.cost.measure import cost_at_batch
from limbeck.evals.leaderboard import page as leaderboard
from limbeck.evals.leaderboard.columns import describe_version
from limbeck.evals.verdict.records import Candidate, VerdictReport
from limbeck.evals.verdict.wording import (
    SHORT_ANSWERS,
    chosen_candidate,
    describe_candidate,
    format_difference,
    format_factor,
    format_percent,
    format_share,
    payback_sentence,
)
from limbeck.registry.records import FIGURES, USD, ComparedTask, Cost, Estimate, Figure

MAX_CANDIDATES = 20  # candidates in the table

STYLE = Path(__file__).with_name("page.css")
HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main class="verdict {answer}">
{sections}
</main>
</body>
</html>
"""


def render_markdown(report: VerdictReport) -> str:
    """The page as Markdown. Escapes names and other foreign text, so that none of it becomes markup."""
    return "\n".join(text for _, text in _sections(report))


def render_html(report: VerdictReport) -> str:
    """The page as one HTML file that fetches nothing and runs no script."""
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    plots = {"quality": _plot(chosen_candidate(report))}
    return HTML.format(
        title=escape(f"{report.name}: {SHORT_ANSWERS[report.answer]}"),
        style=leaderboard.STYLE.read_text(encoding="utf-8") + STYLE.read_text(encoding="utf-8"),
        answer=report.answer.replace(" ", "-"),
        sections="".join(
            f'<section class="card {key}">{render(text)}{plots.get(key, "")}</section>\n'
            for key, text in _sections(report)
        ),
    )


def print_report(report: VerdictReport) -> None:
    """Print the page on the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    width = min(console.width, 120) if console.is_terminal else 120  # a pipe has no width
    Console(width=width, emoji=False).print(Markdown(render_markdown(report)))


def _sections(report: VerdictReport) -> Iterator[tuple[str, str]]:
    """The key of each section and its Markdown."""
    best = chosen_candidate(report)
    yield "answer", _lines(_answer(report))
    if report.next_steps:
        yield "settle", _lines(["## What would settle it", "", *_list(report.next_steps)])
    yield "quality", _lines(_quality(report, best))
    yield "cost", _lines(_cost(report, best))
    yield "candidates", _lines(_candidates(report))
    yield "unmeasured", _lines(["## What was not measured", "", *_list(report.not_measured)])
    yield "trace", _lines(_trace(report, best))


def _answer(report: VerdictReport) -> Iterator[str]:
    yield f"# {escape_markdown(report.name)}: is the giant a waste here? {SHORT_ANSWERS[report.answer]}."
    yield ""
    yield f"**{SHORT_ANSWERS[report.answer]}:** {escape_markdown(report.sentence)}"
    yield ""
    widths = sorted(set(report.margins.values()))
    if len(widths) == 1:
        margins = f"by less than {widths[0]:g}"
    else:
        margins = "by less than the margin: " + ", ".join(f"{task} {m:g}" for task, m in report.margins.items())
    yield (
        f"*As good* means worse {escape_markdown(margins)}, in each metric's units, with 95% confidence on every task, "
        f"corrected for {len(report.candidates)} candidates (Holm). "
        + (
            "This margin is the default; set your own with `--margin` before you look at the scores."
            if report.default_margins
            else "A margin means something only if it was set before looking at the scores."
        )
    )


def _quality(report: VerdictReport, best: Candidate) -> Iterator[str]:
    yield f"## Retention: {escape_markdown(describe_candidate(best))}"
    yield ""
    if best.retention:
        yield (
            f"It retains **{format_share(best.retention)}** of what {escape_markdown(report.teacher)} has above "
            "chance, as a mean over tasks, with its 95% interval."
        )
    else:
        yield "The share of the teacher's quality that it retains is unknown."
    yield ""
    head = ["task", "metric", "teacher", "candidate", "difference", "margin", "retention", "verdict"]
    yield from _table(head, [_task(task) for task in best.tasks])


def _task(task: ComparedTask) -> list[str]:
    return [
        task.task,
        task.metric if task.higher_is_better else f"{task.metric}, lower is better",
        f"{task.reference:.4f}",
        f"{task.candidate:.4f}",
        format_difference(task.difference),
        f"{task.noninferiority.margin:g}",
        format_share(task.retention) if task.retention else "-",
        task.noninferiority.verdict,
    ]


def _cost(report: VerdictReport, best: Candidate) -> Iterator[str]:
    yield "## Cost, and whether it pays"
    yield ""
    cost, teachers = best.cost, best.teacher_cost
    if cost is None:
        yield "Not measured."
        return
    ratio = best.cost_ratio_interval or best.cost_ratio
    speed = best.speedup_interval or best.speedup
    if ratio is not None:
        yield f"It runs at **{_percent(ratio)}** of the teacher's cost{_speedup_phrase(speed)}."
        yield ""
    rows = [
        _comparison_cells(column.title, column, getattr(teachers, key) if teachers else None, getattr(cost, key))
        for key, column in FIGURES.items()
        if getattr(cost, key) is not None
    ]
    for load in cost.loads[1:]:
        beside = cost_at_batch(teachers, load.batch).usd_per_million_tokens if teachers and teachers.loads else None
        dollars = FIGURES[USD]
        what = f"{dollars.title}, batches of {load.batch}"
        rows.append(_comparison_cells(what, dollars, beside, load.usd_per_million_tokens))
    yield from _table(["", escape_markdown(report.teacher), best.version, "of the teacher's"], rows)
    yield ""
    yield escape_markdown(_timing_sentence(report, best, cost))
    yield ""
    yield escape_markdown(payback_sentence(best))
    if best.payback:
        yield ""
        parts = [
            [part.name, f"{part.seconds:,.0f} s" if part.seconds else None, f"${part.usd:.2g}"]
            for part in best.payback.parts
        ]
        yield from _table(["cost of making it", "time", "dollars"], parts)


def _timing_sentence(report: VerdictReport, best: Candidate, cost: Cost) -> str:
    hardware, _, engine = cost.machine.partition("; ")
    beside = f", {report.teacher} in {best.teacher_cost.machine.partition('; ')[2]}" if best.teacher_cost else ""
    words = (
        f"Timed on {hardware}, with {cost.threads} threads: {best.version} in {engine}{beside}; {cost.prompt_tokens} "
        f"tokens in and {cost.new_tokens} out, one request at a time unless a batch is named. Dollars: "
        f"{'; '.join(_prices(best)) or f'{cost.usd_per_hour:g} USD/h'}."
    )
    if best.cost_ratio_interval and best.teacher_cost:
        words += " The ratio above is the median over paired rounds; the table shows the median of each."
    return words


def _comparison_cells(label: str, column: Figure, teacher: float | None, own: float) -> list[str | None]:
    """The cells of one figure: teacher, candidate, and their ratio."""
    ratio = own / teacher if teacher else None
    beside = ratio and (f"{format_factor(ratio)} times" if ratio >= 2 else format_percent(ratio))
    return [label, column.format_value(teacher), column.format_value(own), beside or None]


def _prices(best: Candidate) -> list[str]:
    used = [cost.price for cost in (best.cost, best.teacher_cost) if cost and cost.price]
    return list(dict.fromkeys([*used, *(best.payback.prices if best.payback else ())]))


def _percent(ratio: Estimate | float) -> str:
    return format_share(ratio) if isinstance(ratio, Estimate) else format_percent(ratio)


def _speedup_phrase(speed: Estimate | float | None) -> str:
    if speed is None:
        return ""
    if isinstance(speed, Estimate):
        low, high = format_factor(speed.low), format_factor(speed.high)
        return f", **{format_factor(speed.value)}** times [{low}, {high}] as fast"
    return f", **{format_factor(speed)}** times as fast"


def _candidates(report: VerdictReport) -> Iterator[str]:
    yield "## Every candidate"
    yield ""
    rows = []
    for each in report.candidates[:MAX_CANDIDATES]:
        words = {"pass": "as good", "fail": "worse", "inconclusive": "not settled"}[each.quality]
        rows.append(
            [
                each.version,
                describe_version(each),
                format_share(each.retention) if each.retention else None,
                format_percent(each.cost_ratio) if each.cost_ratio is not None else None,
                f"{format_factor(each.speedup)}x" if each.speedup is not None else None,
                words,
                "; ".join(_reasons(each)),
            ]
        )
    yield from _table(["version", "what", "retention", "cost ratio", "speed-up", "quality", "because of"], rows)
    if len(report.candidates) > MAX_CANDIDATES:
        yield ""
        yield f"{len(report.candidates) - MAX_CANDIDATES} more are in `--format json`."


def _reasons(candidate: Candidate) -> Iterator[str]:
    """The tasks that a candidate does not pass."""
    for outcome in ("fail", "inconclusive"):
        if tasks := [task.task for task in candidate.tasks if task.noninferiority.verdict == outcome]:
            names = "all tasks" if len(tasks) == len(candidate.tasks) > 1 else ", ".join(tasks)
            yield f"{outcome}: {names}"
    if candidate.unknown_tasks:
        yield f"cannot be tested: {', '.join(candidate.unknown_tasks)}"


def _trace(report: VerdictReport, best: Candidate) -> Iterator[str]:
    yield "## How to trace it"
    yield ""
    rows = [
        ["teacher", report.teacher, f"files {report.teacher_digest[:12]}"],
        ["candidate", best.version, f"files {best.artifact_digest[:12]}, scorecard {best.scorecard[:12]}"],
        ["tasks", ", ".join(report.margins), f"tasks {report.tasks_digest[:12]}"],
        ["prompts", report.harness, f"prompts {report.prompts_digest[:12]}"],
        ["decided", f"{report.created:%Y-%m-%d %H:%M} UTC", ""],
    ]
    yield from _table(["", "what", "digest"], rows)
    yield ""
    yield "To reproduce it (give `eval` the same `--include-path` and `--limit` as the first time):"
    yield ""
    tasks, widths = _word(",".join(report.margins)), set(report.margins.values())
    words = (
        [f"{task}={margin:g}" for task, margin in report.margins.items()] if len(widths) > 1 else [f"{widths.pop():g}"]
    )
    margins = "".join(f" --margin {_word(word)}" for word in words)
    requested = "".join(f" --task {_word(task)}" for task in report.requested_tasks)
    yield f"    limbeck models lineage {best.version}"
    yield f"    limbeck eval {report.name} --tasks {tasks} --against {report.teacher}"
    yield f"    limbeck compare {best.version} {report.teacher} --tasks {tasks}{margins}"
    yield f"    limbeck verdict {report.name} --against {report.teacher}{requested}{margins}"


# --- HTML


def _plot(best: Candidate) -> str:
    """Plot each task's difference and one-sided bounds, with 0 and the margin; right is better."""
    lines = []
    for task in best.tasks:
        test, sign = task.noninferiority, 1 if task.higher_is_better else -1
        scale = 88 / max(abs(test.lower), abs(test.upper), test.margin)
        low, at, high, margin = (
            f"{scale * value:.1f}" for value in (test.lower, sign * task.difference.value, test.upper, -test.margin)
        )
        lines.append(
            f'<span>{escape(task.task)}</span><svg viewBox="-100 0 200 20" preserveAspectRatio="none" role="img" '
            f'aria-label="{test.lower:+.4f} to {test.upper:+.4f}, margin {-test.margin:g}">'
            f'<path class="zero" d="M0 0V20"/><path class="margin" d="M{margin} 0V20"/>'
            f'<path class="{test.verdict}" d="M{low} 10H{high}M{low} 5V15M{high} 5V15"/>'
            f'<path class="at {test.verdict}" d="M{at} 4V16"/></svg><span class="{test.verdict}">{test.verdict}</span>'
        )
    caption = (
        "Candidate minus teacher, with one-sided 95% bounds before the correction; right is better. The line marks "
        "no difference, the dashes the margin. Each task has its own scale."
    )
    return f'<div class="differences">{"".join(lines)}</div><p class="caption">{caption}</p>' if lines else ""


# --- Markdown


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line."""
    text = "".join(c if c.isprintable() else " " for c in text)
    # An underscore inside a word is not emphasis, and brackets alone are not a link.
    return re.sub(r"[\\`*<>|#&~]|(?<!\w)_|_(?!\w)|\](?=[(\[:])", r"\\\g<0>", text)


def _word(text: str) -> str:
    """Quote a word of a command line."""
    return shlex.quote("".join(c for c in text if c.isprintable()))


def _lines(lines: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


def _list(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        # Text that begins like a list item would become one.
        yield "- " + re.sub(r"^([-+]|\d+(?=[.)]))", r"\\\1", escape_markdown(text))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | None]]) -> Iterator[str]:
    for cells in (columns, ["---"] * len(columns)):
        yield f"| {' | '.join(cells)} |"
    for row in rows:
        yield f"| {' | '.join('-' if cell is None else _cell(cell) for cell in row)} |"


def _cell(text: str) -> str:
    """Escape a cell, and keep each interval on one line."""
    return re.sub(r"\[[^\]]*\]", lambda interval: interval[0].replace(" ", "\u00a0"), escape_markdown(text))
