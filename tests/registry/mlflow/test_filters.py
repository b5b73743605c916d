"""MLflow's filter language: what it finds, read from SQLite directly and through MLflow, and invalid filters."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.mlflow import listing
from limbeck.registry.mlflow.filters import parse_filter
from tests.registry.conftest import Still

FILTERS = {
    "tags.`limbeck.precision` = 'int8-weight'": [4],
    "tags.`limbeck.precision` != 'int8-weight' and tags.`limbeck.kind` = 'onnx'": [3, 5],
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


def test_sqlite_and_mlflow_find_the_same_versions(scored: Still, limbeck_home: Path) -> None:
    store = scored.store
    store.client.set_model_version_tag("still", "2", "limbeck.note", "it's")
    for text, expected in FILTERS.items():
        conditions = parse_filter(text)
        metrics = {condition.key for condition in conditions if condition.kind == "metric"}
        direct = listing.list_from_sqlite(limbeck_home / "mlflow.db", None, metrics)
        assert direct is not None
        listed = listing.list_from_mlflow(store.client, None, conditions, metrics)
        matching = [version for version in direct if all(each.matches(version) for each in conditions)]
        assert [version.version for version in matching] == expected, text
        if not metrics:
            assert listed == matching, text  # MLflow finds the same by itself
        assert [version for version in listed if all(each.matches(version) for each in conditions)] == matching, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", r"character 1 \('nonsense'\)"),
        ("tags.a = 'b' or tags.c = 'd'", "character 14 .*AND is missing"),
        ("tags.a = 3", "character 10 .*put it in quotes"),
        ("metrics.a = 'b'", "character 13 .*not a number"),
        ("stage = 'x'", "character 1 .*not one of name"),
        ("name > 'a'", "character 6 "),
        ("tags.a = 'b", "character 1 "),
    ],
)
def test_the_error_of_an_invalid_filter_has_its_position(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_filter(text)
