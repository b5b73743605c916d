"""The layout of what Limbeck keeps in MLflow: one number, a tag of the experiment `limbeck`.

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

SQLITE_MARK = """
SELECT t.value FROM experiment_tags t JOIN experiments e USING (experiment_id) WHERE e.name = ? AND t.key = ?
"""
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
        written_under = "another layout" if mark is None else f"layout {mark}"
        variable = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "LIMBECK_HOME"
        raise BadInput(
            f"{_describe_workspace(tracking_uri, file)} was written under {written_under} of Limbeck: "
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
            row = database.execute(SQLITE_MARK, (EXPERIMENT, LAYOUT_TAG)).fetchone()
            (has_versions,) = database.execute(SQLITE_HAS_VERSIONS, (DIGEST_TAG,)).fetchone()
            return row[0] if row else None, bool(has_versions)
    except sqlite3.Error:  # the first call of MLflow explains it
        return None, False


def _read_mlflow(client: RetryingMlflowClient) -> tuple[str | None, bool]:
    """As `_read_sqlite`; versions are searched for only if the mark is not the current one."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    mark = experiment.tags.get(LAYOUT_TAG) if experiment else None
    if mark == LAYOUT:
        return mark, True
    return mark, bool(client.search_model_versions(f"tags.`{DIGEST_TAG}` LIKE '%'", max_results=1))


def _describe_workspace(tracking_uri: str, file: Path | None) -> str:
    if file is None:
        return f"the tracking server {redact_urls(tracking_uri)}"
    return f"the workspace {file.parent if file.parent == home() else file}"
