"""`limbeck models list`: its options such as --since, --metric and --sort, and versions that cannot be read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from limbeck.registry.mlflow.store import Store
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


def found(limbeck: Limbeck, *options: str) -> list[int]:
    """The numbers of the versions that `limbeck models list` prints."""
    done = limbeck("models", "list", *options, "--format", "json")
    assert done.code == 0, done.err
    return [version["version"] for version in json.loads(done.out)]


def test_options_filter_sort_and_limit(scored: Still, limbeck: Limbeck) -> None:
    scored.store.client.set_registered_model_alias("still", "production", "4")
    scored.store.client.set_model_version_tag("still", "2", "note", "a 'b\\ \"c")
    assert found(limbeck, "--precision", "int4") == [5]
    assert found(limbeck, "--recipe", "small", "--kind", "student") == [2]
    assert found(limbeck, "--parent", "still/2", "--metric", "retention >= 0.9") == [3, 4]
    assert found(limbeck, "--teacher", "still/1", "--sort", "-version", "--limit", "2") == [5, 4]
    assert found(limbeck, "--sort", "cost.usd_per_million_tokens", "--limit", "2") == [5, 4]
    assert found(limbeck, "--alias", "production") == [4]
    assert found(limbeck, "--tag", "note=a 'b\\ \"c") == [2]
    assert found(limbeck, "--since", "2020-01-01", "--until", "2020-01-02") == []
    assert found(limbeck, "--since", "2020-01-01") == [1, 2, 3, 4, 5]
    assert "retention.value" in limbeck("models", "list", "--metric", "retention > 0").out
    for options in (["--metric", "retention"], ["--metric", "absent > 1"], ["--tag", "x"], ["--since", "soon"]):
        assert limbeck("models", "list", *options).code == 2


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE model_version_tags SET value = 'cat' WHERE key = 'limbeck.kind' AND version = 3",
        "INSERT INTO model_version_tags (key, value, name, version) VALUES ('limbeck.params', '{', 'still', 3)",
        "UPDATE model_versions SET creation_time = 99999999999999999 WHERE version = 3",
    ],
)
def test_a_version_that_cannot_be_read_is_listed_as_unreadable(
    still: Still, limbeck_home: Path, limbeck: Limbeck, sql: str
) -> None:
    with closing(sqlite3.connect(limbeck_home / "mlflow.db")) as database, database:
        database.execute(sql)
    versions = json.loads(limbeck("models", "list", "--format", "json").out)
    assert [version["version"] for version in versions] == [1, 2, 3, 4, 5]
    assert [version["version"] for version in versions if "unreadable" in version] == [3]
    shown = limbeck("models", "list")
    assert (shown.code, "unreadable: " in shown.out) == (0, True)
    assert [version.version for version in Store().versions("still")] == [1, 2, 4, 5]
    shown = limbeck("models", "show", "still/3")
    assert (shown.code, "still/3 is unreadable: " in shown.err) == (2, True)
    assert limbeck("models", "lineage", "still").code == 0
