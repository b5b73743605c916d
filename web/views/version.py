"""The page of a version: the facts, scores, costs and plots made from its `VersionData`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from markupsafe import Markup

from limbeck.registry.catalog.lineage import made_from_ref
from limbeck.registry.gate import approvals
from limbeck.registry.ledger import log
from limbeck.registry.records import FIGURES, Estimate, Overlap, Scorecard, TaskResult, Version
from limbeck.web.render import query_string, version_link
from limbeck.web.site import Site
from limbeck.web.views import plots
from limbeck.web.views.version_data import MAIN_CURVES, VersionData


class Link(NamedTuple):
    """A text with a link."""

    text: str
    address: str


class TaskScore(NamedTuple):
    """A row of the table of scores: a task of the newest scorecard."""

    task: str
    result: TaskResult
    retention: Estimate | None
    plot: Markup
    overlap: Overlap | None


def version_page_values(site: Site, data: VersionData, curve_names: list[str] | None) -> dict[str, Any]:
    """The variables of the template version.html.

    Args:
        site: the shared state.
        data: of the version.
        curve_names: the metrics to plot; None: `MAIN_CURVES`.
    """
    version = data.version
    names = [name for name in data.metrics if name in MAIN_CURVES] if curve_names is None else curve_names
    series = data.curves(names)
    relative = data.card.relative if data.card else None
    return {
        "version": version,
        "data": data,
        "facts": list(_facts(data)),
        "scores": list(_scores(data.card)) if data.card else [],
        "costs": list(_costs(data.card)) if data.card else [],
        "flips_link": version_link(version.ref, "flips") + query_string(against=relative.teacher if relative else None),
        "requests": list(_requests(site, version)),
        "graph": plots.draw_lineage_if_small(data.lineage, version.ref),
        "curves": [(curve.label, plots.draw_curves(curve.label, [curve])) for curve in series],
        "shown_curves": {curve.label for curve in series},
        "curves_are_chosen": curve_names is not None,
        "run_link": site.run_link(version.run_id) if version.run_id and data.metrics else None,
    }


def _facts(data: VersionData) -> Iterator[tuple[str, str | Link]]:
    """(label, value) pairs of the table of facts."""
    version = data.version
    yield "kind", {"onnx": "ONNX variant"}.get(version.kind, version.kind)
    yield "runs in", version.engine
    yield "precision", version.precision
    if version.recipe:
        yield "recipe", version.recipe + (f", a control: {version.control}" if version.control else "")
    if version.params is not None:
        yield "parameters", f"{version.params:,}"
    for label, ref in (("made from", made_from_ref(version)), ("teacher", version.teacher)):
        if ref:
            yield label, Link(ref, version_link(ref))
    if data.training_cost:
        yield "training", f"{data.training_cost.tokens:,} tokens in {data.training_cost.training_seconds:,.0f} s"
    yield "registered", f"{version.created:%Y-%m-%d %H:%M}" + (f" by {version.author}" if version.author else "")
    if version.code_version:
        yield "code", version.code_version
    if version.data_digest:
        yield "data", version.data_digest[:16]
    if version.recipe_digest:
        yield "recipe digest", version.recipe_digest[:16]


def _scores(scorecard: Scorecard) -> Iterator[TaskScore]:
    retention_of_task = scorecard.relative.task_retention if scorecard.relative else {}
    overlap_of_task = scorecard.contamination.tasks if scorecard.contamination else {}
    low, high = plots.axis_range([*retention_of_task.values()], 0.0, 1.0)
    for task, result in scorecard.tasks.items():
        retention = retention_of_task.get(task)
        plot = plots.draw_interval(retention, low, high, marks=(0.0, 1.0)) if retention else Markup("")
        yield TaskScore(task, result, retention, plot, overlap_of_task.get(task))


def _costs(scorecard: Scorecard) -> Iterator[tuple[str, str, str | None]]:
    """(title, value, the teacher's value) of each known cost figure."""
    teacher = scorecard.relative.teacher_cost if scorecard.relative else None
    for key, column in FIGURES.items():
        value = column.format_value(getattr(scorecard.cost, key, None))
        if value is not None:
            yield column.title, value, column.format_value(getattr(teacher, key, None))


def _requests(site: Site, version: Version) -> Iterator[approvals.ApprovalState]:
    """The approval requests of this version, by alias."""
    for alias in sorted({"production", *version.aliases, *log.read_ledger(site.store, version.name).aliases}):
        state = approvals.load_approval_state(site.store, version, alias)
        if state.request:
            yield state
