"""Compare distilled students with their controls: what the teacher brought, at equal tokens and at equal cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from limbeck.evals.scores.compare import compare_models
from limbeck.registry.core.errors import BadInput
from limbeck.registry.records import ControlComparison, ControlTaskResult, TrainingCost, Version

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store

CONTROL_KINDS = {
    "labels": "labels alone at equal tokens",
    "labels_equal_cost": "labels alone at equal cost",
    "untrained": "itself untrained",
}
OUTCOME_PHRASES = {
    "better": "beats",
    "worse": "loses to",
    "mixed": "is better on some tasks and worse on others than",
    "not settled": "cannot be distinguished from",
}


def compare_with_controls(
    store: Store, versions: Iterable[Version], task: str | None = None
) -> list[ControlComparison]:
    """Compare each distilled PyTorch student of `versions` with the newest control of each kind of its family.

    Comparisons are paired by document and clustered. Skips pairs that were not scored on the same tasks.
    """
    students = [version for version in versions if version.kind == "student" and version.family]
    controls = {(version.family, version.control): version for version in students if version.control}
    found = []
    for student in students:
        for kind in CONTROL_KINDS if student.control is None else ():
            control = controls.get((student.family, kind))
            comparison = _compare_with_control(store, student, control, task) if control else None
            if comparison:
                found.append(comparison)
    return found


def _compare_with_control(
    store: Store, student: Version, control: Version, task: str | None
) -> ControlComparison | None:
    try:
        compared = compare_models(student.ref, control.ref, [task] if task else (), store=store)
    except BadInput:  # not scored, or not on the same documents
        return None
    sides = {student.ref: "student", control.ref: "control", None: None}
    tasks = {
        row.task: ControlTaskResult(metric=row.metric, difference=row.difference, better=sides[row.better])
        for row in compared.tasks
    }
    better = {each.better for each in tasks.values() if each.better}
    outcomes = {("student",): "better", ("control",): "worse", (): "not settled"}
    ours, its = (store.runs.training_cost(version) for version in (student, control))
    return ControlComparison(
        student=student.ref,
        control=control.ref,
        kind=str(control.control),
        tasks=tasks,
        outcome=outcomes.get(tuple(better), "mixed"),
        student_tokens=ours.tokens if ours else None,
        control_tokens=its.tokens if its else None,
        student_seconds=_training_and_teacher_seconds(ours),
        control_seconds=_training_and_teacher_seconds(its),
    )


def _training_and_teacher_seconds(training_cost: TrainingCost | None) -> float | None:
    return training_cost.training_seconds + training_cost.teacher_seconds if training_cost else None


def describe_control_result(comparison: ControlComparison) -> Iterator[str]:
    """A line on which of the two won, at what tokens and time; then a line per task with the interval."""

    kind, budget = CONTROL_KINDS[comparison.kind], _describe_budget(comparison)
    yield f"{comparison.student} {OUTCOME_PHRASES[comparison.outcome]} {comparison.control}, {kind}{budget}"
    for task, each in comparison.tasks.items():
        interval = each.difference
        settled = "" if each.better else ", not settled"
        metric = "" if task.endswith(each.metric) else f" {each.metric}"
        yield f"  {task}{metric} {interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]{settled}"


def _describe_budget(comparison: ControlComparison) -> str:
    if comparison.student_seconds is None or comparison.control_seconds is None:
        return ""
    return (
        f": {comparison.student_tokens:,} tokens and {comparison.student_seconds:,.0f} s with the teacher's pass, "
        f"against {comparison.control_tokens:,} and {comparison.control_seconds:,.0f} s"
    )
