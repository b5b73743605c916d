"""What `limbeck models list` finds, read directly and through MLflow; and versions that cannot be read."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow import listing
from limbeck.registry.mlflow.filters import parse_filter
from limbeck.registry.mlflow.store import Store
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]
FILTERS = {
    "tags.`limbeck.precision` = 'int8'": [4],
    "tags.`limbeck.precision` != 'int8' and tags.`limbeck.kind` = 'onnx'": [3, 5],
    "tags.`limbeck.kind` LIKE 'on%'": [3, 4, 5],
    "tags.`limbeck.kind` LIKE 'ON%'": [],
    "tags.`limbeck.kind` ILIKE 'ON_X'": [3, 4, 5],
    "name = 'still' and version_number >= 4": [4, 5],
    "name IN ('still', 'other') and version_number < 2": [1],
    "name NOT IN ('still', 'other')": [],
    "metrics.`retention.value` >= 0.9": [3, 4],
    "metrics.`retention.value` < 0.9 and tags.`limbeck.kind` = 'onnx'": [5],
    "metrics.cost_ratio > -1.5": [3, 4, 5],
    'tags.`limbeck.note` = "it\'s"': [2],
    "tags.`limbeck.absent` != 'x'": [],
}


def test_both_ways_find_the_same(scored: Still, limbeck_home: Path) -> None:
    store = scored.store
    store.client.set_model_version_tag("still", "2", "limbeck.note", "it's")
    for text, expected in FILTERS.items():
        conditions = parse_filter(text)
        metrics = {condition.key for condition in conditions if condition.of == "metric"}
        direct = listing._from_sqlite(limbeck_home / "mlflow.db", None, metrics)
        assert direct is not None
        asked = listing._from_mlflow(store.client, None, conditions, metrics)
        holding = [version for version in direct if all(each.matches(version) for each in conditions)]
        assert [version.version for version in holding] == expected, text
        if not metrics:
            assert asked == holding, text  # MLflow alone says the same
        assert [version for version in asked if all(each.matches(version) for each in conditions)] == holding, text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", r"character 1 \('nonsense'\)"),
        ("tags.a = 'b' or tags.c = 'd'", "character 14 .*AND is missing"),
        ("tags.a = 3", "character 10 .*put it in quotes"),
        ("metrics.a = 'b'", "character 13 .*no number"),
        ("stage = 'x'", "character 1 .*none of name"),
        ("name > 'a'", "character 6 "),
        ("tags.a = 'b", "character 1 "),
    ],
)
def test_a_filter_that_cannot_be_read_is_told_with_its_place(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parse_filter(text)


def found(limbeck: Limbeck, *options: str) -> list[int]:
    done = limbeck("models", "list", *options, "--format", "json")
    assert done.code == 0, done.err
    return [version["version"] for version in json.loads(done.out)]


def test_options(scored: Still, limbeck: Limbeck) -> None:
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
def test_a_version_that_cannot_be_read_is_shown_as_what_it_is(
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
    told = limbeck("models", "show", "still/3")
    assert (told.code, "still/3 is unreadable: " in told.err) == (2, True)
    assert limbeck("models", "lineage", "still").code == 0
