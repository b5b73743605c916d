"""Scorecards, parity reports and verdicts are read from the store unchanged, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.home import home
from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.apply_policy import apply_policy
from limbeck.registry.records import Parity, Scorecard
from tests.registry.conftest import POLICY, Still


def test_scorecards_are_read_back_newest_last(still: Still, make_card: Callable[..., Scorecard]) -> None:
    store, version = still.store, still.variants["int8-weight"]
    later = make_card(version.digest, created=datetime(2026, 2, 1, tzinfo=UTC), retention=(0.9, 0.8, 1.0))
    store.findings.add_scorecard(version, later, still.documents)
    earlier = still.score(version)
    assert store.findings.scorecards(version) == [earlier, later]  # newest last
    shutil.rmtree(home() / "scorecards")
    assert store.findings.scorecards(version) == [earlier, later]  # from the store itself
    assert store.findings.documents(version, later).read_bytes() == still.documents.read_bytes()
    with pytest.raises(BadInput, match="has no such scorecard"):
        store.findings.documents(version, make_card("other"))
    assert store.findings.scorecards(still.student) == []


def test_a_scorecard_is_stored_once_and_logged_in_mlflow(still: Still) -> None:
    store, version = still.store, still.variants["int8-weight"]
    card = still.score(version)
    still.score(version)
    assert store.findings.scorecards(version) == [card]
    experiment = store.client.get_experiment_by_name("limbeck").experiment_id
    runs = store.client.search_runs([experiment], "tags.`limbeck.version` = 'still/4'")
    assert [run.info.run_name for run in runs] == ["score still/4"]
    assert runs[0].data.metrics["bits.acc"] == 0.5
    assert runs[0].data.metrics["retention.low"] == 0.95
    assert runs[0].data.metrics["cost.usd_per_million_tokens"] == 1.0
    model_id = store.client.get_model_version("still", "4").tags["limbeck.model_id"]
    logged = store.client.get_logged_model(model_id)
    assert {metric.key for metric in logged.metrics} == set(runs[0].data.metrics)


@pytest.mark.parametrize("file", ["scorecard.json", "documents.parquet"])
@pytest.mark.parametrize("content", ["cut short", "{}"])
def test_a_damaged_cache_is_fetched_again_and_a_damaged_store_reported(still: Still, file: str, content: str) -> None:
    store, version = still.store, still.variants["int8-weight"]
    card = still.score(version)

    def read() -> object:
        return (
            store.findings.scorecards(version) if file == "scorecard.json" else store.findings.documents(version, card)
        )

    original = read()
    cached = next(home().glob(f"scorecards/*/{file}"))
    cached.write_text(content)
    assert read() == original  # fetched again
    assert cached.read_text(errors="replace") != content
    next((home() / "artifacts").rglob(file)).write_text(content)
    cached.unlink()
    with pytest.raises(DamagedArtifact, match=f"{file} is not what was recorded"):
        read()
    assert not cached.exists()


def test_a_changed_number_is_found(still: Still) -> None:
    still.score(still.variants["int8-weight"])
    stored = next((home() / "artifacts").rglob("scorecard.json"))
    stored.write_text(stored.read_text().replace("0.97", "0.99"))
    shutil.rmtree(home() / "scorecards")
    with pytest.raises(DamagedArtifact, match=r"the scorecard .* of still/4"):
        still.store.findings.scorecards(still.variants["int8-weight"])


def test_missing_documents(still: Still, make_card: Callable[..., Scorecard], tmp_path: Path) -> None:
    version = still.variants["int8-weight"]
    with pytest.raises(FileNotFoundError):
        still.store.findings.add_scorecard(version, make_card(version.digest), tmp_path / "missing.parquet")
    assert still.store.findings.scorecards(version) == []


def test_parity_and_verdicts_are_read_back(still: Still, make_parity: Callable[..., Parity]) -> None:
    store, version = still.store, still.variants["int8-weight"]
    newer = make_parity(reference=still.student.digest, precision="int8-weight", mean_kl=0.5)
    store.findings.add_parity(version, newer)
    assert store.findings.parity(version) == newer
    assert store.findings.parity(still.student) is None
    first = apply_policy(POLICY, Evidence(version, None, newer))
    assert store.findings.add_verdict(version, first) == first
    again = apply_policy(POLICY, Evidence(version, None, newer))
    assert store.findings.add_verdict(version, again) == first  # differs only in time
    other = apply_policy(POLICY, Evidence(version, still.score(version), newer))
    store.findings.add_verdict(version, other)
    assert store.findings.verdicts(version) == [first, other]
    assert (first.outcome, other.outcome) == ("inconclusive", "pass")
