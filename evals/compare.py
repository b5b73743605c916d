"""Two scored versions held against each other, document by document: no model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow.parquet as parquet

from evals.statistics import compare as paired
from evals.statistics import top_level
from registry.errors import BadInput
from registry.records import Estimate, Scorecard

if TYPE_CHECKING:
    from registry.store import Store


class Difference(NamedTuple):
    """One task of both versions; `difference` is a - b in the metric's own units, paired and clustered."""

    task: str
    metric: str
    a: float
    b: float
    difference: Estimate
    better: str | None  # NAME/VERSION of the one that is better beyond its interval; None where neither is


def compare(store: Store, a: str, b: str) -> list[Difference]:
    """Compare the versions `a` and `b` on the newest tasks that both were scored on.

    Raises BadInput for a name that is no version, and where no scorecards of the two are of the same tasks.
    """
    first, second = store.get(a), store.get(b)
    ours, theirs = _common(store.scorecards(first), store.scorecards(second), first.ref, second.ref)
    found = paired(
        parquet.read_table(store.documents(first, ours)),
        parquet.read_table(store.documents(second, theirs)),
        theirs.tasks,
    )
    rows = []
    for task in top_level(theirs.tasks):
        if task not in found.difference:
            continue
        result, difference = theirs.tasks[task], found.difference[task]
        better = None
        if not difference.low <= 0 <= difference.high:
            better = first.ref if (difference.value > 0) == result.higher_is_better else second.ref
        rows.append(Difference(task, result.metric, ours.tasks[task].value, result.value, difference, better))
    return rows


def _common(ours: list[Scorecard], theirs: list[Scorecard], a: str, b: str) -> tuple[Scorecard, Scorecard]:
    """The newest scorecards of the same tasks and harness."""
    for card in reversed(ours):
        for other in reversed(theirs):
            if (card.tasks_digest, card.harness) == (other.tasks_digest, other.harness):
                return card, other
    raise BadInput(f"{a} and {b} have no scores on the same tasks", fix=f"limbeck eval {a} {b} --tasks ...")
