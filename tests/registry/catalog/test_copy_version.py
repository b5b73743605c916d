"""A version that was copied from staging to production: the same files and evidence, and production's own gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.catalog.copy_version import LEDGER_FILE, copy_version, read_origin
from limbeck.registry.core.digest import folder_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.home import home
from limbeck.registry.ledger import log
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion, TrainingCost
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


@pytest.fixture
def production(scored: Still, empty_database: Path, tmp_path: Path, limbeck: Limbeck, policy: Path) -> str:
    """The tracking store of production, which has a model already; in staging, `still/4` was promoted."""
    assert limbeck("promote", "still/4").code == 0
    (tmp_path / "production").mkdir()
    (tmp_path / "production" / "mlflow.db").write_bytes(empty_database.read_bytes())
    uri = f"sqlite:///{tmp_path / 'production' / 'mlflow.db'}"
    Store(uri).register(
        NewVersion(name="still", kind="teacher"), scored.store.artifacts.verified_folder(scored.student)
    )
    return uri


def test_a_version_is_copied_with_its_lineage_evidence_and_ledger(
    scored: Still, production: str, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    staging, version = scored.store, scored.store.get("still/4")
    before = sorted((home() / "artifacts").rglob("*"))
    result = limbeck("models", "copy", "still@production", "--to", production, "--format", "json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    assert [(row["original"], row["copy"]) for row in rows] == [
        ("still/1", "still/2"),
        ("still/2", "still/3"),
        ("still/4", "still/4"),
    ]
    assert sorted((home() / "artifacts").rglob("*")) == before  # all files went into production's own folder
    target = Store(production)
    copy = target.get("still/4")
    assert (copy.digest, copy.parent, copy.teacher) == (version.digest, "still/3", "still/2")
    assert folder_digest(target.artifacts.verified_folder(copy)) == version.digest
    assert target.artifacts.verified_folder(copy).is_relative_to(tmp_path / "production")
    assert target.findings.scorecards(copy) == staging.findings.scorecards(version)
    assert target.findings.verdicts(copy) == staging.findings.verdicts(version) != []
    assert target.findings.parity(copy) == staging.findings.parity(version)
    origin = read_origin(target, copy)
    assert origin is not None
    assert (origin.version, list(origin.entries)) == ("still/4", log.read_entries(staging, "still"))
    assert target.aliases("still") == {}  # its own gate decides
    again = limbeck("models", "copy", "still/4", "--to", production, "--format", "json")
    assert json.loads(again.out) == [row | {"is_new": False} for row in rows]
    assert len(target.versions()) == 4
    monkeypatch.setenv("MLFLOW_TRACKING_URI", production)
    assert "copied from" in limbeck("models", "show", "still/4").out
    assert limbeck("promote", "still/4").code == 0
    assert limbeck("models", "history", "still", "--verify").code == 0


def test_a_copy_brings_the_run_that_made_it(scored: Still, production: str, tmp_path: Path) -> None:
    cost = TrainingCost(training_seconds=3.0, tokens=100, machine="a test")
    with scored.store.runs.start("training", params={"steps": 7}) as run:
        run.set_tags({"limbeck.training_cost": cost.model_dump_json()})
        run.log_metrics({"loss": 1.5})
    folder = scored.store.artifacts.verified_folder(scored.student)
    made = scored.store.register(NewVersion(name="trained", kind="student", run_id=run.id), folder)
    target = Store(production)
    (copied,) = copy_version(scored.store, made.ref, target)
    copy = target.get(copied.copy)
    assert target.runs.training_cost(copy) == cost
    data = target.client.get_run(copy.run_id).data
    assert (data.params, data.metrics) == ({"steps": "7"}, {"loss": 1.5})
    assert copy_version(scored.store, made.ref, target)[0].copy == copied.copy


def test_what_was_changed_is_not_copied_and_is_found_in_the_copy(
    scored: Still, production: str, limbeck: Limbeck, tmp_path: Path
) -> None:
    staging, target = scored.store, Store(production)
    copy_version(staging, "still/4", target)
    artifacts = tmp_path / "production" / "artifacts"
    ledgers = {file: file.read_text() for file in artifacts.rglob(LEDGER_FILE)}
    for file, text in ledgers.items():
        file.write_text(text.replace('"reason":""', '"reason":"because"'))
    with pytest.raises(DamagedArtifact, match=r"ledger.jsonl is not what was recorded"):
        read_origin(target, target.get("still/4"))
    for file, text in ledgers.items():
        file.write_text(text)
    card = next(artifacts.rglob("scorecard.json"))
    card.write_text(card.read_text().replace("0.97", "0.99"))
    with pytest.raises(DamagedArtifact, match=r"the scorecard \w+ of still/4 is damaged"):
        copy_version(staging, "still/4", target)
    with pytest.raises(BadInput, match="is the store that the version is in"):
        copy_version(staging, "still/4", Store())
    staging.client.set_registered_model_alias("still", "production", "5")
    refused = limbeck("models", "copy", "still/4", "--to", production)
    assert (refused.code, "moved it through MLflow itself" in refused.err) == (1, True)
