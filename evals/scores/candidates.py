"""Select the scorecards of a model's versions that can be compared with the teacher's: same tasks and prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from limbeck.evals.scores.comparability import describe_differences, group_comparable, measurement_setting
from limbeck.evals.scores.compare import LazyScorecard
from limbeck.evals.scores.stored_scorecards import stored_scorecards
from limbeck.registry.catalog.model_ref import REGISTERED, URL, ResolvedModel
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import Engine, Scorecard, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store


class Teacher(NamedTuple):
    """The model that the others are compared with, and its scores, oldest first."""

    label: str  # NAME/VERSION, folder or endpoint
    digest: str
    engine: Engine | Literal["endpoint"]
    scores: list[LazyScorecard]


class ComparableScores(NamedTuple):
    """Scores on the same tasks and prompts."""

    teacher: LazyScorecard
    candidates: dict[str, LazyScorecard]  # by NAME/VERSION
    left_out: dict[str, str]  # NAME/VERSION -> why it cannot be compared


def scorecards_of_version(store: Store, version: Version, cards: Sequence[Scorecard]) -> list[LazyScorecard]:
    return [LazyScorecard(card, partial(store.findings.documents, version, card)) for card in cards]


def find_teacher(store: Store, name: str, against: str | None, cards: Sequence[Scorecard]) -> Teacher:
    """The teacher `against`; if None, the one that most scorecards are relative to, and the latest of equals.

    Args:
        against: NAME/VERSION or NAME@ALIAS; or a folder or an endpoint, spelt as when it was scored.
        cards: the scorecards of the versions of `name`.

    Raises:
        BadInput: there is no such version, or no version of `name` was scored against a teacher.
    """
    relatives = [card.relative for card in sorted(cards, key=lambda card: card.created, reverse=True) if card.relative]
    if against is None:
        most = Counter(relative.teacher for relative in relatives).most_common(1)  # the newest is counted first
        if not most:
            raise BadInput(
                f"no version of {name} was scored against a teacher",
                fix=f"limbeck eval {name} --tasks ... --against TEACHER",
            )
        against = most[0][0]
    digest = next((relative.teacher_digest for relative in relatives if relative.teacher == against), None)
    if digest is None or REGISTERED.fullmatch(against):
        version = store.get(against)
        return Teacher(
            version.ref,
            version.digest,
            version.engine,
            scorecards_of_version(store, version, store.findings.scorecards(version)),
        )
    # Its scores are stored under its digest, so its files or server are not needed.
    engine: Engine | Literal["endpoint"] = "endpoint" if URL.match(against) else "torch"
    stored = list(stored_scorecards(ResolvedModel(Path(against), digest, against, None, engine), None))
    if any(each.card.cost and "onnxruntime" in each.card.cost.machine for each in stored):
        engine = "onnxruntime"
    scores = [LazyScorecard(each.card, partial(Path, each.documents)) for each in stored]
    return Teacher(against, digest, engine, scores)


def select_comparable_scores(
    teacher: Teacher, scores: Mapping[str, Sequence[LazyScorecard]], tasks: Sequence[str] = ()
) -> ComparableScores:
    """One scorecard of the teacher, and one of each version with the same tasks, prompts and harness.

    Takes the largest setting that the teacher is in. How the cost was measured may differ, since a cost ratio comes
    from one run on any machine. Of several scorecards of a version, takes the newest that is relative to this
    teacher and has a cost.

    Args:
        scores: scores of the other versions, by NAME/VERSION.
        tasks: tasks that every scorecard must have.

    Raises:
        BadInput: no version was scored on a task, the teacher has no scores, or no version can be compared with it.
    """
    numbered = dict(enumerate([teacher.scores, *scores.values()]))  # the teacher is 0
    refs = dict(enumerate(scores, 1))
    _check_tasks_scored(tasks, {task for several in numbered.values() for each in several for task in each.card.tasks})
    usable = {
        number: [each for each in several if each.card.tasks.keys() >= set(tasks)]
        for number, several in numbered.items()
    }
    command = f"limbeck eval MODEL --tasks {','.join(tasks) or '...'} --against {teacher.label}"
    if not usable[0]:
        raise BadInput(f"{teacher.label} is not scored, so nothing can be compared with it", fix=command)
    task = tasks[0] if len(tasks) == 1 else None
    bare = {number: [_scores_only(each.card) for each in several] for number, several in usable.items()}
    group = next(group for group in group_comparable(bare, task) if 0 in group)
    if len(group) == 1:
        raise BadInput(f"no other version was scored on the same tasks and prompts as {teacher.label}", fix=command)
    setting = measurement_setting(group[0], task)

    def best(number: int) -> LazyScorecard:
        matching = [
            each
            for each, card in zip(usable[number], bare[number], strict=True)
            if measurement_setting(card, task) == setting
        ]
        return max(
            matching, key=lambda each: (_is_against(each.card, teacher), each.card.cost is not None, each.card.created)
        )

    return ComparableScores(
        best(0),
        {ref: best(number) for number, ref in refs.items() if number in group},
        {ref: _why_left_out(bare[number], group[0], task) for number, ref in refs.items() if number not in group},
    )


def _why_left_out(cards: Sequence[Scorecard], teacher_card: Scorecard, task: str | None) -> str:
    """Why a version with these scorecards, oldest first, cannot be compared with the teacher."""
    if not cards:
        return "not scored on these tasks"
    return "; ".join(describe_differences(cards[-1:], [teacher_card], task))


def _is_against(card: Scorecard, teacher: Teacher) -> bool:
    return card.relative is not None and card.relative.teacher_digest == teacher.digest


def _scores_only(card: Scorecard) -> Scorecard:
    """A scorecard without cost and comparison."""
    return card.model_copy(update={"cost": None, "relative": None})


def _check_tasks_scored(tasks: Sequence[str], scored_tasks: Collection[str]) -> None:
    for task in tasks:
        if task not in scored_tasks:
            near = get_close_matches(task, scored_tasks, n=1)
            known = f"versions are scored on: {', '.join(sorted(scored_tasks)) or 'nothing yet'}"
            raise BadInput(f"no version is scored on {task!r}", fix=f"did you mean {near[0]}?" if near else known)
