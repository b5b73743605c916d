"""Distilled students held against their controls: what the teacher brought, at equal tokens and at equal cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from limbeck.evals.scores.compare import compare
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import ControlComparison, ControlTaskResult, TrainingCost, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

KINDS = {
    "labels": "labels alone at equal tokens",
    "labels_equal_cost": "labels alone at equal cost",
    "untrained": "itself untrained",
}
OUTCOMES = {
    "better": "beats",
    "worse": "loses to",
    "mixed": "is better on some tasks and worse on others than",
    "not settled": "is not told apart from",
}


def against_controls(store: Store, versions: Iterable[Version], task: str | None = None) -> list[ControlComparison]:
    """Each distilled PyTorch student of `versions` held against the newest control of each kind of its family.

    Paired by document, clustered; of those that were scored on the same tasks.
    """
    students = [version for version in versions if version.kind == "student" and version.family]
    controls = {(version.family, version.control): version for version in students if version.control}
    found = []
    for student in students:
        for kind in KINDS if student.control is None else ():
            control = controls.get((student.family, kind))
            held = _held(store, student, control, task) if control else None
            if held:
                found.append(held)
    return found


def _held(store: Store, student: Version, control: Version, task: str | None) -> ControlComparison | None:
    try:
        compared = compare(student.ref, control.ref, [task] if task else (), store=store)
    except BadInput:  # not scored, or not on the same documents
        return None
    sides = {student.ref: "student", control.ref: "control", None: None}
    tasks = {
        row.task: ControlTaskResult(metric=row.metric, difference=row.difference, better=sides[row.better])
        for row in compared.tasks
    }
    better = {each.better for each in tasks.values() if each.better}
    outcomes = {("student",): "better", ("control",): "worse", (): "not settled"}
    ours, its = (store.training_cost(version) for version in (student, control))
    return ControlComparison(
        student=student.ref,
        control=control.ref,
        kind=str(control.control),
        tasks=tasks,
        outcome=outcomes.get(tuple(better), "mixed"),
        student_tokens=ours.tokens if ours else None,
        control_tokens=its.tokens if its else None,
        student_seconds=_seconds(ours),
        control_seconds=_seconds(its),
    )


def _seconds(making: TrainingCost | None) -> float | None:
    return making.training_seconds + making.teacher_seconds if making else None


def told(held: ControlComparison) -> Iterator[str]:
    """Who beat whom, at which tokens and time; then a line for each task, with the interval of the difference."""
    yield f"{held.student} {OUTCOMES[held.outcome]} {held.control}, {KINDS[held.kind]}{_spent(held)}"
    for task, each in held.tasks.items():
        interval = each.difference
        settled = "" if each.better else ", not settled"
        metric = "" if task.endswith(each.metric) else f" {each.metric}"
        yield f"  {task}{metric} {interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{settled}"


def _spent(held: ControlComparison) -> str:
    if held.student_seconds is None or held.control_seconds is None:
        return ""
    return (
        f": {held.student_tokens:,} tokens and {held.student_seconds:,.0f} s, the teacher's pass counted, against "
        f"{held.control_tokens:,} and {held.control_seconds:,.0f} s"
    )
