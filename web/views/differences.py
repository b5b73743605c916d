"""Data of two pages: the documents where two versions differ, and the comparison of two versions."""

from __future__ import annotations

from typing import Any, NamedTuple

from limbeck.evals.leaderboard.diff import Diff
from limbeck.evals.scores.compare import compare_models
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import FIGURES, ComparedTask, Flip, Version
from limbeck.web.views import plots
from limbeck.web.views.plots import Series
from limbeck.web.views.version_data import MAIN_CURVES, training_curves, training_metrics

FLIPS_PER_PAGE = 25  # documents
MAX_FLIPS = 2000  # documents per task


class FlipsPage(NamedTuple):
    """One page of the documents where two versions score differently."""

    against: str  # NAME/VERSION, or as typed if it cannot be found
    tasks: tuple[ComparedTask, ...]  # the compared tasks
    flips: tuple[Flip, ...]
    counts: dict[str, int]  # task -> number of documents that differ
    number: int  # page number, from 1
    pages: int
    problem: str | None  # why the versions cannot be compared


def flips_page(store: Store, version: Version, against: str, task: str, page_number: int) -> FlipsPage:
    """Make a page of flips: of one task, or of all tasks if `task` is ""; `against` is by default the teacher."""
    other = against or version.teacher or ""
    if not other:
        return FlipsPage("", (), (), {}, 1, 1, f"{version.ref} has no teacher; name a version to compare it with")
    try:
        reference = store.get(other).ref
        comparison = compare_models(f"models:/{version.ref}", f"models:/{reference}", store=store, max_flips=MAX_FLIPS)
    except BadInput as error:
        return FlipsPage(other, (), (), {}, 1, 1, str(error).replace("models:/", ""))
    counts: dict[str, int] = {}
    for flip in comparison.flips:
        counts[flip.task] = counts.get(flip.task, 0) + 1
    flips = tuple(flip for flip in comparison.flips if task in ("", flip.task))
    pages = max(1, -(-len(flips) // FLIPS_PER_PAGE))
    page_number = min(page_number, pages)
    start = (page_number - 1) * FLIPS_PER_PAGE
    return FlipsPage(
        reference, comparison.tasks, flips[start : start + FLIPS_PER_PAGE], counts, page_number, pages, None
    )


def comparison_values(store: Store, comparison: Diff) -> dict[str, Any]:
    """The variables of the template compare.html besides the Diff: tasks, costs and curves."""
    rows = [*comparison.quality.tasks, *comparison.quality.over_all] if comparison.quality else []
    return {
        "tasks": [(row, _difference_interval(row)) for row in rows],
        "costs": [(FIGURES[row.figure], row) for row in comparison.cost if row.a is not None or row.b is not None],
        "curves": _paired_curves(store, comparison),
    }


def _difference_interval(row: ComparedTask) -> plots.Markup:
    """Draw the difference with its sign changed so that more is better; the axis of a task is symmetric around 0."""
    ends = row.difference
    if not row.higher_is_better:
        ends = ends.model_copy(update={"value": -ends.value, "low": -ends.high, "high": -ends.low})
    limit = 1.05 * max(abs(ends.low), abs(ends.high), row.noninferiority.margin)
    return plots.draw_interval(ends, -limit, limit, marks=(0.0,))


def _paired_curves(store: Store, comparison: Diff) -> list[tuple[str, plots.Markup]]:
    """(metric, plot) of the main metrics that both training runs logged; [] if both versions are of one run."""
    a, b = comparison.a, comparison.b
    if a.run_id == b.run_id:
        return []
    metrics_of_b = training_metrics(store, b)
    names = [name for name in training_metrics(store, a) if name in MAIN_CURVES and name in metrics_of_b]
    series_of_b = {series.label: series for series in training_curves(store, b, names)}
    return [
        (name, plots.draw_curves(name, [Series(a.ref, points), Series(b.ref, series_of_b[name].points)]))
        for name, points in training_curves(store, a, names)
        if name in series_of_b
    ]
