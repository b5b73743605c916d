"""How two versions differ: the documents, the intervals, the curves beside each other."""

from __future__ import annotations

from typing import Any, NamedTuple

from limbeck.evals.leaderboard.diff import Diff
from limbeck.evals.scores.compare import compare_models
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import FIGURES, ComparedTask, Flip, Version
from limbeck.web.views import plots
from limbeck.web.views.version_data import MAIN_CURVES, training_curves, training_metrics

FLIPS_PER_PAGE = 25  # documents
MAX_FLIPS = 2000  # of each task


class FlipsPage(NamedTuple):
    """The documents on which two versions differ, those of one page."""

    against: str  # NAME/VERSION, or what was asked for
    tasks: tuple[ComparedTask, ...]  # that were compared
    flips: tuple[Flip, ...]
    counts: dict[str, int]  # task -> documents that differ
    number: int  # of the page, from 1
    pages: int
    problem: str | None  # why nothing could be compared


def flips_page(store: Store, version: Version, against: str, task: str, page_number: int) -> FlipsPage:
    """Those of `task`, or of all tasks."""
    other = against or version.teacher or ""
    if not other:
        return FlipsPage("", (), (), {}, 1, 1, f"{version.ref} has no teacher; name a version to hold it against")
    try:
        reference = store.get(other).ref
        found = compare_models(f"models:/{version.ref}", f"models:/{reference}", store=store, max_flips=MAX_FLIPS)
    except BadInput as error:
        return FlipsPage(other, (), (), {}, 1, 1, str(error).replace("models:/", ""))
    counts: dict[str, int] = {}
    for flip in found.flips:
        counts[flip.task] = counts.get(flip.task, 0) + 1
    shown = [flip for flip in found.flips if task in ("", flip.task)]
    pages = max(1, -(-len(shown) // FLIPS_PER_PAGE))
    page_number = min(page_number, pages)
    part = tuple(shown[(page_number - 1) * FLIPS_PER_PAGE : page_number * FLIPS_PER_PAGE])
    return FlipsPage(reference, found.tasks, part, counts, page_number, pages, None)


def comparison_values(store: Store, comparison: Diff) -> dict[str, Any]:
    """What the template compare.html takes beside the Diff."""
    rows = [*comparison.quality.tasks, *comparison.quality.over_all] if comparison.quality else []
    return {
        "tasks": [(row, _difference_interval(row)) for row in rows],
        "costs": [(FIGURES[row.figure], row) for row in comparison.cost if row.a is not None or row.b is not None],
        "curves": _paired_curves(store, comparison),
    }


def _difference_interval(row: ComparedTask) -> plots.Markup:
    """The difference, turned so that more is better, around none; each task on an axis of its own."""
    ends = row.difference
    if not row.higher_is_better:
        ends = ends.model_copy(update={"value": -ends.value, "low": -ends.high, "high": -ends.low})
    most = 1.05 * max(abs(ends.low), abs(ends.high), row.noninferiority.margin)
    return plots.draw_interval(ends, -most, most, marks=(0.0,))


def _paired_curves(store: Store, found: Diff) -> list[tuple[str, plots.Markup]]:
    """Metrics that both logged in training, of runs that are not the same."""
    if found.a.run_id == found.b.run_id:
        return []
    names = [
        name
        for name in training_metrics(store, found.a)
        if name in MAIN_CURVES and name in training_metrics(store, found.b)
    ]
    ours, theirs = (training_curves(store, version, names) for version in (found.a, found.b))
    pairs = [(one, next((two for two in theirs if two.label == one.label), None)) for one in ours]
    return [
        (one.label, plots.draw_curves(one.label, [one._replace(label=found.a.ref), two._replace(label=found.b.ref)]))
        for one, two in pairs
        if two
    ]
