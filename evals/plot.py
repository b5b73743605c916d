"""The leaderboard's plot as SVG: dollars (log) against retention, intervals, and the Pareto frontier."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from registry.records import LeaderboardRow

CHARACTER = 6.6  # width of one of the labels' letters
LINE = 15  # height of a label
MARKS = {  # of each kind, around (0, 0); shapes too, for those who tell no colours
    "teacher": '<path d="M0-8 8 0 0 8-8 0z"/>',
    "student": '<rect x="-5.5" y="-5.5" width="11" height="11" rx="1.5"/>',
    "onnx": '<circle r="6"/>',
}


@dataclass(frozen=True)
class Frame:
    """Where the data goes in an SVG of `width` x `height`."""

    width: int
    height: int
    usd: tuple[float, float]
    retention: tuple[float, float]
    left: int = 52
    right: int = 18
    top: int = 18
    bottom: int = 50

    def x(self, usd: float) -> float:
        low, high = map(math.log10, self.usd)
        return self.left + (math.log10(usd) - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, retention: float) -> float:
        low, high = self.retention
        share = (min(max(retention, low), high) - low) / (high - low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)


def draw(rows: Sequence[LeaderboardRow], width: int, height: int) -> str:
    """An SVG element of the rows that have both a cost and a retention; "" where none has."""
    points = [row for row in rows if row.cost and row.retention]
    if not points:
        return ""
    frame = Frame(width, height, _usd_range(points), _retention_range(points))
    best = sorted((row for row in points if row.pareto), key=_usd)
    parts = [*_axes(frame), _frontier(frame, best)]
    # The frontier last: what matters lies on top.
    parts += [_point(frame, row) for row in sorted(points, key=lambda row: (row.pareto, row.kind == "teacher"))]
    parts += _labels(frame, points)
    return (
        f'<svg class="w{width}" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Retention against dollars per million tokens">' + "".join(parts) + "</svg>"
    )


def title(row: LeaderboardRow) -> str:
    """What a version is, in a word or two."""
    if row.kind == "teacher":
        return "teacher"
    return f"{row.recipe or row.version} {row.precision if row.kind == 'onnx' else 'torch'}"


def _usd(row: LeaderboardRow) -> float:
    return row.cost["usd_per_million_tokens"] if row.cost else 0.0


def _kept(row: LeaderboardRow) -> dict[str, float]:
    return row.retention or {}


def _usd_range(points: Sequence[LeaderboardRow]) -> tuple[float, float]:
    prices = [_usd(row) for row in points]
    spread = max(math.log10(max(prices) / min(prices)), 0.5)
    margin = 10 ** (0.12 * spread)
    return min(prices) / margin, max(prices) * margin


def _retention_range(points: Sequence[LeaderboardRow]) -> tuple[float, float]:
    """Room for the intervals, but no interval may squeeze the rest together."""
    values = [_kept(row)["value"] for row in points]
    around = max(max(values) - min(values), 0.05)
    low = max(min(_kept(row)["low"] for row in points), min(values) - around)
    high = min(max(max(_kept(row)["high"] for row in points), 1.0), max(*values, 1.0) + around)
    return low - 0.06 * (high - low), high + 0.08 * (high - low)


def _axes(frame: Frame) -> Iterator[str]:
    left, right = frame.left, frame.width - frame.right
    bottom = frame.height - frame.bottom
    for tick in _linear_ticks(*frame.retention):
        y = frame.y(tick)
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.0%}</text>'
    for tick in _log_ticks(*frame.usd, most=8 if frame.width > 500 else 4):
        x = frame.x(tick)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">${tick:g}</text>'
    y = frame.y(1.0)
    yield f'<line class="whole" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    middle = (left + right) / 2
    yield f'<text class="axis" x="{middle}" y="{frame.height - 10}" text-anchor="middle">$ per million tokens</text>'
    yield f'<text class="axis" x="{left}" y="12">quality kept</text>'


def _linear_ticks(low: float, high: float) -> list[float]:
    power = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= 7)
    return [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks


def _frontier(frame: Frame, best: Sequence[LeaderboardRow]) -> str:
    """The most quality that each price buys: a staircase."""
    if not best:
        return ""
    steps = [f"M{frame.x(_usd(best[0])):.1f} {frame.y(_kept(best[0])['value']):.1f}"]
    steps += [f"H{frame.x(_usd(row)):.1f}V{frame.y(_kept(row)['value']):.1f}" for row in best[1:]]
    return f'<path class="frontier" d="{"".join(steps)}H{frame.width - frame.right}"/>'


def _point(frame: Frame, row: LeaderboardRow) -> str:
    x, kept = frame.x(_usd(row)), _kept(row)
    y, low, high = (frame.y(kept[name]) - frame.y(kept["value"]) for name in ("value", "low", "high"))
    caps = f"M0 {low:.1f}V{high:.1f}M-4 {low:.1f}H4M-4 {high:.1f}H4"
    said = f"{row.version}, {title(row)}: keeps {kept['value']:.1%} [{kept['low']:.1%}, {kept['high']:.1%}]"
    said += f" at ${_usd(row):.3g} per million tokens"
    return (
        f'<g class="{row.kind} {"best" if row.pareto else "beaten"}" '
        f'transform="translate({x:.1f} {frame.y(kept["value"]) + y:.1f})">'
        f'<title>{escape(said)}</title><path class="bar" d="{caps}"/>{MARKS[row.kind]}</g>'
    )


def _labels(frame: Frame, points: Sequence[LeaderboardRow]) -> Iterator[str]:
    """Names of the frontier and the teacher, each beside its point where it covers nothing."""
    centres = [(frame.x(_usd(row)), frame.y(_kept(row)["value"])) for row in points]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in centres]
    for row, (x, y) in zip(points, centres, strict=True):
        if not row.pareto and row.kind != "teacher":
            continue
        text = title(row)
        width = CHARACTER * len(text)
        for left, top in _places(x, y, width):
            box = (left, top, left + width, top + LINE)
            inside = left >= frame.left - 6 and box[2] <= frame.width - 4 and top >= frame.top - 8
            if inside and box[3] <= frame.height - frame.bottom and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield f'<text class="name" x="{left:.1f}" y="{top + 12:.1f}">{escape(text)}</text>'
                break


def _places(x: float, y: float, width: float) -> Iterator[tuple[float, float]]:
    """Left upper corners for a label of the point (x, y), best first; further off it would name another point."""
    for away in (0, 12):
        yield x + 10 + away / 2, y - LINE - 2 - away
        yield x - 10 - width - away / 2, y - LINE - 2 - away
        yield x + 10 + away / 2, y + 3 + away
        yield x - 10 - width - away / 2, y + 3 + away
    yield x - width / 2, y - LINE - 9
    yield x - width / 2, y + 9


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
