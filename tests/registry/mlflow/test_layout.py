"""A store that was written under another layout is refused with one line; an empty or foreign one is used."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home
from limbeck.registry.gate.promotion import promote
from limbeck.registry.mlflow import layout
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result
from tests.registry.conftest import POLICY, Still


def set_mark(mark: str | None) -> None:
    """Write another mark into MLflow's database, or remove it: stores without one were written before there was one."""
    with closing(sqlite3.connect(home() / "mlflow.db")) as database, database:
        for table in layout.TABLES_WITH_MARK:
            if mark is None:
                database.execute(f"DELETE FROM {table} WHERE key = ?", [layout.LAYOUT_TAG])
            else:
                database.execute(f"UPDATE {table} SET value = ? WHERE key = ?", [mark, layout.LAYOUT_TAG])


def mark_of(store: Store) -> str:
    return str(store.client.get_experiment_by_name(layout.EXPERIMENT).tags[layout.LAYOUT_TAG])


def test_a_new_store_is_marked(store: Store, make_folder: Callable[..., Path]) -> None:
    store.register(NewVersion(name="still", kind="teacher"), make_folder("a"))
    assert mark_of(store) == layout.LAYOUT
    assert [version.ref for version in Store().versions()] == ["still/1"]


@pytest.mark.parametrize(("mark", "written_under"), [(None, "another layout"), ("0", "layout 0")])
def test_versions_of_another_layout_are_refused(
    still: Still, limbeck: Callable[..., Result], mark: str | None, written_under: str
) -> None:
    set_mark(mark)
    line = f"the workspace {home()} was written under {written_under} of Limbeck: move it away, or set LIMBECK_HOME"
    with pytest.raises(BadInput, match=line):
        Store()
    for command in (
        ["models", "list"],
        ["models", "show", "still/1"],
        ["promote", "still/3"],
        ["leaderboard", "still"],
    ):
        result = limbeck(*command)
        assert (result.code, result.out) == (2, "")
        assert result.err == f"error: {line} to another, and run again\n"
    doctor = limbeck("doctor")
    assert doctor.code == 1
    assert line in doctor.out


def test_a_workspace_of_a_newer_limbeck_asks_for_an_update(still: Still) -> None:
    set_mark("99")
    with pytest.raises(BadInput, match=r"written by a newer Limbeck \(layout 99\): update Limbeck"):
        Store()


def test_a_database_elsewhere_is_named(
    still: Still, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_mark(None)
    database = (home() / "mlflow.db").rename(tmp_path / "team.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with pytest.raises(BadInput, match=f"the workspace {database} was written .* or set MLFLOW_TRACKING_URI"):
        Store()


def test_a_store_that_only_others_used_is_marked(store: Store, make_folder: Callable[..., Path]) -> None:
    """An experiment of the same name and versions of others are no reason to refuse it."""
    store.client.create_experiment(layout.EXPERIMENT)
    store.client.create_registered_model("foreign")
    store.client.create_model_version("foreign", "/tmp/nowhere", tags={"a": "b"})
    again = Store()
    again.register(NewVersion(name="still", kind="teacher"), make_folder("a"))
    assert mark_of(Store()) == layout.LAYOUT


def files_below(folder: Path) -> dict[str, int]:
    """Path -> time of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_copied_workspace_never_writes_into_its_origin(
    scored: Still, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    origin = home()
    monkeypatch.setenv("LIMBECK_HOME", str(shutil.copytree(origin, tmp_path / "copy")))
    before = files_below(origin)
    copy = Store()
    made = copy.register(NewVersion(name="still", kind="student"), make_folder("new"))
    scored.store = copy
    scored.score(made)
    promote(copy, "still/3", "production", POLICY)
    for version in copy.versions():
        assert copy.artifacts.verified_folder(version).is_relative_to(home())
    shutil.rmtree(home() / "scorecards")
    assert len(copy.findings.scorecards(made)) == len(copy.findings.scorecards(copy.get("still/4"))) == 1
    assert files_below(origin) == before


def test_a_moved_workspace_works(
    scored: Still, limbeck: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LIMBECK_HOME", str(home().rename(tmp_path / "moved")))
    first = limbeck("models", "show", "still/4")
    assert (first.code, first.err.count("recorded paths follow it")) == (0, 1)
    assert limbeck("models", "show", "still/4").err == ""
    assert limbeck("doctor", "--deep").code == 0


def test_a_copied_database_reads_the_files_of_its_origin(
    scored: Still, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    origin = home()
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path / "copy"))
    shutil.copy(origin / "mlflow.db", home())
    before = files_below(origin)
    copy = Store()
    made = copy.register(NewVersion(name="still", kind="student"), make_folder("new"))
    assert copy.artifacts.verified_folder(made).is_relative_to(home())
    assert copy.artifacts.verified_folder(copy.get("still/1")).is_relative_to(origin)
    assert files_below(origin) == before


@pytest.mark.parametrize(("revision", "line"), [("f" * 12, "by a newer MLflow than"), ("451aebb31d03", "by an older")])
def test_a_database_of_another_mlflow_is_refused_in_one_line(
    still: Still, limbeck: Callable[..., Result], revision: str, line: str
) -> None:
    with closing(sqlite3.connect(home() / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = ?", [revision])
    result = limbeck("models", "list")
    assert (result.code, result.out) == (2, "")
    error, fix = result.err.splitlines()
    assert line in error
    assert fix.startswith("  ")
    doctor = limbeck("doctor")
    assert (doctor.code, line in doctor.out) == (1, True)


def test_a_database_whose_files_are_elsewhere_on_purpose_stays_as_it_is(
    store: Store, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "disk" / "artifacts"
    store.client.create_experiment(layout.EXPERIMENT, artifact_location=str(elsewhere))
    made = Store().register(NewVersion(name="still", kind="teacher"), make_folder("a"))
    assert Store().artifacts.verified_folder(made).is_relative_to(elsewhere)
    assert layout.paths_outside_workspace(store.tracking_uri) == []
