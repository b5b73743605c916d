"""Compare one scored model with another: find the scores of both, or make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as parquet

from limbeck.evals.scores.scorecard import EvalOptions, evaluate
from limbeck.evals.scores.stored_scorecards import stored_scorecards
from limbeck.evals.stats.diagnostics import DIAGNOSTIC_COLUMNS, find_flips
from limbeck.evals.stats.noninferiority import Margins
from limbeck.evals.stats.paired_comparison import compare_to_reference
from limbeck.evals.stats.retention import leaf_tasks, pair_documents
from limbeck.registry.catalog.model_ref import REGISTERED, ResolvedModel, resolve_model
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import ComparedModels, Scorecard, TaskResult, top_level_tasks

if TYPE_CHECKING:
    from limbeck.evals.tasks.task_set import TaskSet


def compare_models(
    candidate: str,
    reference: str,
    tasks: Sequence[str] = (),
    *,
    margins: Margins | None = None,
    max_flips: int = 0,
    store: Store | None = None,
) -> ComparedModels:
    """Compare `candidate` with `reference`, both MODELs, on the newest tasks that both were scored on. No model runs.

    Args:
        tasks: tasks or groups; if empty, all that both were scored on.
        margins: how much worse the candidate may be.
        max_flips: return at most this many documents of each task on which the two differ.

    Raises:
        BadInput: a name is not a model, the two have no documents in common, documents do not pair (the error names
            them), or a margin is for a task that is not compared.
    """
    margins, store = margins or Margins(), store or Store()
    sides = [_Side.load(text, store) for text in (candidate, reference)]
    both = _newest_common_scores(sides[0], sides[1], tasks)
    if both is None:
        raise BadInput(
            f"{candidate} and {reference} have no common documents: "
            + "; ".join(side.describe_scored_tasks() for side in sides),
            fix=f"limbeck eval {candidate} {reference} --tasks {','.join(tasks) or '...'}",
        )
    ours, theirs, results = both
    names = sides[0].label, sides[1].label
    margins.check([*top_level_tasks(results), *(result.metric for result in results.values())])
    pairs = pair_documents(read_documents(ours, results), read_documents(theirs, results), DIAGNOSTIC_COLUMNS, names)
    comparison = compare_to_reference(pairs, results, margins, names)
    return ComparedModels(
        candidate=names[0],
        reference=names[1],
        candidate_digest=ours.card.artifact,
        reference_digest=theirs.card.artifact,
        harness=ours.card.harness,
        retention=comparison.retention,
        tasks=tuple(comparison.tasks),
        over_all=tuple(comparison.over_all),
        unknown_tasks=comparison.unknown_tasks,
        flips=tuple(find_flips(pairs, max_flips)),
    )


def score_missing_tasks(
    candidate: str,
    reference: str,
    tasks: Sequence[str],
    load_tasks: Callable[[Sequence[ResolvedModel]], TaskSet],
    *,
    store: Store | None = None,
    trust_remote_code: bool = False,
) -> Sequence[str]:
    """Score two MODELs on `tasks`, without their cost, unless both have scores on all of them.

    Args:
        tasks: tasks or groups.
        load_tasks: returns the task set of `tasks`, for these models; called only if something has to be scored.

    Returns:
        The tasks to compare by: `tasks`, but for a group without a value of its own its tasks.

    Raises:
        BadInput: a name is not a model, a task is unknown, or a model cannot be scored on it.
    """
    store = store or Store()
    sides = [_Side.load(text, store) for text in (candidate, reference)]
    if _newest_common_scores(sides[0], sides[1], tasks):
        return tasks
    models = [resolve_model(text, store) for text in (candidate, reference)]
    options = EvalOptions(cost=False, trust_remote_code=trust_remote_code)
    card = evaluate(models, load_tasks(models), store, options=options)[0]
    return top_level_tasks(card.tasks)


class LazyScorecard(NamedTuple):
    """A scorecard, and a function that returns the parquet file of its documents."""

    card: Scorecard
    documents: Callable[[], Path]


class _Side(NamedTuple):
    """One of the two compared models, with its scores, oldest first."""

    label: str
    scores: list[LazyScorecard]

    @classmethod
    def load(cls, text: str, store: Store) -> _Side:
        """The stored scores of a MODEL. Does not download a registered version: its scores are enough."""
        if REGISTERED.fullmatch(text) and not (Path(text) / "config.json").exists():
            version = store.get(text)
            cards = store.findings.scorecards(version)
            return cls(
                version.ref, [LazyScorecard(card, partial(store.findings.documents, version, card)) for card in cards]
            )
        model = resolve_model(text, store)
        stored = sorted(stored_scorecards(model, store), key=lambda each: each.card.created)
        return cls(model.label, [LazyScorecard(each.card, partial(Path, each.documents)) for each in stored])

    def describe_scored_tasks(self) -> str:
        known = dict.fromkeys(
            f"{task} ({scored.card.tasks[task].full_metric})"
            for scored in self.scores
            for task in top_level_tasks(scored.card.tasks)
        )
        return f"{self.label} was scored on {', '.join(known) or 'nothing'}"


def _newest_common_scores(
    ours: _Side, theirs: _Side, wanted: Sequence[str]
) -> tuple[LazyScorecard, LazyScorecard, dict[str, TaskResult]] | None:
    """The newest scores of both on the same tasks by the same harness, with the reference's results; None if none.

    Args:
        wanted: tasks that both must have; if empty, every common task.
    """
    for own in reversed(ours.scores):
        for other in reversed(theirs.scores):
            if own.card.harness != other.card.harness:
                continue
            same = {
                name: result
                for name, result in other.card.tasks.items()
                if name in own.card.tasks and own.card.tasks[name].task_hash == result.task_hash
            }
            chosen = {*(wanted or same)}
            if same and chosen <= same.keys():
                return own, other, {name: result for name, result in same.items() if {name, result.group} & chosen}
    return None


def read_documents(scored: LazyScorecard, tasks: Mapping[str, TaskResult]) -> pa.Table:
    """The rows of a documents table that belong to `tasks`."""
    table = parquet.read_table(scored.documents())
    leaves = [leaf for name in tasks for leaf in leaf_tasks(name, tasks)]
    return table.filter(pyarrow.compute.is_in(table["task"], pa.array(leaves, pa.string())))
