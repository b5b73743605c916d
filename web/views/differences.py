"""How two versions differ: the documents, the intervals, the curves beside each other."""

from __future__ import annotations

from typing import Any, NamedTuple

from limbeck.evals.leaderboard.columns import COSTS
from limbeck.evals.leaderboard.diff import Diff
from limbeck.evals.scores.compare import compare
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import ComparedTask, Flip, Version
from limbeck.web.views import plots
from limbeck.web.views.version_data import CURVES, curves, metrics

PAGE = 25  # documents
MOST = 2000  # of each task


class Differing(NamedTuple):
    """The documents on which two versions differ, those of one page."""

    against: str  # NAME/VERSION, or what was asked for
    tasks: tuple[ComparedTask, ...]  # that were compared
    flips: tuple[Flip, ...]
    counts: dict[str, int]  # task -> documents that differ
    number: int  # of the page, from 1
    pages: int
    why_not: str | None  # why nothing could be compared


def flips(store: Store, version: Version, against: str, task: str, number: int) -> Differing:
    """Those of `task`, or of all tasks."""
    other = against or version.teacher or ""
    if not other:
        return Differing("", (), (), {}, 1, 1, f"{version.ref} has no teacher; name a version to hold it against")
    try:
        reference = store.get(other).ref
        found = compare(f"models:/{version.ref}", f"models:/{reference}", store=store, most_flips=MOST)
    except BadInput as error:
        return Differing(other, (), (), {}, 1, 1, str(error).replace("models:/", ""))
    counts: dict[str, int] = {}
    for flip in found.flips:
        counts[flip.task] = counts.get(flip.task, 0) + 1
    shown = [flip for flip in found.flips if task in ("", flip.task)]
    pages = max(1, -(-len(shown) // PAGE))
    number = min(number, pages)
    part = tuple(shown[(number - 1) * PAGE : number * PAGE])
    return Differing(reference, found.tasks, part, counts, number, pages, None)


def drawn(store: Store, found: Diff) -> dict[str, Any]:
    """What the template compare.html takes beside the Diff."""
    rows = [*found.quality.tasks, *found.quality.over_all] if found.quality else []
    return {
        "tasks": [(row, _interval(row)) for row in rows],
        "costs": [(COSTS[row.figure], row) for row in found.cost if row.a is not None or row.b is not None],
        "curves": _curves(store, found),
    }


def _interval(row: ComparedTask) -> plots.Markup:
    """The difference, turned so that more is better, around none; each task on an axis of its own."""
    ends = row.difference
    if not row.higher_is_better:
        ends = ends.model_copy(update={"value": -ends.value, "low": -ends.high, "high": -ends.low})
    most = 1.05 * max(abs(ends.low), abs(ends.high), row.noninferiority.margin)
    return plots.interval(ends, -most, most, marks=(0.0,))


def _curves(store: Store, found: Diff) -> list[tuple[str, plots.Markup]]:
    """Metrics that both logged in training, of runs that are not the same."""
    if found.a.run_id == found.b.run_id:
        return []
    names = [name for name in metrics(store, found.a) if name in CURVES and name in metrics(store, found.b)]
    ours, theirs = (curves(store, version, names) for version in (found.a, found.b))
    pairs = [(one, next((two for two in theirs if two.label == one.label), None)) for one in ours]
    return [
        (one.label, plots.curves(one.label, [one._replace(label=found.a.ref), two._replace(label=found.b.ref)]))
        for one, two in pairs
        if two
    ]
