"""The leaderboard as one HTML file: a plot and a table, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from evals.plot import draw, title
from registry.records import LeaderboardRow

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}: cost against quality</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{name}</h1>
<p>{subtitle}</p>
</header>
<section class="tiles">{tiles}</section>
<section class="card plot">
{plot}
<p class="legend">{legend}</p>
</section>
<section class="card table">
<table>
<thead><tr>{headers}</tr></thead>
<tbody>
{lines}
</tbody>
</table>
</section>
<footer>{notes}</footer>
</main>
</body>
</html>
"""

STYLE = """
:root { --bg: #f6f6f3; --card: #fff; --ink: #1c2128; --soft: #656d78; --line: #e4e6e9; --front: #1c2128;
  --teacher: #b45309; --student: #4f55d6; --onnx: #0d7d74; --pass: #15803d; --fail: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #13161a; --card: #1b1f25; --ink: #e7e9ec; --soft: #98a1ad; --line: #2d333c; --front: #e7e9ec;
    --teacher: #fbb13c; --student: #a3adff; --onnx: #35d0bd; --pass: #4ade80; --fail: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 26px; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
header p, footer { color: var(--soft); margin: 2px 0 0; }
footer { font-size: 13px; margin-top: 18px; max-width: 78ch; }
footer p { margin: 0 0 6px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; margin-top: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin-top: 20px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; letter-spacing: -.01em; }
.tile span { color: var(--soft); font-size: 13px; display: block; overflow-wrap: anywhere; }
.plot { padding: 16px 12px 12px; }
svg { display: block; width: 100%; height: auto; }
svg.w400 { display: none; }
text { fill: var(--ink); font-size: 12px; }
.tick, .axis { fill: var(--soft); }
.name { font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
.grid { stroke: var(--line); }
.whole { stroke: var(--teacher); stroke-dasharray: 5 4; }
.frontier { fill: none; stroke: var(--front); stroke-width: 1.75; opacity: .55; }
.bar { fill: none; stroke: currentColor; stroke-width: 1.4; }
svg g { fill: currentColor; stroke: currentColor; }
g.beaten { opacity: .42; }
g.beaten > :last-child { fill: var(--card); stroke-width: 1.8; }
.teacher { color: var(--teacher); } .student { color: var(--student); } .onnx { color: var(--onnx); }
g.teacher { opacity: 1; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 8px 2px; color: var(--soft); font-size: 13px; }
.legend svg { display: inline-block; width: 18px; height: 18px; vertical-align: -4px; margin-right: 4px; }
.table { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: 12.5px; vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
td small { font-weight: 400; color: var(--soft); display: block; font-size: 12px; }
tr.beaten td { color: var(--soft); }
tr.best td:first-child { font-weight: 600; }
.tag { border: 1px solid currentColor; border-radius: 99px; padding: 0 8px; font-size: 12px; margin-left: 4px; }
.pass { color: var(--pass); } .fail { color: var(--fail); } .inconclusive { color: var(--teacher); }
@media (max-width: 640px) {
  main { padding: 20px 12px 32px; }
  svg.w400 { display: block; } svg.w900 { display: none; }
  .plot { padding: 12px 4px 8px; }
  th, td { padding: 7px 9px; }
}
"""

NONE = "&ndash;"
LEGEND = (
    ("teacher", '<path d="M0-8 8 0 0 8-8 0z"/>', "teacher"),
    ("student best", '<rect x="-5.5" y="-5.5" width="11" height="11" rx="1.5"/>', "student, PyTorch"),
    ("onnx best", '<circle r="6"/>', "student, ONNX"),
    ("onnx beaten", '<circle r="6"/>', "beaten: another is cheaper and as good"),
)
FIRST = ("version", "quality kept", "$ per 1M", "cost ratio", "speed-up", "verdict")
LAST = ("tokens/s", "p95 ms", "size MB", "memory MB")
NOTES = (
    "Quality kept is (student &minus; chance) / (teacher &minus; chance), averaged over tasks, with its 95% interval: "
    "paired by document, standard errors clustered by source file (Miller, arXiv 2411.00640).",
    "The line, and &#9670; in the table, is the Pareto frontier: the most quality that each price buys. Dollars are "
    "for prompt and new tokens together, one request at a time, at the price per hour that was given.",
)


def render(name: str, rows: Sequence[LeaderboardRow], task: str | None = None) -> str:
    """The page of a model's leaderboard.

    Args:
        rows: of `evals.leaderboard.rows`.
        task: the one that the rows are ranked by, if they are.
    """
    metrics = {task: str(quality["metric"]) for row in rows for task, quality in row.quality.items()}
    subtitle = f"Cost against quality kept of the teacher's{f', on {task}' if task else ''}"
    plot = draw(rows, 900, 430) + draw(rows, 400, 400)
    tasks = [
        escape(name) + ("" if name.endswith(metric) else f"<br>{escape(metric)}") for name, metric in metrics.items()
    ]
    return PAGE.format(
        name=escape(name),
        style=STYLE,
        subtitle=escape(f"{subtitle} · {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"),
        tiles="".join(_tiles(rows)),
        plot=plot or '<p class="legend">Nothing has both a cost and a retention yet: limbeck eval ... --against</p>',
        legend="".join(_legend(rows)) if plot else "",
        headers="".join(f"<th>{header}</th>" for header in (*FIRST, *tasks, *LAST)),
        lines="\n".join(_line(row, list(metrics)) for row in rows),
        notes="".join(f"<p>{note}</p>" for note in NOTES),
    )


def _tiles(rows: Sequence[LeaderboardRow]) -> Iterator[str]:
    """The three things to know first."""
    teacher = next((row for row in rows if row.kind == "teacher" and row.cost), None)
    best = [row for row in rows if row.pareto and row.kind != "teacher"]
    if teacher and teacher.cost:
        yield _tile(
            f"${teacher.cost['usd_per_million_tokens']:.3g}", f"per million tokens: the teacher, {teacher.version}"
        )
    if best:
        top = max(best, key=lambda row: row.retention["value"] if row.retention else 0)
        yield _kept_tile(top, "best on the frontier")
        cheapest = min(best, key=lambda row: row.cost["usd_per_million_tokens"] if row.cost else 0)
        if cheapest is not top:
            yield _kept_tile(cheapest, "cheapest on the frontier")
    for row in rows:
        if row.aliases:
            yield _tile(row.version, f"is {', '.join(row.aliases)}: {title(row)}")


def _kept_tile(row: LeaderboardRow, what: str) -> str:
    kept = row.retention["value"] if row.retention else 0.0
    at = f" at {_percent(row.cost_ratio)} of the cost" if row.cost_ratio is not None else ""
    return _tile(f"{kept:.1%}", f"kept{at}: {row.version}, {title(row)}, {what}")


def _tile(value: str, words: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _legend(rows: Sequence[LeaderboardRow]) -> Iterator[str]:
    kinds = {row.kind for row in rows}
    for classes, mark, words in LEGEND:
        if classes.split()[0] in kinds:
            yield f'<span><svg viewBox="-10 -10 20 20"><g class="{classes}">{mark}</g></svg>{words}</span>'


def _line(row: LeaderboardRow, tasks: Sequence[str]) -> str:
    cost: dict[str, Any] = row.cost or {}
    kept = row.retention
    mark = f'<span class="{row.kind}">&#9670;</span> ' if row.pareto else ""
    tags = [f'<span class="{row.verdict}">{row.verdict}</span>'] if row.verdict else []
    tags += [f'<span class="tag">{escape(alias)}</span>' for alias in row.aliases]
    cells = [
        f"{mark}{escape(row.version)}<small>{escape(title(row))}</small>",
        f"{kept['value']:.1%}<small>{kept['low']:.1%} to {kept['high']:.1%}</small>" if kept else NONE,
        _number(cost.get("usd_per_million_tokens"), ".3g"),
        _number(row.cost_ratio, ".3f"),
        _number(row.speedup, ".1f", suffix="&times;"),
        " ".join(tags) or NONE,
    ]
    for task in tasks:
        quality = row.quality.get(task, {})
        value, stderr = quality.get("value"), quality.get("stderr")
        error = f"<small>&plusmn;{stderr:.3f}</small>" if isinstance(stderr, float) else ""
        cells.append(f"{value:.3f}{error}" if isinstance(value, float) else NONE)
    cells += [
        _number(cost.get("decode_tokens_per_s"), ",.0f"),
        _number(cost.get("p95_ms"), ",.1f"),
        _number(cost.get("disk_bytes"), ",.1f", 1e-6),
        _number(cost.get("peak_rss_bytes"), ",.0f", 1e-6),
    ]
    state = "best" if row.pareto else "beaten" if row.kind != "teacher" else ""
    return f'<tr class="{state}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _number(value: float | None, form: str, factor: float = 1.0, suffix: str = "") -> str:
    return NONE if value is None else f"{value * factor:{form}}{suffix}"
