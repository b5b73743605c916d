"""SVG plots: intervals, training curves and lineage graphs. Text in them is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from limbeck.registry.catalog.lineage import LineageNode
from limbeck.registry.records import Estimate
from limbeck.web.render import version_link

MAX_POINTS = 300  # of a curve
MAX_NODES = 300  # of a lineage graph


# --- intervals


def draw_interval(
    estimate: Estimate, low: float, high: float, *, marks: Sequence[float] = (), kind: str = "student"
) -> Markup:
    """Draw an estimate as a dot with a bar from low to high.

    Args:
        estimate: value, low and high.
        low, high: the ends of the axis.
        marks: values that get a vertical line, such as 0 for a difference.
        kind: the CSS class of the colour.
    """

    def x_of(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.5
        return f"{4 + 192 * min(max(share, 0), 1):.1f}"

    lines = Markup("").join(Markup('<path class="at0" d="M{0} 1V15"/>').format(x_of(mark)) for mark in marks)
    ends = x_of(estimate.low), x_of(estimate.high)
    label = f"{estimate.value:.4g}, between {estimate.low:.4g} and {estimate.high:.4g}"
    shape = Markup('<path class="bar" d="M{0} 8H{1}M{0} 4V12M{1} 4V12"/><path class="dot" d="M{2} 8h.01"/>')
    return Markup(
        '<svg class="interval {}" viewBox="0 0 200 16" preserveAspectRatio="none" role="img" aria-label="{}">{}{}</svg>'
    ).format(kind, label, lines, shape.format(*ends, x_of(estimate.value)))


def axis_range(estimates: Sequence[Estimate], *more: float) -> tuple[float, float]:
    """The ends of an axis with room for all estimates and the values `more`."""
    values = [v for e in estimates for v in (e.low, e.high) if math.isfinite(v)] + list(more)
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


# --- curves


class Series(NamedTuple):
    """A metric of a run over its steps."""

    label: str
    points: list[tuple[int, float]]  # (step, finite value), in order of the steps


COLOURS = ("student", "teacher", "onnx")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 360, 200, 52, 24, 10, 10


def draw_curves(title: str, series: Sequence[Series]) -> Markup:
    """Draw up to three lines over steps. Each point has a title with its value, which curves.js shows too."""
    thinned = [Series(label, _thin_points(points)) for label, points in series]
    steps = [step for _, points in thinned for step, _ in points]
    values = [value for _, points in thinned for _, value in points]
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
    for colour, (label, points) in zip(COLOURS, thinned, strict=False):
        places = [place(*point) for point in points]
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dots = Markup("").join(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}step {:,}: {:.5g}</title></circle>').format(
                x, y, 2.5 if len(points) <= 60 else 1.2, f"{label}, " if len(thinned) > 1 else "", step, value
            )
            for (x, y), (step, value) in zip(places, points, strict=True)
        )
        parts.append(Markup('<g class="{}"><path class="line" d="{}"/>{}</g>').format(colour, line, dots))
    (_, first), (_, last) = thinned[0].points[0], thinned[0].points[-1]
    label = f"{title}: from {first:.4g} to {last:.4g} over {right - left:,} steps"
    svg = '<svg class="curve" viewBox="0 0 {} {}" role="img" tabindex="0" aria-label="{}">{}</svg>'
    return Markup(svg).format(WIDTH, HEIGHT, label, Markup("").join(parts))


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _thin_points(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """About MAX_POINTS of the points at most, the last included."""
    stride = -(-len(points) // MAX_POINTS)
    return [*points[:-1:stride], points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Round values within an axis."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


# --- lineage

BOX, GAP, ROW = 178, 46, 58  # pixels: width of a node, gap between columns, height of a row


class _Placed(NamedTuple):
    """A node with its position; `above` is the right end of its parent."""

    node: LineageNode
    x: float
    y: float
    above: tuple[float, float] | None


def draw_lineage(trees: Sequence[LineageNode], current_ref: str | None = None) -> Markup:
    """Draw trees from left to right; each version links to its page.

    Args:
        trees: from `limbeck.registry.catalog.lineage.lineage_trees`.
        current_ref: NAME/VERSION to highlight.
    """
    placed: list[_Placed] = []
    rows = 0.0
    for tree in trees:
        _, rows = _place(tree, 0, rows, placed)
    width = max(node.x for node in placed) + BOX + 2
    lines = Markup("").join(
        Markup('<path class="edge" d="M{:.0f} {:.0f}C{:.0f} {:.0f} {:.0f} {:.0f} {:.0f} {:.0f}"/>').format(
            node.above[0], node.above[1], node.x - 23, node.above[1], node.x - 23, node.y, node.x, node.y
        )
        for node in placed
        if node.above
    )
    boxes = Markup("").join(_box(node, current_ref) for node in placed)
    size = Markup('width="{0:.0f}" height="{1:.0f}" viewBox="0 0 {0:.0f} {1:.0f}"').format(width, rows * ROW + 2)
    return Markup('<svg class="lineage" {} role="group" aria-label="Lineage">{}{}</svg>').format(size, lines, boxes)


def draw_lineage_if_small(trees: Sequence[LineageNode], current_ref: str | None = None) -> Markup | None:
    """As `draw_lineage`; None for more than MAX_NODES versions, or for none."""
    return draw_lineage(trees, current_ref) if 0 < _count(trees) <= MAX_NODES else None


def _count(trees: Sequence[LineageNode]) -> int:
    return sum(1 + _count(tree.children) for tree in trees)


def _place(node: LineageNode, depth: int, row: float, placed: list[_Placed]) -> tuple[float, float]:
    """Place a node in the middle of its children. Returns its y and the next free row."""
    x = depth * (BOX + GAP) + 1
    ys, first = [], len(placed)
    for child in node.children:
        y, row = _place(child, depth + 1, row, placed)
        ys.append(y)
    if not ys:
        ys, row = [row * ROW + ROW / 2], row + 1
    middle = (ys[0] + ys[-1]) / 2
    for index in range(first, len(placed)):
        if placed[index].x == x + BOX + GAP:
            placed[index] = placed[index]._replace(above=(x + BOX, middle))
    placed.append(_Placed(node, x, middle, None))
    return middle, row


def _box(placed: _Placed, current_ref: str | None) -> Markup:
    node, version = placed.node, placed.node.version
    top = placed.y - 23
    name = node.ref if len(node.ref) <= 22 else "…" + node.ref[-21:]
    about = f"{version.recipe or version.kind} {version.precision}" if version else "deleted"
    aliases = ", ".join(version.aliases)[:16] if version else ""
    room = 26 - len(aliases)
    short_about = about if len(about) <= room else about[: room - 1] + "…"
    alias_text = Markup('<text class="alias" x="{:.0f}" y="{:.0f}" text-anchor="end">{}</text>').format(
        placed.x + BOX - 9, top + 36, aliases
    )
    classes = f"{version.kind if version else 'gone'}{' here' if node.ref == current_ref else ''}"
    shape = Markup(
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
        short_about,
        alias_text if aliases else "",
    )
    if version is None:
        return Markup('<g class="node {}">{}</g>').format(classes, shape)
    label = f"{node.ref}, {about}{', ' + aliases if aliases else ''}"
    link = Markup('<a class="node {}" href="{}" aria-label="{}"{}>{}</a>')
    current = Markup(' aria-current="true"') if node.ref == current_ref else ""
    return link.format(classes, version_link(node.ref), label, current, shape)
