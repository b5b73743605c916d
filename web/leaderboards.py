"""The leaderboards of the pages: cached rows, and one page of a table with its plot."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from limbeck.evals.leaderboard.page import PageParts, View, render_parts
from limbeck.evals.leaderboard.ranking import pareto_flags, rank_rows, sort_keys, sort_value
from limbeck.evals.leaderboard.rows import group_by_setting, leaderboard_rows
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.listing import ListedVersion, list_versions
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import FIGURES, USD, LeaderboardRow
from limbeck.web.render import model_link, query_string, version_link

ROWS_PER_PAGE = 200
MAX_PLOT_POINTS = 300  # in the plot, besides the rows of the page


class LeaderboardCache:
    """The leaderboard rows of each model, computed again when its versions, tags or aliases change. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cached: dict[str, tuple[list[ListedVersion], list[LeaderboardRow]]] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def rows(self, name: str, listed_versions: list[ListedVersion] | None = None) -> list[LeaderboardRow]:
        """The rows of `limbeck.evals.leaderboard.rows.leaderboard_rows`. Raises BadInput for an unknown model.

        Args:
            name: the registered model.
            listed_versions: its versions as registered; None: list them.
        """
        with self._locks[name]:
            if listed_versions is None:
                listed_versions = list_versions(self._store.client, self._store.tracking_uri, name)
            cached_versions, rows = self._cached.get(name, (None, []))
            if not listed_versions or cached_versions != listed_versions:
                rows = leaderboard_rows(self._store, name, quiet=True)
                self._cached[name] = listed_versions, rows
            return rows


class LeaderboardPage(NamedTuple):
    """One page of a leaderboard."""

    rows: list[LeaderboardRow]  # of this page, rows hidden by the filters included
    parts: PageParts
    view: View
    number: int  # page number, from 1
    pages: int
    total: int  # rows that pass the filters, on all pages


def leaderboard_page(
    name: str, all_rows: Sequence[LeaderboardRow], view: View, page_number: int = 1
) -> LeaderboardPage:
    """Rank and filter a model's rows, and render one page.

    If all rows fit on one page, it also contains the rows that the filters hide, so that the script can show them.

    Args:
        name: the registered model.
        all_rows: of the model.
        view: filters, cost and order.
        page_number: from 1; limited to the last page.

    Raises:
        BadInput: an unknown cost or sort key.
    """
    keys = sort_keys(all_rows)
    for label, choice, choices in (("cost", view.cost, FIGURES), ("sort key", view.sort or "retention", keys)):
        if choice not in choices:
            raise BadInput(f"{choice!r} is not a {label}", fix=f"there are: {', '.join(choices)}")
    visible = rank_rows(filter(view.shows, all_rows), view.sort or "retention", view.cost, keys)
    pages = max(1, -(-len(visible) // ROWS_PER_PAGE))
    page_number = min(max(page_number, 1), pages)
    view = replace(
        view,
        link=version_link,
        sort_link=lambda key, reverse: model_link(name) + _view_query(replace(view, sort=key, reverse=reverse)),
        selection_form="compare",
        paged=len(all_rows) > ROWS_PER_PAGE,
    )
    extra_points: list[LeaderboardRow] = []
    if view.paged:
        start = (page_number - 1) * ROWS_PER_PAGE
        table = _in_view_order(visible, view)[start : start + ROWS_PER_PAGE]
        extra_points = _plot_points(visible, view)
    else:
        pareto = {row.version for row in visible if row.pareto}
        ranked = rank_rows(all_rows, view.sort or "retention", view.cost, keys)
        table = _in_view_order([row.model_copy(update={"pareto": row.version in pareto}) for row in ranked], view)
    parts = render_parts(table, view, all_rows=all_rows, extra_points=extra_points)
    return LeaderboardPage(table, parts, view, page_number, pages, len(visible))


def page_address(name: str, view: View, page_number: int = 1) -> str:
    """The path and query of a page of a leaderboard."""
    return model_link(name) + _view_query(view, page_number)


def _view_query(view: View, page_number: int = 1) -> str:
    cost = view.cost if view.cost != USD else None
    page = page_number if page_number > 1 else None
    reverse = 1 if view.reverse else None
    return query_string(task=view.task, cost=cost, **view.filters, sort=view.sort, reverse=reverse, page=page)


def _in_view_order(ranked_rows: Sequence[LeaderboardRow], view: View) -> list[LeaderboardRow]:
    """The rows, reversed within each setting if the view says so; rows without a value stay last."""
    if not view.reverse:
        return list(ranked_rows)
    result: list[LeaderboardRow] = []
    for _, group in groupby(ranked_rows, key=lambda row: row.setting):
        rows = list(group)
        with_value = [row for row in rows if sort_value(row, view.sort or "retention") is not None]
        result += [*reversed(with_value), *(row for row in rows if row not in with_value)]
    return result


def _plot_points(ranked_rows: Sequence[LeaderboardRow], view: View) -> list[LeaderboardRow]:
    """The rows on the Pareto frontier of the chosen task, then the best-ranked others, about MAX_PLOT_POINTS."""
    sign = -1 if FIGURES[view.cost].higher_is_better else 1
    frontier: list[LeaderboardRow] = []
    others: list[LeaderboardRow] = []
    for rows in group_by_setting(ranked_rows):
        points = [(_signed_cost(row, view.cost, sign), _retention(row, view.task)) for row in rows]
        for row, is_on_frontier in zip(rows, pareto_flags(points), strict=True):
            (frontier if is_on_frontier else others).append(row)
    return frontier + others[: max(0, MAX_PLOT_POINTS - len(frontier))]


def _signed_cost(row: LeaderboardRow, cost: str, sign: int) -> float | None:
    value = sort_value(row, cost)
    return None if value is None else sign * value


def _retention(row: LeaderboardRow, task: str) -> float | None:
    estimate = row.task_retention.get(task) if task else row.retention
    return estimate["value"] if estimate else None
