"""A store that was written under another layout is refused with one line; an empty or foreign one is used."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home
from limbeck.registry.mlflow import layout
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import NewVersion
from tests.conftest import Result
from tests.registry.conftest import Still


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
