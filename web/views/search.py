"""The search box: words, and the same conditions as the options of `limbeck models list`, in one line."""

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
    """The versions of one page of a search."""

    hits: Sequence[SearchHit]
    total: int
    number: int  # of the page, from 1
    pages: int


def search_page(store: Store, name: str | None, text: str, sort: str, page_number: int) -> SearchPage:
    """Those of `name`, or of all models, that a line asks for.

    Args:
        text: words that a version's fields have; `kind=onnx`, `alias=production`, `since=2026-01-31`,
            `retention>=0.9`; or a filter in MLflow's language.
        sort: as `limbeck models list --sort`.

    Raises:
        BadInput: a condition that cannot be read; no such model.
    """
    asked, words = _parse_search(text, sort)
    found = [hit for hit in search_versions(store, name, asked) if all(word in _searchable_text(hit) for word in words)]
    if name and not found and not text.strip():
        raise store.not_found_error(name)
    pages = max(1, -(-len(found) // VERSIONS_PER_PAGE))
    page_number = min(max(page_number, 1), pages)
    return SearchPage(
        found[(page_number - 1) * VERSIONS_PER_PAGE : page_number * VERSIONS_PER_PAGE], len(found), page_number, pages
    )


def _parse_search(text: str, sort: str) -> tuple[Query, list[str]]:
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
        asked = build_conditions(fields, metrics=metrics)
    except BadInput as error:
        raise BadInput(error.message.replace("--metric ", ""), fix="write retention>=0.9") from None
    since, until = (parse_date(more[key]) if key in more else None for key in ("since", "until"))
    return Query(asked, since, until, more.get("alias"), sort or None), words


def _searchable_text(hit: SearchHit) -> str:
    """What words are looked for in."""
    version: Version | None = hit.version
    if version is None:
        return hit.ref.casefold()
    fields = (version.kind, version.recipe, version.precision, version.parent, version.teacher, version.licence)
    parts = [version.ref, *fields, version.author, version.control, version.digest, *version.aliases]
    return " ".join(part for part in parts if part).casefold()
