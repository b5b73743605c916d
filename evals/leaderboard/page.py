"""The leaderboard's page: plots to zoom, tables to sort and filter. `limbeck ui` shows its parts too.

One HTML file that works offline and includes page.css and page.js. Without JavaScript it still has the tables, in
their ranked order.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from limbeck.evals.leaderboard.columns import describe_version
from limbeck.evals.leaderboard.ranking import sort_value
from limbeck.evals.leaderboard.rows import group_by_setting
from limbeck.evals.scores.controls import describe_control_result
from limbeck.registry.records import FIGURES, HEADLINES, USD, LeaderboardRow

STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src '{hash}'">
<title>{name}: cost against quality</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{name}</h1>
<p>{subtitle}</p>
</header>
<section class="tiles">{parts.tiles}</section>
<form class="controls" hidden>{parts.controls}</form>
{parts.boards}
<footer>{parts.notes}</footer>
</main>
<script type="application/json" id="data">{parts.data}</script>
<script>{script}</script>
</body>
</html>
"""
BOARD = """<section class="board">
{heading}
<div class="card plot">
<div class="zoom" role="group" aria-label="Zoom" hidden>
<button type="button" data-zoom="in" title="Zoom in: +" aria-label="Zoom in">+</button>
<button type="button" data-zoom="out" title="Zoom out: -" aria-label="Zoom out">&minus;</button>
<button type="button" data-zoom="whole" title="Show all: 0">all</button>
</div>
<svg role="group" tabindex="-1" aria-label="{label}"></svg>
<p class="empty" hidden>No shown version has both a cost and a retention: run limbeck eval ... --against TEACHER</p>
<div class="tip" role="status" hidden></div>
<noscript><p class="empty">The plot needs JavaScript; the table does not.</p></noscript>
<p class="legend">{legend}</p>
</div>
<div class="card table" tabindex="0" role="region" aria-label="The table">
<table>
<thead><tr>{headers}</tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>
</section>
"""

EMPTY_CELL = "&ndash;"
LABEL = (
    "Retention against cost. The arrow keys go from point to point, with Shift they move the plot; plus and minus "
    "zoom, 0 shows all. Drag over a part to zoom in; the wheel zooms with Ctrl held, or after a click on the plot."
)
LEGEND = (
    ("teacher", '<path class="mark" d="M0-8 8 0 0 8-8 0z"/>', "teacher"),
    ("student best", '<rect class="mark" x="-5.5" y="-5.5" width="11" height="11" rx="1.5"/>', "student, PyTorch"),
    ("onnx best", '<circle class="mark" r="6"/>', "student, ONNX"),
    ("onnx beaten", '<circle class="mark" r="6"/>', "grey: another version is cheaper and as good"),
)
NOTES = (
    "Retention is (student &minus; chance) / (teacher &minus; chance), averaged over tasks, with its 95% interval: "
    "paired by document, standard errors clustered by source file (Miller, arXiv 2411.00640).",
    "The line, and &#9670; in the table, is the Pareto frontier of the shown versions: the best retention at each "
    "price. Dollars are for prompt and new tokens together, one request at a time, at the given price per hour. A "
    "horizontal bar is the interval of the cost over the rounds of its measurement.",
)


@dataclass(frozen=True)
class View:
    """What the page shows first, and where its rows link to."""

    task: str = ""  # the plot shows retention on this task; "": the mean over all
    cost: str = USD  # the cost figure that the plot shows
    kind: str = ""  # show only these rows; "": all
    recipe: str = ""
    precision: str = ""
    sort: str = ""  # a key of `ranking.sort_keys`; "": the order of the rows
    reverse: bool = False  # whether the worst, or last, comes first
    link: Callable[[str], str] | None = None  # NAME/VERSION -> its page; None: no links
    sort_link: Callable[[str, bool], str] | None = None  # (key, reversed) -> this page sorted by it
    selection_form: str = ""  # the id of a form that takes two versions; "": none
    paged: bool = False  # there are more rows: each choice asks the server again

    def shows(self, row: LeaderboardRow) -> bool:
        """Whether a row passes the filters."""
        return all(not wanted or getattr(row, field) == wanted for field, wanted in self.filters.items())

    @property
    def filters(self) -> dict[str, str]:
        """Field of a row -> the value it must have; "" allows any."""
        return {"recipe": self.recipe, "precision": self.precision, "kind": self.kind}


class PageParts(NamedTuple):
    """The page in pieces of HTML; `data` is what page.js reads."""

    tiles: str
    controls: str
    boards: str
    notes: str
    data: str


def render_page(name: str, rows: Sequence[LeaderboardRow], task: str | None = None, cost: str = USD) -> str:
    """The page of a model's leaderboard, as one HTML file.

    Args:
        rows: from `limbeck.evals.leaderboard.rows.leaderboard_rows`.
        task: the task that the rows are ranked by; None for the mean over tasks.
        cost: the cost figure that the plot shows first.
    """
    script = SCRIPT.read_text(encoding="utf-8")
    subtitle = f"Cost against retention{f' on {task}' if task else ''}"
    return PAGE.format(
        name=escape(name),
        hash=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        style=STYLE.read_text(encoding="utf-8"),
        subtitle=escape(f"{subtitle} · {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        parts=render_parts(rows, View(cost=cost), all_tasks=task or "all tasks", tasks=() if task else None),
        script=script,
    )


def render_parts(
    rows: Sequence[LeaderboardRow],
    view: View,
    *,
    all_tasks: str = "all tasks",
    tasks: Iterable[str] | None = None,
    all_rows: Sequence[LeaderboardRow] | None = None,
    extra_points: Sequence[LeaderboardRow] = (),
) -> PageParts:
    """The parts of the page.

    Args:
        rows: the rows of the tables.
        view: what to show first.
        all_tasks: the name of the mean over tasks.
        tasks: the tasks to choose from for the plot; None for all tasks of the rows.
        all_rows: the rows behind choices and tiles, if the tables show only some of them.
        extra_points: more rows for the plot only.
    """
    all_rows = rows if all_rows is None else all_rows
    boards = group_by_setting(rows) or [[]]
    data = {
        "boards": [
            [_point(row, view) for row in (*board, *_extra_points_of_board(board, extra_points))] for board in boards
        ],
        "costs": {
            key: {"title": column.title, "factor": column.factor, "higher": column.higher_is_better}
            for key, column in FIGURES.items()
        },
        "tooltip_costs": HEADLINES,
        "paged": view.paged,
    }
    names = dict.fromkeys(name for row in all_rows for name in row.task_retention) if tasks is None else tasks
    return PageParts(
        tiles="".join(_tiles((group_by_setting(all_rows) or [[]])[0])),
        controls="".join(_controls(all_rows, view, {"": all_tasks} | {name: name for name in names})),
        boards="".join(_board(board, view) for board in boards) + _against_controls(rows),
        notes="".join(f"<p>{note}</p>" for note in NOTES),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _extra_points_of_board(
    board: Sequence[LeaderboardRow], extra_points: Sequence[LeaderboardRow]
) -> list[LeaderboardRow]:
    """The extra points that have a board's setting and are not in it."""
    there = {row.version for row in board}
    return [row for row in extra_points if board and row.setting == board[0].setting and row.version not in there]


def _point(row: LeaderboardRow, view: View) -> dict[str, Any]:
    """A row as page.js reads it; six digits are enough for a plot."""
    spread = {
        key: [_round_six_digits(ends["low"]), _round_six_digits(ends["high"])] for key, ends in row.intervals.items()
    }
    return {
        "version": row.version,
        "title": describe_version(row),
        "kind": row.kind,
        "recipe": row.recipe,
        "precision": row.precision,
        "retention": _value_and_bounds(row.retention) if row.retention else None,
        "tasks": {task: _value_and_bounds(each) for task, each in row.task_retention.items()},
        "cost": {key: _round_six_digits(value) for key, value in (row.cost or {}).items() if value is not None},
        "spread": spread,
        "ratio": row.cost_ratio,
        "verdict": row.verdict,
        "aliases": row.aliases,
        "link": view.link(row.version) if view.link else None,
    }


def _value_and_bounds(retention: dict[str, float]) -> list[float]:
    return [_round_six_digits(retention[key]) for key in ("value", "low", "high")]


def _round_six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _controls(rows: Sequence[LeaderboardRow], view: View, tasks: dict[str, str]) -> Iterator[str]:
    measured = [key for key in FIGURES if key == view.cost or key in _measured_figures(rows)]
    yield _select("task", "retention on", tasks, view.task)
    yield _select("cost", "cost", {key: FIGURES[key].title for key in measured}, view.cost)
    for field, wanted in view.filters.items():
        values = sorted({getattr(row, field) for row in rows} - {None})
        yield _select(field, field, {"": "all"} | {value: value for value in values}, wanted, hidden=len(values) < 2)
    yield '<button type="reset" hidden>Show all</button><output name="count"></output>'


def _select(name: str, label: str, options: dict[str, str], chosen: str = "", hidden: bool = False) -> str:
    choices = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(words)}</option>'
        for value, words in options.items()
    )
    return f'<label{" hidden" if hidden else ""}>{label}<select name="{name}">{choices}</select></label>'


def _tiles(rows: Sequence[LeaderboardRow]) -> Iterator[str]:
    """The most important facts: the teacher's cost, the best and the cheapest version, the aliases."""
    teacher = next((row for row in rows if row.kind == "teacher" and row.cost), None)
    best = [row for row in rows if row.pareto and row.kind != "teacher"]
    if teacher and teacher.cost:
        yield _tile(f"${teacher.cost[USD]:.3g}", f"per million tokens: the teacher, {teacher.version}")
    if best:
        top = max(best, key=lambda row: row.retention["value"] if row.retention else 0)
        yield _retention_tile(top, "best on the frontier")
        cheapest = min(best, key=lambda row: sort_value(row, USD) or 0)
        if cheapest is not top:
            yield _retention_tile(cheapest, "cheapest on the frontier")
    for row in rows:
        if row.aliases:
            yield _tile(row.version, f"is {', '.join(row.aliases)}: {describe_version(row)}")


def _retention_tile(row: LeaderboardRow, role: str) -> str:
    retention = row.retention["value"] if row.retention else 0.0
    at = f" at {_percent(row.cost_ratio)} of the cost" if row.cost_ratio is not None else ""
    return _tile(f"{retention:.1%}", f"retention{at}: {row.version}, {describe_version(row)}, {role}")


def _tile(value: str, words: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _board(rows: Sequence[LeaderboardRow], view: View) -> str:
    """The plot and the table of one setting."""
    differs = rows[0].differs if rows else None
    metrics = {task: result for row in rows for task, result in row.quality.items()}
    figures = _measured_figures(rows)
    return BOARD.format(
        heading=f"<h2>Ranked apart<small>{escape(differs)}</small></h2>" if differs else "",
        legend="".join(_legend(rows)),
        label=LABEL,
        headers="".join(_headers(metrics, figures, view)),
        lines="\n".join(_line(place, row, list(metrics), figures, view) for place, row in enumerate(rows)),
    )


def _against_controls(rows: Sequence[LeaderboardRow]) -> str:
    """The comparisons of students with their controls; empty without controls."""
    items = []
    for comparison in (each for row in rows for each in row.against_controls):
        first, *tasks = describe_control_result(comparison)
        items.append(
            f"<li>{escape(first)}<ul>{''.join(f'<li>{escape(line.strip())}</li>' for line in tasks)}</ul></li>"
        )
    if not items:
        return ""
    return f'<section class="board"><h2>What distillation brought</h2><ul>{"".join(items)}</ul></section>'


def _legend(rows: Sequence[LeaderboardRow]) -> Iterator[str]:
    kinds = {row.kind for row in rows}
    for classes, mark, words in LEGEND:
        if classes.split()[0] in kinds or "beaten" in classes:
            yield f'<span><svg viewBox="-10 -10 20 20"><g class="{classes}">{mark}</g></svg>{words}</span>'


def _measured_figures(rows: Sequence[LeaderboardRow]) -> list[str]:
    """The cost figures that some row has; dollars always."""
    return [key for key in FIGURES if key == USD or any(row.cost and row.cost[key] is not None for row in rows)]


def _headers(metrics: dict[str, dict[str, Any]], figures: Sequence[str], view: View) -> Iterator[str]:
    """Column titles; `data-first` is the order that the first click sorts by."""
    first, *costs = figures
    yield _header("version", "version", False, view)
    yield _header("retention", "retention", True, view)
    yield _header(first, FIGURES[first].title, FIGURES[first].higher_is_better, view)
    for key, words, descending in (("cost_ratio", "cost ratio", False), ("speedup", "speed-up", True)):
        yield _header(key, words, descending, view)
    yield _header("verdict", "verdict", False, view)
    for task, result in metrics.items():
        metric = str(result["metric"])
        words = task if task.endswith(metric) else f"{task}\n{metric}"
        yield _header(task, words, bool(result["higher_is_better"]), view)
    for key in costs:
        yield _header(key, FIGURES[key].title, FIGURES[key].higher_is_better, view)


def _header(key: str, words: str, descending: bool, view: View) -> str:
    now = key == view.sort
    shown = escape(words).replace("\n", "<br>")
    if view.sort_link:
        shown = f'<a href="{escape(view.sort_link(key, now and not view.reverse))}">{shown}</a>'
    sorted_ = ""
    if now:
        order = "descending" if descending != view.reverse else "ascending"
        sorted_ = f' aria-sort="{order}"'
    first = "descending" if descending else "ascending"
    return f'<th scope="col" data-key="{escape(key)}" data-first="{first}"{sorted_}>{shown}</th>'


def _line(place: int, row: LeaderboardRow, tasks: Sequence[str], figures: Sequence[str], view: View) -> str:
    cost: dict[str, Any] = row.cost or {}
    retention = row.retention
    tags = [f'<span class="{row.verdict}">{row.verdict}</span>'] if row.verdict else []
    tags += [f'<span class="tag">{escape(alias)}</span>' for alias in row.aliases]
    name = escape(row.version)
    if view.link:
        name = f'<a href="{escape(view.link(row.version))}">{name}</a>'
    if view.selection_form:
        words = f'form="{view.selection_form}" name="v" value="{escape(row.version)}"'
        name = f'<input type="checkbox" {words} aria-label="compare {escape(row.version)}"> {name}'
    name += f' <span class="best {row.kind}">&#9670;</span><small>{escape(describe_version(row))}</small>'
    shown_retention = None
    if retention:
        interval = f"{retention['low']:.1%} to {retention['high']:.1%}"
        shown_retention = f"{retention['value']:.1%}<small>{interval}</small>"
    prices = {key: _cell(cost.get(key), FIGURES[key].format_value(cost.get(key))) for key in figures}
    cells = [
        _cell(row.version, name),
        _cell(retention["value"] if retention else None, shown_retention, " data-retention"),
        prices.pop(USD),
        _cell(row.cost_ratio, row.cost_ratio is not None and f"{row.cost_ratio:.3f}"),
        _cell(row.speedup, row.speedup is not None and f"{row.speedup:.1f}&times;"),
        _cell(" ".join([row.verdict or "", *row.aliases]).strip(), " ".join(tags)),
    ]
    for task in tasks:
        quality = row.quality.get(task, {})
        score, stderr = quality.get("value"), quality.get("stderr")
        error = f"<small>&plusmn;{stderr:.3f}</small>" if isinstance(stderr, float) else ""
        cells.append(_cell(score, isinstance(score, float) and f"{score:.3f}{error}"))
    cells += prices.values()
    classes = f"{row.kind}{' best' if row.pareto else ''}"
    return f'<tr class="{classes}" data-row="{place}"{"" if view.shows(row) else " hidden"}>{"".join(cells)}</tr>'


def _cell(value: object, shown: str | bool | None, attributes: str = "") -> str:
    """A table cell that shows HTML and sorts by `value`."""
    return f'<td data-value="{"" if value is None else escape(str(value))}"{attributes}>{shown or EMPTY_CELL}</td>'
