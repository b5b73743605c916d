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
from limbeck.registry.doctor.housekeeping import faults
from limbeck.registry.gate.evidence import DELETED, gather_evidence
from limbeck.registry.gate.promotion import promote
from limbeck.registry.ledger import anchor, log
from limbeck.registry.mlflow.runs import EXPERIMENT
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result, new_workspace
from tests.registry.conftest import POLICY, Still, copy_prepared, make_artifact, make_still
from tests.web.conftest import write_answers

Limbeck = Callable[..., Result]


@pytest.fixture(scope="module")
def promoted_workspace(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, Still]:
    """A state folder where the teacher and two variants are scored, and the int8 variant is in production."""
    root = tmp_path_factory.mktemp("promoted")
    with new_workspace(root / "home", empty_database):
        still = make_still(Store(), partial(make_artifact, root / "made"), root)
        for version, wrong in ((still.teacher, 4), (still.variants["fp32"], 5), (still.variants["int8-weight"], 7)):
            still.documents = write_answers(root / f"{version.version}.parquet", wrong)
            still.score(version)
        promote(still.store, "still/4", "production", POLICY)
    return root / "home", still


@pytest.fixture
def promoted(store: Store, promoted_workspace: tuple[Path, Still], policy: Path) -> Still:
    return copy_prepared(*promoted_workspace, store, promoted_workspace[1].documents)


def purge(store: Store, *, keep_caches: bool = False) -> None:
    """`mlflow gc`: what was deleted is deleted for good. Caches of other machines do not have it."""
    from mlflow.cli import cli

    done = CliRunner().invoke(cli, ["gc", "--backend-store-uri", tracking_uri(), "--tracking-uri", tracking_uri()])
    assert done.exit_code == 0, done.output
    if not keep_caches:
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


def found_by_doctor(*, repair: bool = False) -> dict[str, str]:
    """Subject -> what is wrong with it, or was mended. What is only worth knowing is left out."""
    checks = [fault.check(repair=repair) for fault in faults(Store())]
    wrong = {check.subject: f"wrong: {check.found}" for check in checks if check.state == "wrong"}
    return wrong | {check.subject: check.found for check in checks if "; done: " in check.found}


def notes() -> list[str]:
    """What is worth knowing, and cannot be mended."""
    checks = [fault.check(repair=False) for fault in faults(Store())]
    return [f"{check.subject}: {check.found}" for check in checks if check.state == "note"]


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
    assert "is missing: the run" in found_by_doctor()["still/3"]
    assert "forget it" in found_by_doctor(repair=True)["still/3"]  # it is nowhere
    assert found_by_doctor() == {}
    store.client.delete_run(run_of_scorecard(promoted, 4))
    assert "of its scorecard" in found_by_doctor()["still/4"]  # deleted, and not purged yet
    assert "done: restore it" in found_by_doctor(repair=True)["still/4"]
    assert found_by_doctor() == {}


def test_a_cached_scorecard_counts_with_its_documents_only_and_is_restored(promoted: Still, limbeck: Limbeck) -> None:
    findings, fp32, int8 = promoted.store.findings, promoted.variants["fp32"], promoted.variants["int8-weight"]
    (card,) = findings.scorecards(int8)
    findings.documents(int8, card)  # now this machine has them
    for version in (fp32, int8):
        promoted.store.client.delete_run(run_of_scorecard(promoted, version.version))
    purge(promoted.store, keep_caches=True)
    assert (findings.scorecards(fp32), findings.scorecards(int8)) == ([], [card])
    assert limbeck("verdict", "still").code == 0
    found_by_doctor(repair=True)
    shutil.rmtree(home() / "scorecards")
    assert (findings.scorecards(fp32), findings.scorecards(int8)) == ([], [card])
    assert found_by_doctor() == {}


def test_a_purged_training_run_leaves_the_version(store: Store, make_folder: Callable[..., Path]) -> None:
    with store.runs.start("training") as run:
        run.log_params({"steps": 3})
    version = store.register(NewVersion(name="still", kind="student", run_id=run.id), make_folder("a"))
    store.client.delete_run(run.id)
    purge(store)
    assert store.get("still/1") == version
    assert store.runs.training_cost(version) is None
    pages_work(store, "/models/still/1")
    assert found_by_doctor() == {}  # worth knowing, but nothing can be done
    (note,) = notes()
    assert note.endswith("was deleted for good: its recipe and cost are unknown")


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
def test_a_renamed_deleted_or_purged_experiment(promoted: Still, limbeck: Limbeck, name: str) -> None:
    client, number = promoted.store.client, experiment_id(promoted.store, name)
    client.rename_experiment(number, "other")
    works(limbeck)
    assert found_by_doctor()[f"experiment {name}"] == "wrong: it was renamed to other"
    assert "done: rename it back" in found_by_doctor(repair=True)[f"experiment {name}"]
    client.delete_experiment(number)
    assert found_by_doctor(repair=True)[f"experiment {name}"].endswith("it was deleted; done: restore it")
    assert found_by_doctor() == {}
    client.delete_experiment(number)
    purge(promoted.store)
    works(limbeck)
    assert [entry.to_version for entry in log.read_entries(Store(), "still")] == [4]
    pages_work(Store(), "/", "/models/still", "/models/still/4")
    found_by_doctor(repair=True)
    limbeck("models", "history", "still", "--adopt", "--reason", "somebody purged it")
    assert found_by_doctor() == {}


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
    assert "deleted for good" in found_by_doctor()["ledger of still"]
    assert "done: make a new one" in found_by_doctor(repair=True)["ledger of still"]
    history = limbeck("models", "history", "still", "--verify")
    assert f"entry 1 is anchored in the run {run_id}, the ledger in" in history.err
    assert limbeck("models", "history", "still", "--adopt", "--reason", "somebody purged it").code == 0
    assert limbeck("promote", "still/3").code == 0
    assert [entry.sequence for entry in log.read_entries(Store(), "still")] == [1, 2, 3]
    assert found_by_doctor() == {}


def test_a_purged_root_of_the_anchors_is_one_problem(promoted: Still, limbeck: Limbeck) -> None:
    store = promoted.store
    store.client.delete_run(store.client.get_experiment_by_name(anchor.EXPERIMENT).tags[anchor.ROOT_RUN_TAG])
    purge(store)
    works(limbeck)
    history = limbeck("models", "history", "still", "--verify", "--format", "json")
    assert len(json.loads(history.out)["problems"]) == 1
    assert "done: name it again" in found_by_doctor(repair=True)["ledger of still"]
    assert limbeck("models", "history", "still", "--verify").code == 0
    assert limbeck("promote", "still/3").code == 0


def test_a_renamed_model(promoted: Still, limbeck: Limbeck) -> None:
    promoted.store.client.rename_registered_model("still", "kettle")
    works(limbeck, "kettle")
    pages_work(promoted.store, "/", "/models/kettle", "/models/kettle/4")
    assert notes() == []
    repaired = found_by_doctor(repair=True)
    assert repaired["model kettle"] == "it was renamed from still; done: let lineages name kettle too"
    assert [promoted.store.get(f"kettle/{number}").parent for number in (2, 3)] == ["kettle/1", "kettle/2"]
    history = limbeck("models", "history", "kettle", "--verify")
    assert history.err.count("\n  ") == 2  # the entry is of still, and how to adopt that
    assert "entry 1 is of still, not of kettle" in history.err
    limbeck("models", "history", "kettle", "--adopt", "--reason", "renamed")
    assert limbeck("promote", "kettle/3").code == 0
    assert found_by_doctor() == {}


def test_doctor_copies_lost_files_from_a_version_that_has_the_same(
    promoted: Still, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, lost = promoted.store, promoted.student
    same = NewVersion(name="kettle", kind="student")
    store.register(same, store.artifacts.verified_folder(lost))
    shutil.rmtree(store.artifacts.verified_folder(lost))
    doctor = limbeck("doctor")
    assert (doctor.code, "its files are gone" in doctor.out) == (1, True)
    assert "still/2: copy the same files from kettle/1: limbeck doctor --repair" in doctor.err
    assert limbeck("doctor", "--repair").code == 0
    assert store.artifacts.verified_folder(lost).is_dir()
    origin = home()
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "copy"))
    shutil.copy(origin / "mlflow.db", home())  # without the files
    assert "of its folders are elsewhere" in found_by_doctor()["workspace"]
    found_by_doctor(repair=True)
    shutil.rmtree(origin)
    assert limbeck("doctor", "--deep").code == 0


def test_a_deleted_model_can_be_registered_again(promoted: Still, limbeck: Limbeck) -> None:
    store = promoted.store
    store.register(NewVersion(name="kettle", kind="student", parent="still/1"), Path(promoted.student.source))
    store.client.delete_registered_model("still")
    for command in (("models", "list"), ("models", "show", "kettle/1"), ("models", "lineage", "kettle/1")):
        assert limbeck(*command).code == 0
    pages_work(store, "/", "/models/kettle", "/models/kettle/1")
    assert found_by_doctor() == {}  # somebody may have wanted it
    kettle, still = notes()
    assert kettle.startswith("kettle/1: its parent still/1 was deleted")
    assert still.startswith("model still: 5 of its versions were deleted, and their files remain, such as")
    again = store.register(NewVersion(name="still", kind="teacher"), Path(promoted.teacher.source))
    assert (again.ref, again.digest) == ("still/1", promoted.teacher.digest)
    assert "4 of its versions were deleted" in notes()[0]
