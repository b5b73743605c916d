"""The layout of what Limbeck keeps in MLflow, and the place of a workspace.

The layout is one number, a tag of the experiment `limbeck` and of each version.
Change LAYOUT if code no longer reads what was written before. A store of another layout is refused as a whole, so
no other code has to read older tags or records.

MLflow records absolute paths. A workspace is a SQLite file and the folder `artifacts` beside it. One that was moved or
copied gets the paths of its own folder on first use, so nothing is ever written into the one it came from. Its
experiments have that folder as a tag, so a database whose files somebody keeps elsewhere on purpose stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
from collections.abc import Iterable, Set
from contextlib import closing
from pathlib import Path
from typing import Any

from limbeck.registry.core.errors import BadInput, redact_urls
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.mlflow.client import RetryingMlflowClient, artifact_location, call_with_retries, sqlite_file
from limbeck.registry.mlflow.versions import TAG_PREFIX

LAYOUT = "1"
LAYOUT_TAG = TAG_PREFIX + "layout"
CURRENT_MARK = {LAYOUT_TAG: LAYOUT}
PLACE_TAG = TAG_PREFIX + "place"  # of an experiment of a workspace: the folder of its files, as MLflow recorded it
EXPERIMENT = "limbeck"
DIGEST_TAG = TAG_PREFIX + "digest"  # every version that Limbeck registered has it

# The experiment may have been renamed, or deleted for good.
TABLES_WITH_MARK = ("experiment_tags", "model_version_tags")
SQLITE_MARKS = [f"SELECT value FROM {table} WHERE key = ? LIMIT 1" for table in TABLES_WITH_MARK]
PATHS_OF_FILES = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
PATH_OF_FILES = re.compile(r"(?P<place>/.*/artifacts)/(?P<rest>(models/m-\w+|[0-9a-f]{32})/artifacts)")
SQLITE_HAS_VERSIONS = "SELECT EXISTS (SELECT 1 FROM model_version_tags WHERE key = ?)"


def check_layout(client: RetryingMlflowClient, tracking_uri: str) -> None:
    """Raise BadInput if a store holds versions that were registered under another layout.

    A SQLite file is read directly, since importing MLflow takes over a second.
    """
    file = sqlite_file(tracking_uri)
    if file:
        mark, has_versions = _read_sqlite(file)
    else:
        mark, has_versions = _read_mlflow(client)
    if has_versions:
        check_layout_number(mark, _describe_workspace(tracking_uri, file))


def check_layout_number(mark: str | None, subject: str) -> None:
    """Raise BadInput if something was not written under the current layout; None: it has no mark.

    Args:
        subject: what was written, for the message.
    """
    if mark == LAYOUT:
        return
    if mark is not None and mark.isdecimal() and int(mark) > int(LAYOUT):
        raise BadInput(f"{subject} was written by a newer Limbeck (layout {mark}): update Limbeck and run again")
    written_under = "another layout" if mark is None else f"layout {mark}"
    variable = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "LIMBECK_HOME"
    raise BadInput(
        f"{subject} was written under {written_under} of Limbeck: "
        f"move it away, or set {variable} to another, and run again"
    )


def relocate_workspace(tracking_uri: str) -> int:
    """Make a moved or copied workspace record the paths of its own folder; does nothing for any other store.

    The path of a file stays if the file exists only there, as after a copy of the database alone. What is made later
    goes into the folder of this workspace in any case.

    Returns the number of changed paths of runs, models and versions. Raises Locked.
    """
    file = sqlite_file(tracking_uri)
    return _relocate(tracking_uri, file, _recorded_places(file)) if file else 0


def place_tag(location: str | None) -> dict[str, str]:
    """The tag of an experiment whose files a workspace keeps in `location`; none for a server, which decides itself."""
    return {PLACE_TAG: location} if location else {}


def paths_outside_workspace(tracking_uri: str) -> list[Path]:
    """The folders of runs and versions that exist elsewhere, of a SQLite store; none for any other."""
    file = sqlite_file(tracking_uri)
    if file is None or not _recorded_places(file):
        return []
    recorded = {path for place in PATHS_OF_FILES for path in _read_column(file, *place)}
    inside = f"{artifact_location(tracking_uri)}/"
    outside = {Path(path) for path in recorded if PATH_OF_FILES.fullmatch(path) and not path.startswith(inside)}
    return sorted(path for path in outside if path.is_dir())


def bring_into_workspace(tracking_uri: str, paths: Iterable[Path]) -> None:
    """Copy folders that `paths_outside_workspace` found into the workspace, and record their new paths."""
    file = sqlite_file(tracking_uri)
    former = set()
    for path in paths:
        match = PATH_OF_FILES.fullmatch(str(path))
        if file is None or match is None:
            continue
        former.add(match["place"])
        if not (target := file.parent / "artifacts" / match["rest"]).exists():
            with atomic_write(target) as part:
                shutil.copytree(path, part)
    if file is not None:
        _relocate(tracking_uri, file, former)


def _recorded_places(file: Path) -> set[str]:
    """The folder of a workspace's files when its database was last used; empty if it is no workspace."""
    return set(_read_column(file, "experiment_tags", "value", f"key = '{PLACE_TAG}'"))


def _read_column(file: Path, table: str, column: str, condition: str = "TRUE") -> list[str]:
    """The texts in a column; none if there is no such table: the first call of MLflow explains it."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as database:
            return [str(row[0]) for row in database.execute(f"SELECT DISTINCT {column} FROM {table} WHERE {condition}")]
    except sqlite3.Error:
        return []


def _relocate(tracking_uri: str, file: Path, former: Set[str]) -> int:
    """Replace the folders `former` in all recorded paths by that of this workspace."""
    folder = str(file.parent / "artifacts")
    former = former - {folder}

    def path_here(path: str) -> str:
        place = next((each for each in former if f"{path}/".startswith(f"{each}/")), None)
        return path if place is None else folder + path[len(place) :]

    def path_of_files(path: str) -> str:
        here = path_here(path)
        return path if os.path.exists(path) and not os.path.exists(here) else here

    def update() -> int:
        changed = 0
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=20)) as database, database:
            database.create_function("path_here", 1, path_here)
            database.create_function("path_of_files", 1, path_of_files)
            database.execute("BEGIN IMMEDIATE")
            database.execute("UPDATE experiments SET artifact_location = path_here(artifact_location)")
            database.execute("UPDATE experiment_tags SET value = ? WHERE key = ?", [folder, PLACE_TAG])
            for table, column in PATHS_OF_FILES:
                moved = f"{column} IS NOT NULL AND path_of_files({column}) != {column}"
                query = f"UPDATE {table} SET {column} = path_of_files({column}) WHERE {moved}"
                changed += database.execute(query).rowcount
        return changed

    if not former or not os.access(file, os.W_OK):  # nothing is written into a database that only can be read
        return 0
    return call_with_retries(tracking_uri, update)


def write_mark(client: RetryingMlflowClient, experiment: Any) -> None:
    """Write the current layout on an existing experiment that has another mark or none; it holds no versions."""
    if experiment.tags.get(LAYOUT_TAG) != LAYOUT:
        client.set_experiment_tag(experiment.experiment_id, LAYOUT_TAG, LAYOUT)


def _read_sqlite(file: Path) -> tuple[str | None, bool]:
    """The mark, and whether there are versions of Limbeck; (None, False) if the file does not have MLflow's tables."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=20)) as database:
            marks = (database.execute(query, (LAYOUT_TAG,)).fetchone() for query in SQLITE_MARKS)
            mark = next((row[0] for row in marks if row), None)
            (has_versions,) = database.execute(SQLITE_HAS_VERSIONS, (DIGEST_TAG,)).fetchone()
            return mark, bool(has_versions)
    except sqlite3.Error:  # the first call of MLflow explains it
        return None, False


def _read_mlflow(client: RetryingMlflowClient) -> tuple[str | None, bool]:
    """As `_read_sqlite`; versions are searched for only if the mark is not the current one.

    Each version has the mark too, for when the experiment was renamed or deleted for good.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    mark = experiment.tags.get(LAYOUT_TAG) if experiment else None
    if mark == LAYOUT:
        return mark, True
    versions = client.search_model_versions(f"tags.`{DIGEST_TAG}` LIKE '%'", max_results=1)
    if mark is None and versions:
        mark = versions[0].tags.get(LAYOUT_TAG)
    return mark, bool(versions)


def _describe_workspace(tracking_uri: str, file: Path | None) -> str:
    if file is None:
        return f"the tracking server {redact_urls(tracking_uri)}"
    return f"the workspace {file.parent if file.parent == home() else file}"
