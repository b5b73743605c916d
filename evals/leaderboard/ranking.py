"""The order of a leaderboard's rows, and their Pareto frontier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from limbeck.registry.records import FIGURES, LeaderboardRow

VERSION_KEYS = ("version", "kind", "recipe", "precision", "verdict", "retention")
RATIOS = {"cost_ratio": False, "speedup": True}  # -> whether more is better


def sort_keys(rows: Iterable[LeaderboardRow]) -> dict[str, bool]:
    """The keys to sort rows by -> whether the largest value comes first."""
    tasks = {task: bool(result["higher_is_better"]) for row in rows for task, result in row.quality.items()}
    costs = {name: column.higher_is_better for name, column in FIGURES.items()}
    return tasks | dict.fromkeys(VERSION_KEYS, False) | {"retention": True} | costs | RATIOS


def sort_value(row: LeaderboardRow, key: str) -> Any:
    """A row's value of one of `sort_keys`; None if it has none."""
    if key == "version":
        return int(row.version.rpartition("/")[2])
    if key == "retention":
        return row.retention["value"] if row.retention else None
    if key in FIGURES:
        return row.cost[key] if row.cost else None
    if key in VERSION_KEYS or key in RATIOS:
        return getattr(row, key)
    return row.quality[key]["value"] if key in row.quality else None


def rank_rows(rows: Iterable[LeaderboardRow], sort: str, cost: str, keys: Mapping[str, bool]) -> list[LeaderboardRow]:
    """Sort rows by setting, then best first, then cheapest first; rows without the figure come last.

    Sets each row's `pareto` among the rows of its setting.
    """

    def rank(row: LeaderboardRow) -> tuple[Any, ...]:
        parts: list[Any] = [row.setting is None, row.setting or 0]
        for key in (sort, cost, "version"):
            value = sort_value(row, key)
            if value is not None and keys[key]:
                value = -value
            parts += [value is None, 0 if value is None else value]
        return tuple(parts)

    result = []
    sign = -1 if FIGURES[cost].higher_is_better else 1
    for _, group in groupby(sorted(rows, key=rank), key=lambda row: row.setting):
        setting_rows = list(group)
        prices = [sort_value(row, cost) for row in setting_rows]
        retentions = [sort_value(row, "retention") for row in setting_rows]
        flags = pareto_flags([(None if p is None else sign * p, q) for p, q in zip(prices, retentions, strict=True)])
        result += [row.model_copy(update={"pareto": flag}) for row, flag in zip(setting_rows, flags, strict=True)]
    return result


def pareto_flags(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Whether each point (cost, quality) is on the Pareto frontier: no other is cheaper and as good, or better and as
    cheap. A point with None is not.
    """

    whole = {(cost, quality) for cost, quality in points if cost is not None and quality is not None}
    best: set[tuple[float | None, float | None]] = set()
    top = float("-inf")
    for cost, quality in sorted(whole, key=lambda point: (point[0], -point[1])):
        if quality > top:
            best.add((cost, quality))
            top = quality
    return [point in best for point in points]
