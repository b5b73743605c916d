"""The rows of a leaderboard: the versions of a model with quality and cost, ranked."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import groupby
from typing import TYPE_CHECKING, Any

from limbeck.evals.leaderboard.ranking import rank_rows, sort_keys
from limbeck.evals.scores.comparability import describe_differences, group_comparable
from limbeck.evals.scores.controls import compare_with_controls
from limbeck.registry.catalog.lineage import made_from_ref
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status
from limbeck.registry.records import FIGURES, USD, Estimate, LeaderboardRow, Scorecard, TaskResult, top_level_tasks

if TYPE_CHECKING:
    from limbeck.registry.mlflow.findings import VersionFindings
    from limbeck.registry.mlflow.store import Store


def leaderboard_rows(
    store: Store,
    name: str,
    task: str | None = None,
    *,
    sort: str = "retention",
    cost: str = USD,
    filters: Mapping[str, Collection[str]] | None = None,
    quiet: bool = False,
) -> list[LeaderboardRow]:
    """The versions of `name`, grouped by how they were measured, best first; versions without scores last.

    Each version appears in the largest setting that it has a scorecard for. Unless `quiet`, prints to stderr which
    versions are ranked apart.

    Args:
        task: rank by the retention on this task alone.
        sort: the key to rank by: retention, a task, a cost figure, cost_ratio, speedup, version, kind, recipe or
            precision.
        cost: the cost figure of the Pareto frontier, one of `limbeck.registry.records.FIGURES`.
        filters: field (`kind`, `recipe`, `precision`) -> the values to show; every value of a field not named.

    Raises:
        BadInput: the model, task, key, figure or value does not exist; names the nearest ones.
    """
    found = store.versions_with_findings(name)
    if not found:
        raise store.not_found_error(name)
    cards = {each.version.version: each.scorecards for each in found}
    groups = group_comparable(cards, task)
    if task and not groups:
        tasks = {known for several in cards.values() for card in several for known in card.tasks}
        raise BadInput(f"no version of {name} is scored on {task!r}", fix=_suggest(task, tasks))
    _check_choice(cost, FIGURES, "cost")
    for field, values in (filters or {}).items():
        for one in values:
            _check_choice(one, {getattr(each.version, field) for each in found} - {None}, field)
    listed = list(_rows_of_groups(found, groups, task))
    keys = sort_keys(listed)
    _check_choice(sort, keys, "sort")
    shown = [
        row
        for row in listed
        if all(not values or getattr(row, field) in values for field, values in (filters or {}).items())
    ]
    if not quiet:
        _report_hidden_tasks(cards, groups, task)
        _report_ranked_apart(shown)
    return rank_rows(_with_controls(store, found, shown, task), sort, cost, keys)


def _with_controls(
    store: Store, found: Iterable[VersionFindings], shown: Sequence[LeaderboardRow], task: str | None
) -> list[LeaderboardRow]:
    """The rows, with the comparison of each distilled student and its controls."""
    versions = [each.version for each in found]
    has_controls = any(version.control for version in versions)
    comparisons = compare_with_controls(store, versions, task) if has_controls else []
    return [
        row.model_copy(update={"against_controls": tuple(each for each in comparisons if each.student == row.version)})
        for row in shown
    ]


def group_by_setting(rows: Iterable[LeaderboardRow]) -> list[list[LeaderboardRow]]:
    """Split ranked rows into one list for each setting; rows without scores join the first list."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.setting)]
    if len(groups) > 1 and groups[-1][0].setting is None:
        groups[0] += groups.pop()
    return groups


def to_csv(rows: Sequence[LeaderboardRow]) -> str:
    """The rows as CSV, one line each; nested fields become columns such as `cost.p50_ms`.

    Puts a ' before text that a spreadsheet would read as a formula.
    """
    flat = [_flat(row.model_dump(mode="json", exclude={"against_controls"})) for row in rows]
    flat = [{key: _no_formula(value) for key, value in line.items()} for line in flat]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for line in flat for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # which csv does not quote
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@")) else text


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    line: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            line |= _flat(value, f"{prefix}{key}.")
        else:
            line[prefix + key] = " ".join(value) if isinstance(value, list) else value
    return line


def _rows_of_groups(
    found: Sequence[VersionFindings], groups: Sequence[Mapping[int, Scorecard]], task: str | None
) -> Iterator[LeaderboardRow]:
    """A row for each version, group by group."""
    left = {each.version.version: each for each in found}
    for place, cards in enumerate(groups):
        differs = "; ".join(describe_differences(cards.values(), groups[0].values(), task)) if place else None
        for number, card in cards.items():
            yield _row(left.pop(number), card, task, place, differs)
    for each in left.values():
        yield _row(each, None, task, None, None)


def _row(
    found: VersionFindings, card: Scorecard | None, task: str | None, place: int | None, differs: str | None
) -> LeaderboardRow:
    version = found.version
    relative = card.relative if card else None
    cost = card.cost if card else None
    shown: dict[str, TaskResult] = {}
    if card:
        shown = {name: card.tasks[name] for name in ([task] if task else top_level_tasks(card.tasks))}
    by_task = {name: _interval(estimate) for name, estimate in relative.task_retention.items()} if relative else {}
    overall = _interval(relative.retention) if relative and relative.retention else None
    spread = {
        **(cost.intervals if cost else {}),
        "cost_ratio": relative and relative.cost_ratio_interval,
        "speedup": relative and relative.speedup_interval,
    }
    return LeaderboardRow(
        version=version.ref,
        kind=version.kind,
        parent=made_from_ref(version),
        recipe=version.recipe,
        precision=version.precision,
        quality={name: _quality(result) for name, result in shown.items()},
        retention=by_task.get(task) if task else overall,
        cost=cost.figures() if cost else None,
        cost_ratio=relative.cost_ratio if relative else None,
        speedup=relative.speedup if relative else None,
        pareto=False,
        verdict=found.verdicts[-1].outcome if found.verdicts else None,
        aliases=version.aliases,
        task_retention={name: by_task[name] for name in shown if name in by_task},
        intervals={name: {"low": each.low, "high": each.high} for name, each in spread.items() if each},
        machine=cost.machine if cost else None,
        setting=place,
        differs=differs,
        control=version.control,
        licences={
            "model": version.licence,
            "teacher": version.teacher_licence,
            "data": version.data_licence,
            "code": version.code_licence,
            "base_model": version.base_model_licence,
        },
        licence_allows_distillation=version.licence_allows_distillation,
    )


def _interval(retention: Estimate) -> dict[str, float]:
    return {"value": retention.value, "low": retention.low, "high": retention.high}


def _quality(result: TaskResult) -> dict[str, bool | float | str | None]:
    return {
        "metric": result.metric,
        "value": result.value,
        "stderr": result.stderr,
        "higher_is_better": result.higher_is_better,
    }


def _report_ranked_apart(shown: Sequence[LeaderboardRow]) -> None:
    """Print which versions are ranked apart, and why."""
    for group in group_by_setting(shown):
        if group[0].differs:
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            print_status(f"ranked apart: {group[0].version}{more}: {group[0].differs}")


def _report_hidden_tasks(
    cards: Mapping[int, Sequence[Scorecard]], groups: Sequence[Mapping[int, Scorecard]], task: str | None
) -> None:
    """Print the tasks that versions are scored on but the leaderboard does not show."""
    shown = {number: card.tasks.keys() for group in groups for number, card in group.items()}
    scored = {
        number: {name for card in several for name in top_level_tasks(card.tasks)} for number, several in cards.items()
    }
    hidden = Counter(name for number, names in scored.items() for name in names - shown.get(number, names))
    if hidden and not task:
        words = (f"{name} ({count} version{'s' if count > 1 else ''})" for name, count in sorted(hidden.items()))
        print_status(f"also scored (show with --task): {', '.join(words)}")


def _check_choice(name: str, choices: Collection[str], option: str) -> None:
    if name not in choices:
        raise BadInput(f"--{option} {name!r} is unknown", fix=_suggest(name, choices))


def _suggest(name: str, choices: Collection[str]) -> str:
    near = get_close_matches(name, choices, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of: {', '.join(sorted(choices)) or 'none yet'}"
