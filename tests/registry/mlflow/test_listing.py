"""Listing versions directly from SQLite returns the same as MLflow."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.mlflow import listing
from limbeck.registry.mlflow.listing import list_versions
from tests.registry.conftest import POLICY, Still


def set_schema(limbeck_home: Path, schema: str) -> None:
    """Write the number of another schema into the database."""
    with closing(sqlite3.connect(limbeck_home / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", [schema])


def test_sqlite_and_mlflow_return_the_same(scored: Still, limbeck_home: Path) -> None:
    store = scored.store
    for alias, number in (("production", "4"), ("best", "4"), ("other", "3")):
        store.client.set_registered_model_alias("still", alias, number)
    store.client.create_registered_model("foreign")
    store.client.create_model_version("foreign", "/tmp/nowhere", tags={"quote": 'it\'s "so"\n'}, run_id=None)
    store.client.create_model_version("foreign", "/tmp/untagged")
    store.client.create_model_version("foreign", "/tmp/deleted", tags={"a": "b"})
    store.client.delete_model_version("foreign", "3")
    directly = {name: listing.list_from_sqlite(limbeck_home / "mlflow.db", name) for name in (None, "still", "nothing")}
    for name, found in directly.items():
        assert (
            found
            == listing.list_from_mlflow(store.client, name)
            == list_versions(store.client, store.tracking_uri, name)
        )
    everything = directly[None]
    assert everything is not None
    assert [(v.name, v.version) for v in everything] == [("foreign", 1), *(("still", n) for n in range(1, 6))]
    assert [v.aliases for v in everything if v.aliases] == [("other",), ("best", "production")]


def test_a_database_of_another_schema_is_read_through_mlflow(scored: Still, limbeck_home: Path) -> None:
    store = scored.store
    before = store.versions()
    assert store.get("still/1") in before  # this opens the MLflow client
    set_schema(limbeck_home, "000000000000")
    assert listing.list_from_sqlite(limbeck_home / "mlflow.db", None) is None
    assert store.versions() == before
    assert listing.list_from_sqlite(limbeck_home / "nothing.db", None) is None
    assert not (limbeck_home / "nothing.db").exists()


def test_versions_come_with_their_findings(scored: Still) -> None:
    store, int8 = scored.store, scored.variants["int8-weight"]
    verdict = store.findings.add_verdict(int8, apply_policy(POLICY, Evidence(int8, None, store.findings.parity(int8))))
    found = {each.version.ref: each for each in store.versions_with_findings("still")}
    assert [each.version for each in found.values()] == store.versions("still")
    assert found[int8.ref].verdicts == [verdict]
    assert found[int8.ref].scorecards == store.findings.scorecards(int8)
    assert len(found[int8.ref].scorecards) == 1
    assert found[scored.student.ref][1:] == ([], [])
    assert store.versions_with_findings("nothing") == []


def test_versions_scored_on_this_machine_are_listed_without_importing_mlflow(scored: Still) -> None:
    script = (
        "import sys; from limbeck.registry.mlflow.store import Store; "
        "print(len(Store().versions_with_findings('still')), 'mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["5", "False"]
