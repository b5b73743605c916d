"""Leaderboards as the pages show them, kept while nothing in the registry changes."""

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

ROWS_PER_PAGE = 200  # rows of a table; more are divided into pages
MAX_PLOT_POINTS = 300  # further points of a plot


class LeaderboardCache:
    """The rows of each model's leaderboard; made again when a version, a tag or an alias of it is another one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cached: dict[str, tuple[list[ListedVersion], list[LeaderboardRow]]] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)

    def rows(self, name: str, listed_versions: list[ListedVersion] | None = None) -> list[LeaderboardRow]:
        """As `limbeck.evals.leaderboard.rows.leaderboard_rows`. Raises BadInput where there is no such model.

        Args:
            listed_versions: what is registered of it, where that is known.
        """
        with self._locks[name]:
            listed_versions = (
                list_versions(self._store.client, self._store.tracking_uri, name)
                if listed_versions is None
                else listed_versions
            )
            before, made = self._cached.get(name, (None, []))
            if not listed_versions or before != listed_versions:
                made = leaderboard_rows(self._store, name, quiet=True)
                self._cached[name] = listed_versions, made
            return made


class LeaderboardPage(NamedTuple):
    """A leaderboard's page."""

    rows: list[LeaderboardRow]  # of this page, those that are hidden at first too
    parts: PageParts
    view: View
    number: int  # of the page, from 1
    pages: int
    total: int  # rows that pass the filters


def leaderboard_page(
    name: str, all_rows: Sequence[LeaderboardRow], view: View, page_number: int = 1
) -> LeaderboardPage:
    """What a page shows of a model's rows.

    Where they fit on one page, those that the filters hide are there too, for the script to show.

    Raises:
        BadInput: a cost or a key to sort by that is not there.
    """
    keys = sort_keys(all_rows)
    for what, wanted, known in (("cost", view.cost, FIGURES), ("key to sort by", view.sort or "retention", keys)):
        if wanted not in known:
            raise BadInput(f"{wanted!r} is no {what}", fix=f"there are: {', '.join(known)}")
    shown = rank_rows(filter(view.shows, all_rows), view.sort or "retention", view.cost, keys)
    total, pages = len(shown), max(1, -(-len(shown) // ROWS_PER_PAGE))
    page_number = min(max(page_number, 1), pages)
    view = replace(
        view,
        link=version_link,
        sort_link=lambda key, reverse: model_link(name) + _view_query(replace(view, sort=key, reverse=reverse)),
        selection_form="compare",
        paged=len(all_rows) > ROWS_PER_PAGE,
    )
    dots: list[LeaderboardRow] = []
    if view.paged:
        table, dots = (
            _in_view_order(shown, view)[(page_number - 1) * ROWS_PER_PAGE : page_number * ROWS_PER_PAGE],
            _plot_points(shown, view),
        )
    else:
        best = {row.version for row in shown if row.pareto}
        whole = rank_rows(all_rows, view.sort or "retention", view.cost, keys)
        table = _in_view_order([row.model_copy(update={"pareto": row.version in best}) for row in whole], view)
    return LeaderboardPage(
        table, render_parts(table, view, all_rows=all_rows, extra_points=dots), view, page_number, pages, total
    )


def page_address(name: str, view: View, page_number: int = 1) -> str:
    """The address of a page of a leaderboard."""
    return model_link(name) + _view_query(view, page_number)


def _view_query(view: View, page_number: int = 1) -> str:
    cost = view.cost if view.cost != USD else None
    page = page_number if page_number > 1 else None
    reverse = 1 if view.reverse else None
    return query_string(task=view.task, cost=cost, **view.filters, sort=view.sort, reverse=reverse, page=page)


def _in_view_order(ranked_rows: Sequence[LeaderboardRow], view: View) -> list[LeaderboardRow]:
    """Turned round, where that is asked for; those without a figure stay last."""
    if not view.reverse:
        return list(ranked_rows)
    result: list[LeaderboardRow] = []
    for _, group in groupby(ranked_rows, key=lambda row: row.setting):
        alike = list(group)
        known = [row for row in alike if sort_value(row, view.sort or "retention") is not None]
        result += [*reversed(known), *(row for row in alike if row not in known)]
    return result


def _plot_points(ranked_rows: Sequence[LeaderboardRow], view: View) -> list[LeaderboardRow]:
    """The frontier of the chosen task, and the best of the others."""
    sign = -1 if FIGURES[view.cost].higher_is_better else 1
    best: list[LeaderboardRow] = []
    others: list[LeaderboardRow] = []
    for alike in group_by_setting(ranked_rows):
        points = [(_signed_cost(row, view.cost, sign), _retention(row, view.task)) for row in alike]
        for row, on in zip(alike, pareto_flags(points), strict=True):
            (best if on else others).append(row)
    return best + others[: max(0, MAX_PLOT_POINTS - len(best))]


def _signed_cost(row: LeaderboardRow, cost: str, sign: int) -> float | None:
    price = sort_value(row, cost)
    return None if price is None else sign * price


def _retention(row: LeaderboardRow, task: str) -> float | None:
    kept = row.task_retention.get(task) if task else row.retention
    return kept["value"] if kept else None
