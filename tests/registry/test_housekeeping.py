"""Runs, versions, models and experiments that somebody deleted, purged or renamed in MLflow: the rest keeps working."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from limbeck.registry.core.home import home, tracking_uri
from limbeck.registry.gate.evidence import DELETED, gather_evidence
from limbeck.registry.gate.promotion import promote
from limbeck.registry.ledger import anchor, log
from limbeck.registry.mlflow.runs import EXPERIMENT
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still, copy_prepared, make_artifact, make_still
from tests.web.conftest import write_answers

Limbeck = Callable[..., Result]


@pytest.fixture(scope="module")
def promoted_workspace(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, Still]:
    """A state folder where the teacher and two variants are scored, and the int8 variant is in production."""
    root = tmp_path_factory.mktemp("promoted")
    (root / "home").mkdir()
    shutil.copy(empty_database, root / "home" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_HOME", str(root / "home"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        still = make_still(Store(), partial(make_artifact, root / "made"), root)
        for version, wrong in ((still.teacher, 4), (still.variants["fp32"], 5), (still.variants["int8-weight"], 7)):
            still.documents = write_answers(root / f"{version.version}.parquet", wrong)
            still.score(version)
        promote(still.store, "still/4", "production", POLICY)
    return root / "home", still


@pytest.fixture
def promoted(store: Store, promoted_workspace: tuple[Path, Still], policy: Path) -> Still:
    return copy_prepared(*promoted_workspace, store, promoted_workspace[1].documents)


def purge(store: Store) -> None:
    """`mlflow gc`: what was deleted is deleted for good. Caches of other machines do not have it."""
    from mlflow.cli import cli

    done = CliRunner().invoke(cli, ["gc", "--backend-store-uri", tracking_uri(), "--tracking-uri", tracking_uri()])
    assert done.exit_code == 0, done.output
    shutil.rmtree(home() / "scorecards", ignore_errors=True)


def run_of_scorecard(still: Still, number: int) -> str:
    tags = still.store.client.get_model_version("still", str(number)).tags
    return str(json.loads(next(tags[key] for key in tags if key.startswith("limbeck.scorecard.")))["run_id"])


def experiment_id(store: Store, name: str) -> str:
    return str(store.client.get_experiment_by_name(name).experiment_id)


def works(limbeck: Limbeck, name: str = "still") -> None:
    """What reads the registry works."""
    for command in (
        ("models", "list", name),
        ("models", "show", f"{name}/4"),
        ("models", "lineage", name),
        ("models", "card", f"{name}/3"),
        ("models", "history", name),
        ("leaderboard", name),
    ):
        result = limbeck(*command)
        assert result.code == 0, (command, result.err)


def pages_work(store: Store, *paths: str) -> None:
    from fastapi.testclient import TestClient

    from limbeck.web.app import create_app

    client = TestClient(create_app(store, policy=POLICY, token="t" * 32), base_url="http://127.0.0.1")
    client.post("/login", data={"token": "t" * 32}, headers={"Origin": "http://127.0.0.1"})
    for path in paths:
        assert client.get(path).status_code == 200, path


def test_a_purged_score_run_is_one_missing_scorecard(promoted: Still, limbeck: Limbeck) -> None:
    store = promoted.store
    store.client.delete_run(run_of_scorecard(promoted, 3))
    assert len(store.findings.scorecards(promoted.variants["fp32"])) == 1  # MLflow keeps it until `mlflow gc`
    purge(store)
    works(limbeck)
    board = limbeck("leaderboard", "still")
    assert board.err.count("the scorecard") == 1
    assert "of still/3 is missing: the MLflow run" in board.err
    assert limbeck("verdict", "still").code == 0
    assert limbeck("promote", "still", "--dry-run").code == 0
    pages_work(store, "/", "/models/still", "/models/still/3", "/models/still/4")
    promoted.score(promoted.variants["fp32"], usd=3.0)  # scored again
    assert len(store.findings.scorecards(promoted.variants["fp32"])) == 1


def test_a_purged_training_run_leaves_the_version(store: Store, make_folder: Callable[..., Path]) -> None:
    with store.runs.start("training") as run:
        run.log_params({"steps": 3})
    version = store.register(NewVersion(name="still", kind="student", run_id=run.id), make_folder("a"))
    store.client.delete_run(run.id)
    purge(store)
    assert store.get("still/1") == version
    assert store.runs.training_cost(version) is None
    pages_work(store, "/models/still/1")


def test_a_deleted_parent_leaves_its_variants_inconclusive(promoted: Still, limbeck: Limbeck) -> None:
    store = promoted.store
    store.client.delete_model_version("still", "2")
    works(limbeck)
    evidence = gather_evidence(store, promoted.variants["fp32"], POLICY, "production")
    assert (evidence.parent_digest, evidence.teacher_digest) == (DELETED, promoted.teacher.digest)
    refused = limbeck("promote", "still/3")
    assert refused.code == 1
    assert "parity.required (inconclusive): its parent still/2 is deleted" in refused.err
    store.client.delete_model_version("still", "1")
    works(limbeck)
    assert "quality.teacher (inconclusive): its teacher still/1 is deleted" in limbeck("promote", "still/3").err
    pages_work(store, "/", "/models/still", "/models/still/4")


def test_a_purged_logged_model_still_takes_scores(promoted: Still, limbeck: Limbeck) -> None:
    store, version = promoted.store, promoted.variants["fp32"]
    store.client.delete_logged_model(store.client.get_model_version("still", "3").tags["limbeck.model_id"])
    purge(store)
    works(limbeck)
    promoted.score(version, usd=3.0)
    assert len(store.findings.scorecards(version)) == 2


@pytest.mark.parametrize("name", [EXPERIMENT, anchor.EXPERIMENT])
def test_a_renamed_or_purged_experiment(promoted: Still, limbeck: Limbeck, name: str) -> None:
    client, number = promoted.store.client, experiment_id(promoted.store, name)
    client.rename_experiment(number, "other")
    works(limbeck)
    client.delete_experiment(number)
    purge(promoted.store)
    works(limbeck)
    assert [entry.to_version for entry in log.read_entries(Store(), "still")] == [4]
    pages_work(Store(), "/", "/models/still", "/models/still/4")


def test_a_purged_anchor_leaves_the_entries(promoted: Still, limbeck: Limbeck) -> None:
    store = promoted.store
    run_id = log.read_ledger(store, "still").anchor.run_id
    store.client.delete_run(run_id)
    purge(store)
    works(limbeck)
    history = limbeck("models", "history", "still", "--verify", "--format", "json")
    assert history.code == 1
    found = json.loads(history.out)
    assert [entry["to_version"] for entry in found["entries"]] == [4]
    assert found["problems"] == [f"the MLflow run {run_id}, which anchors the ledger, was deleted"]


def test_a_purged_root_of_the_anchors_is_one_problem(promoted: Still, limbeck: Limbeck) -> None:
    store = promoted.store
    store.client.delete_run(store.client.get_experiment_by_name(anchor.EXPERIMENT).tags[anchor.ROOT_RUN_TAG])
    purge(store)
    works(limbeck)
    history = limbeck("models", "history", "still", "--verify", "--format", "json")
    assert len(json.loads(history.out)["problems"]) == 1


def test_a_renamed_model(promoted: Still, limbeck: Limbeck) -> None:
    promoted.store.client.rename_registered_model("still", "kettle")
    works(limbeck, "kettle")
    pages_work(promoted.store, "/", "/models/kettle", "/models/kettle/4")
