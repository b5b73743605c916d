"""Find and store scorecards: those of registered versions in MLflow, those of folders below `home()`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as parquet

from limbeck.evals.tasks.task_set import TaskSet
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.digest import verify_files, write_manifest
from limbeck.registry.core.errors import DamagedArtifact
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.records import Scorecard

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store


class StoredScorecard(NamedTuple):
    """A scorecard and its parquet of documents."""

    card: Scorecard
    documents: Path
    registered: bool = False


def stored_scorecards(model: ResolvedModel, store: Store | None) -> Iterator[StoredScorecard]:
    """The stored scorecards of exactly these files: below `home()`, then in MLflow; each oldest first."""
    folders = (path for path in _local_folder(model).glob("*") if (path / "scorecard.json").exists())
    found = []
    for folder in folders:
        try:
            verify_files(folder)
            card = Scorecard.model_validate_json((folder / "scorecard.json").read_text())
        except (DamagedArtifact, ValueError):  # damaged: the model is scored again
            continue
        found.append(StoredScorecard(card, folder / "documents.parquet"))
    yield from sorted(found, key=lambda each: each.card.created)
    if store and model.version:
        for card in store.findings.scorecards(model.version):
            if card.artifact == model.digest:
                yield StoredScorecard(card, store.findings.documents(model.version, card), registered=True)


def newest_matching(stored: Sequence[StoredScorecard], tasks: TaskSet) -> StoredScorecard | None:
    """The newest scorecard on these tasks by this version of lm-eval."""
    fitting = [each for each in stored if (each.card.tasks_digest, each.card.harness) == (tasks.digest, tasks.harness)]
    return max(fitting, key=lambda each: each.card.created, default=None)


def store_scorecard(
    own: StoredScorecard, model: ResolvedModel, store: Store | None, stored: Sequence[StoredScorecard]
) -> StoredScorecard:
    """Store a scorecard and return it; if an equal one is among `stored`, return that one.

    A registered version's scorecard goes to `store`, any other below `home()`.
    """
    wanted = bool(store and model.version)
    for each in reversed(stored):
        if each.registered == wanted and each.card == own.card.model_copy(update={"created": each.card.created}):
            return each
    if store and model.version:
        store.findings.add_scorecard(model.version, own.card, own.documents)
        return own
    return store_locally(own.card, parquet.read_table(own.documents), model)


def store_locally(card: Scorecard, documents: pa.Table, model: ResolvedModel) -> StoredScorecard:
    """Store a scorecard and its documents below `home()`, in a folder of its digest."""
    folder = _local_folder(model) / card.digest()[:16]
    with atomic_write(folder) as part:
        part.mkdir()
        (part / "scorecard.json").write_text(card.model_dump_json(indent=1))
        parquet.write_table(documents, part / "documents.parquet")
        write_manifest(part)
    return StoredScorecard(card, folder / "documents.parquet")


def _local_folder(model: ResolvedModel) -> Path:
    return home() / "scorecards-local" / model.digest
