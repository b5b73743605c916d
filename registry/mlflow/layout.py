"""The layout of what Limbeck keeps in MLflow: one number, a tag of the experiment `limbeck` and of each version.

Change LAYOUT if code no longer reads what was written before. A store of another layout is refused as a whole, so
no other code has to read older tags or records.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from limbeck.registry.core.errors import BadInput, redact_urls
from limbeck.registry.core.home import home
from limbeck.registry.mlflow.client import RetryingMlflowClient, sqlite_file
from limbeck.registry.mlflow.versions import TAG_PREFIX

LAYOUT = "1"
LAYOUT_TAG = TAG_PREFIX + "layout"
CURRENT_MARK = {LAYOUT_TAG: LAYOUT}
EXPERIMENT = "limbeck"
DIGEST_TAG = TAG_PREFIX + "digest"  # every version that Limbeck registered has it

# The experiment may have been renamed, or deleted for good.
TABLES_WITH_MARK = ("experiment_tags", "model_version_tags")
SQLITE_MARKS = [f"SELECT value FROM {table} WHERE key = ? LIMIT 1" for table in TABLES_WITH_MARK]
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
    if has_versions and mark != LAYOUT:
        workspace = _describe_workspace(tracking_uri, file)
        if mark is not None and mark.isdecimal() and int(mark) > int(LAYOUT):
            raise BadInput(f"{workspace} was written by a newer Limbeck (layout {mark}): update Limbeck and run again")
        written_under = "another layout" if mark is None else f"layout {mark}"
        variable = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "LIMBECK_HOME"
        raise BadInput(
            f"{workspace} was written under {written_under} of Limbeck: "
            f"move it away, or set {variable} to another, and run again"
        )


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
