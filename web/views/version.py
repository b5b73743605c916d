"""The page of a version: what is drawn and put in words of `limbeck.web.views.version_data.ModelPage`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from markupsafe import Markup

from limbeck.evals.leaderboard.columns import COSTS
from limbeck.registry.catalog.lineage import ancestor
from limbeck.registry.gate import approvals
from limbeck.registry.ledger import log
from limbeck.registry.records import Estimate, Overlap, Scorecard, TaskResult, Version
from limbeck.web.render import query, version_link
from limbeck.web.site import Site
from limbeck.web.views import plots
from limbeck.web.views.version_data import CURVES, ModelPage


class Link(NamedTuple):
    """Words that lead somewhere."""

    words: str
    link: str


class Score(NamedTuple):
    """A task of the newest scorecard."""

    task: str
    result: TaskResult
    kept: Estimate | None
    drawn: Markup
    overlap: Overlap | None


def values(site: Site, about: ModelPage, wanted: list[str] | None) -> dict[str, Any]:
    """What the template version.html takes.

    Args:
        wanted: the metrics whose curves are shown; None: those that matter most.
    """
    version = about.version
    names = [name for name in about.metrics if name in CURVES] if wanted is None else wanted
    series = about.curves(names)
    relative = about.card.relative if about.card else None
    return {
        "version": version,
        "about": about,
        "facts": list(_facts(about)),
        "scores": list(_scores(about.card)) if about.card else [],
        "costs": list(_costs(about.card)) if about.card else [],
        "flips_link": version_link(version.ref, "flips") + query(against=relative.teacher if relative else None),
        "requests": list(_requests(site, version)),
        "graph": plots.drawn(about.lineage, version.ref),
        "curves": [(each.label, plots.curves(each.label, [each])) for each in series],
        "shown_curves": {each.label for each in series},
        "chosen": wanted is not None,
        "run_link": site.run_link(version.run_id) if version.run_id and about.metrics else None,
    }


def _facts(about: ModelPage) -> Iterator[tuple[str, str | Link]]:
    version = about.version
    yield "kind", {"onnx": "ONNX variant"}.get(version.kind, version.kind)
    yield "runs in", version.engine
    yield "precision", version.precision
    if version.recipe:
        yield "recipe", version.recipe + (f", a control: {version.control}" if version.control else "")
    if version.params is not None:
        yield "parameters", f"{version.params:,}"
    for words, ref in (("made from", ancestor(version)), ("teacher", version.teacher)):
        if ref:
            yield words, Link(ref, version_link(ref))
    if about.making:
        yield "training", f"{about.making.tokens:,} tokens in {about.making.training_seconds:,.0f} s"
    yield "registered", f"{version.created:%Y-%m-%d %H:%M}" + (f" by {version.author}" if version.author else "")
    if version.code_version:
        yield "code", version.code_version
    if version.data_digest:
        yield "data", version.data_digest[:16]
    if version.recipe_digest:
        yield "recipe's digest", version.recipe_digest[:16]


def _scores(card: Scorecard) -> Iterator[Score]:
    kept = card.relative.task_retention if card.relative else {}
    low, high = plots.span([*kept.values()], 0.0, 1.0)
    for task, result in card.tasks.items():
        share = kept.get(task)
        drawn = plots.interval(share, low, high, marks=(0.0, 1.0)) if share else Markup("")
        yield Score(task, result, share, drawn, card.contamination.tasks.get(task) if card.contamination else None)


def _costs(card: Scorecard) -> Iterator[tuple[str, str, str | None]]:
    teacher = card.relative.teacher_cost if card.relative else None
    for key, column in COSTS.items():
        value = column.cell(getattr(card.cost, key, None))
        if value is not None:
            yield column.title, value, column.cell(getattr(teacher, key, None))


def _requests(site: Site, version: Version) -> Iterator[approvals.Asked]:
    """What was asked for this version, alias by alias."""
    for alias in sorted({"production", *version.aliases, *log.read(site.store, version.name).aliases}):
        asked = approvals.about(site.store, version, alias)
        if asked.request:
            yield asked
