"""The search box: one line of words and of the conditions of `limbeck models list`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from limbeck.registry.catalog.search import Query, SearchHit, build_conditions, parse_date, search_versions
from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Version

VERSIONS_PER_PAGE = 100
FIELDS = ("kind", "recipe", "precision", "parent", "teacher", "licence", "author")
CONDITION = re.compile(r"([\w.@-]+)(<=|>=|!=|=|<|>)(\S+)")
FILTER = re.compile(r"\s*(tags|tag|metrics|metric|attributes|name)\b\s*[.=!<>`]|`", re.IGNORECASE)


class SearchPage(NamedTuple):
    """One page of search results."""

    hits: Sequence[SearchHit]
    total: int
    number: int  # page number, from 1
    pages: int


def search_page(store: Store, name: str | None, text: str, sort: str, page_number: int) -> SearchPage:
    """Search the versions of `name`, or of all models if it is None.

    Args:
        store: the registry.
        name: the registered model.
        text: words that a version's fields contain; conditions such as `kind=onnx`, `alias=production`,
            `since=2026-01-31`, `retention>=0.9`; or a filter in MLflow's language.
        sort: as in `limbeck models list --sort`; "" for the default.
        page_number: from 1; limited to the last page.

    Raises:
        BadInput: an invalid condition, or an unknown model.
    """
    query, words = _parse_search(text, sort)
    hits = [hit for hit in search_versions(store, name, query) if all(word in _searchable_text(hit) for word in words)]
    if name and not hits and not text.strip():
        raise store.not_found_error(name)
    pages = max(1, -(-len(hits) // VERSIONS_PER_PAGE))
    page_number = min(max(page_number, 1), pages)
    start = (page_number - 1) * VERSIONS_PER_PAGE
    return SearchPage(hits[start : start + VERSIONS_PER_PAGE], len(hits), page_number, pages)


def _parse_search(text: str, sort: str) -> tuple[Query, list[str]]:
    """Split a line into a query and its plain words, in lower case."""
    if FILTER.match(text):
        return Query(build_conditions({}, text=text), sort=sort or None), []
    fields: dict[str, str | None] = {}
    more: dict[str, str] = {}
    metrics, words = [], []
    for part in text.split():
        match = CONDITION.fullmatch(part)
        if match is None:
            words.append(part.casefold())
        elif match[2] == "=" and match[1] in FIELDS:
            fields[match[1]] = match[3]
        elif match[2] == "=" and match[1] in ("alias", "since", "until"):
            more[match[1]] = match[3]
        else:
            metrics.append(part)
    try:
        conditions = build_conditions(fields, metrics=metrics)
    except BadInput as error:
        raise BadInput(error.message.replace("--metric ", ""), fix="write it as retention>=0.9") from None
    since, until = (parse_date(more[key]) if key in more else None for key in ("since", "until"))
    return Query(conditions, since, until, more.get("alias"), sort or None), words


def _searchable_text(hit: SearchHit) -> str:
    """The text that plain words are searched in."""
    version: Version | None = hit.version
    if version is None:
        return hit.ref.casefold()
    fields = (version.kind, version.recipe, version.precision, version.parent, version.teacher, version.licence)
    parts = [version.ref, *fields, version.author, version.control, version.digest, *version.aliases]
    return " ".join(part for part in parts if part).casefold()
