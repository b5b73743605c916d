"""Plots drawn on the server as SVG: intervals, training curves, lineage. Words in them are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from limbeck.registry.catalog.lineage import LineageNode
from limbeck.registry.records import Estimate
from limbeck.web.render import version_link

MAX_POINTS = 300  # of a curve; more are thinned out
MAX_NODES = 300  # of a lineage


# --- intervals


def draw_interval(
    estimate: Estimate, low: float, high: float, *, marks: Sequence[float] = (), kind: str = "student"
) -> Markup:
    """A dot and a bar on an axis.

    Args:
        estimate: value, low and high.
        low, high: the ends of the axis.
        marks: values with an upright line, such as no difference.
        kind: the class that gives the colour.
    """

    def at(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.5
        return f"{4 + 192 * min(max(share, 0), 1):.1f}"

    lines = Markup("").join(Markup('<path class="at0" d="M{0} 1V15"/>').format(at(mark)) for mark in marks)
    ends = at(estimate.low), at(estimate.high)
    words = f"{estimate.value:.4g}, between {estimate.low:.4g} and {estimate.high:.4g}"
    drawn = Markup('<path class="bar" d="M{0} 8H{1}M{0} 4V12M{1} 4V12"/><path class="dot" d="M{2} 8h.01"/>')
    return Markup(
        '<svg class="interval {}" viewBox="0 0 200 16" preserveAspectRatio="none" role="img" aria-label="{}">{}{}</svg>'
    ).format(kind, words, lines, drawn.format(*ends, at(estimate.value)))


def axis_range(estimates: Sequence[Estimate], *more: float) -> tuple[float, float]:
    """The ends of an axis that has room for all of them."""
    values = [v for e in estimates for v in (e.low, e.high) if math.isfinite(v)] + list(more)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


# --- curves


class Series(NamedTuple):
    """A metric of a run over its steps."""

    label: str
    points: list[tuple[int, float]]  # step and value, finite, in order


COLOURS = ("student", "teacher", "onnx")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 200, 52, 24, 10, 10


def draw_curves(title: str, series: Sequence[Series]) -> Markup:
    """Lines over steps; the dots tell their values to curves.js, and to those who hover without it."""
    known = [(each.label, _thin_points(each.points)) for each in series]
    steps = [step for _, points in known for step, _ in points]
    values = [value for _, points in known for _, value in points]
    (left, right), (low, high) = (min(steps), max(steps)), axis_range([], min(values), max(values))

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - left) / (right - left) if right > left else 0.5
        up = (value - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    parts = []
    for tick in _ticks(low, high):
        y = place(left, tick)[1]
        parts.append(Markup('<path class="grid" d="M{0} {1:.1f}H{2}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(_text(LEFT - 6, y + 4, "end", f"{tick:.6g}"))
    parts += [
        _text(LEFT, HEIGHT - 6, "start", f"{left:,}"),
        _text(WIDTH - RIGHT, HEIGHT - 6, "end", f"{right:,} steps"),
    ]
    for colour, (label, points) in zip(COLOURS, known, strict=False):
        places = [place(*point) for point in points]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dots = Markup("").join(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}step {:,}: {:.5g}</title></circle>').format(
                x, y, 2.5 if len(points) <= 60 else 1.2, f"{label}, " if len(known) > 1 else "", step, value
            )
            for (x, y), (step, value) in zip(places, points, strict=True)
        )
        parts.append(Markup('<g class="{}"><path class="line" d="{}"/>{}</g>').format(colour, line, dots))
    first, last = known[0][1][0][1], known[0][1][-1][1]
    words = f"{title}: from {first:.4g} to {last:.4g} over {right - left:,} steps"
    svg = '<svg class="curve" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}">{}</svg>'
    return Markup(svg).format(WIDTH, HEIGHT, words, Markup("").join(parts))


def _text(x: float, y: float, anchor: str, words: str) -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def _thin_points(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about MOST_POINTS of them, the last included."""
    every = -(-len(points) // MAX_POINTS)
    return [*points[:-1:every], points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Round values within an axis."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


# --- lineage

BOX, GAP, ROW = 178, 46, 58  # widths of a node and between two, height of a line, in pixels


class _Placed(NamedTuple):
    node: LineageNode
    x: float
    y: float
    above: tuple[float, float] | None


def draw_lineage(trees: Sequence[LineageNode], current_ref: str | None = None) -> Markup:
    """Trees from left to right, each version with a link to its page.

    Args:
        trees: of `limbeck.registry.catalog.lineage.lineage_trees`.
        current_ref: NAME/VERSION that is marked.
    """
    placed: list[_Placed] = []
    rows = 0.0
    for tree in trees:
        _, rows = _place(tree, 0, rows, placed)
    width = max(each.x for each in placed) + BOX + 2
    lines = Markup("").join(
        Markup('<path class="edge" d="M{:.0f} {:.0f}C{:.0f} {:.0f} {:.0f} {:.0f} {:.0f} {:.0f}"/>').format(
            each.above[0], each.above[1], each.x - 23, each.above[1], each.x - 23, each.y, each.x, each.y
        )
        for each in placed
        if each.above
    )
    boxes = Markup("").join(_box(each, current_ref) for each in placed)
    size = Markup('width="{0:.0f}" height="{1:.0f}" viewBox="0 0 {0:.0f} {1:.0f}"').format(width, rows * ROW + 2)
    return Markup('<svg class="lineage" {} role="group" aria-label="Lineage">{}{}</svg>').format(size, lines, boxes)


def draw_lineage_if_small(trees: Sequence[LineageNode], current_ref: str | None = None) -> Markup | None:
    """As `lineage`; None where there are too many versions, or none."""
    return draw_lineage(trees, current_ref) if 0 < _count(trees) <= MAX_NODES else None


def _count(trees: Sequence[LineageNode]) -> int:
    return sum(1 + _count(tree.children) for tree in trees)


def _place(node: LineageNode, depth: int, row: float, placed: list[_Placed]) -> tuple[float, float]:
    """Where a node lies: in the middle of what was made of it. Returns its y and the next free row."""
    x = depth * (BOX + GAP) + 1
    ys, mine = [], len(placed)
    for child in node.children:
        y, row = _place(child, depth + 1, row, placed)
        ys.append(y)
    if not ys:
        ys, row = [row * ROW + ROW / 2], row + 1
    own = (ys[0] + ys[-1]) / 2
    for place in range(mine, len(placed)):
        if placed[place].x == x + BOX + GAP:
            placed[place] = placed[place]._replace(above=(x + BOX, own))
    placed.append(_Placed(node, x, own, None))
    return own, row


def _box(placed: _Placed, current_ref: str | None) -> Markup:
    node, known = placed.node, placed.node.version
    top = placed.y - 23
    name = node.ref if len(node.ref) <= 22 else "…" + node.ref[-21:]
    about = f"{known.recipe or known.kind} {known.precision}" if known else "not there any more"
    aliases = ", ".join(known.aliases)[:16] if known else ""
    room = 26 - len(aliases)
    shown = about if len(about) <= room else about[: room - 1] + "…"
    classes = f"{known.kind if known else 'gone'}{' here' if node.ref == current_ref else ''}"
    drawn = Markup(
        '<rect x="{0:.0f}" y="{1:.0f}" width="{2}" height="46" rx="8"/>'
        '<text class="ref" x="{3:.0f}" y="{4:.0f}">{5}</text><text class="tick" x="{3:.0f}" y="{6:.0f}">{7}</text>{8}'
    ).format(
        placed.x,
        top,
        BOX,
        placed.x + 11,
        top + 20,
        name,
        top + 36,
        shown,
        Markup('<text class="alias" x="{:.0f}" y="{:.0f}" text-anchor="end">{}</text>').format(
            placed.x + BOX - 9, top + 36, aliases
        )
        if aliases
        else "",
    )
    if known is None:
        return Markup('<g class="node {}">{}</g>').format(classes, drawn)
    words = f"{node.ref}, {about}{', ' + aliases if aliases else ''}"
    link = Markup('<a class="node {}" href="{}" aria-label="{}"{}>{}</a>')
    current = Markup(' aria-current="true"') if node.ref == current_ref else ""
    return link.format(classes, version_link(node.ref), words, current, drawn)
