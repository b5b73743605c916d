"""The versions of models with their tags, all at once: a list of a thousand needs neither a query for each nor MLflow.

A SQLite store is read directly, since importing MLflow takes longer than reading 10,000 versions: read only, and
only where the database has the very schema that the query is written for. Any other store is asked through MLflow.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from registry.connection import Client, NotThere, sqlite_file

SCHEMA = "dc11669786a5"  # as MLflow 3.17 marks its database (alembic)
VERSIONS = """
SELECT v.name, v.version, v.source, v.creation_time, v.run_id, json_group_object(t.key, t.value)
FROM model_versions v JOIN model_version_tags t USING (workspace, name, version)
WHERE v.workspace = 'default' AND v.current_stage != 'Deleted_Internal' AND (:name IS NULL OR v.name = :name)
GROUP BY v.name, v.version ORDER BY v.name, v.version
"""
ALIASES = "SELECT name, version, alias FROM registered_model_aliases WHERE workspace = 'default' ORDER BY alias"


class Listed(NamedTuple):
    """A model version as MLflow keeps it."""

    name: str
    version: int
    source: str
    creation_timestamp: int  # milliseconds
    run_id: str | None
    tags: dict[str, str]
    aliases: tuple[str, ...]  # sorted


def listed(client: Client, tracking_uri: str, name: str | None = None, filter_string: str = "") -> list[Listed]:
    """The versions that have tags, of `name` or of all models, by name and oldest first.

    Args:
        filter_string: in MLflow's language, which MLflow alone speaks.
    """
    file = sqlite_file(tracking_uri)
    found = _from_sqlite(file, name) if file and not filter_string else None
    return _from_mlflow(client, name, filter_string) if found is None else found


def _from_sqlite(file: Path, name: str | None) -> list[Listed] | None:
    """None where the database is not one of SCHEMA."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as database:
            database.execute("BEGIN")  # one state of it
            if database.execute("SELECT version_num FROM alembic_version").fetchall() != [(SCHEMA,)]:
                return None
            aliases = defaultdict(list)
            for model, version, alias in database.execute(ALIASES):
                aliases[model, version].append(alias)
            return [
                Listed(
                    model, version, source, created, run_id or None, json.loads(tags), tuple(aliases[model, version])
                )
                for model, version, source, created, run_id, tags in database.execute(VERSIONS, {"name": name})
            ]
    except sqlite3.Error:  # MLflow finds the words
        return None


def _from_mlflow(client: Client, name: str | None, filter_string: str = "") -> list[Listed]:
    filters = ([f"name = '{name}'"] if name else []) + ([filter_string] if filter_string else [])
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(
            " and ".join(filters),
            max_results=1000,
            order_by=["name ASC", "version_number ASC"],
            page_token=token,
        )
        found += [v for v in page if v.tags]
        token = page.token
        if not token:
            break
    # MLflow's search leaves the aliases out.
    aliases = {model: aliases_of(client, model) for model in {v.name for v in found}}
    return [
        Listed(
            v.name,
            int(v.version),
            v.source,
            v.creation_timestamp,
            v.run_id or None,
            dict(v.tags),
            tuple(sorted(alias for alias, number in aliases[v.name].items() if number == int(v.version))),
        )
        for v in found
    ]


def aliases_of(client: Client, name: str) -> dict[str, int]:
    """Alias -> version number, of a registered model; empty where there is no such model."""
    try:
        aliases = client.get_registered_model(name).aliases
    except NotThere:
        return {}
    return {alias: int(number) for alias, number in aliases.items()}
