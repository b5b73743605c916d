"""What is found out about a version, kept with it in MLflow: scorecards, parity, verdicts.

Small things are tags of the model version. A scorecard and its parquet of documents are artifacts of an
MLflow run; the tag that points at them is written last, so what can be seen is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from registry.connection import Client
from registry.digest import file_digest
from registry.errors import BadInput, DamagedArtifact
from registry.home import home, written_whole
from registry.records import Parity, Scorecard, Verdict, Version
from registry.run import Run

TAG = "limbeck."


class Findings:
    """The part of `registry.store.Store` that keeps scorecards, parity and verdicts."""

    client: Client
    run: Callable[..., AbstractContextManager[Run]]

    def add_scorecard(self, version: Version, card: Scorecard, documents: Path) -> None:
        """Keep a scorecard and its parquet of documents with the version, in an MLflow run of its own.

        Its numbers are logged as metrics of the run and of the version's LoggedModel. Idempotent.
        """
        digest = card.digest()
        key = f"{TAG}scorecard.{digest[:16]}"
        tags = self._tags(version)
        if key in tags:
            return
        about = {"version": version.ref, "digest": version.digest, "tasks": card.tasks_digest}
        named = {TAG + name: value for name, value in about.items()}
        with TemporaryDirectory() as temporary, self.run(f"score {version.ref}", tags=named) as run:
            file = Path(temporary) / "scorecard.json"
            file.write_text(card.model_dump_json(indent=1))
            run.artifact(file)
            parquet = Path(temporary) / "documents.parquet"
            shutil.copyfile(documents, parquet)
            run.artifact(parquet)
            run.metrics(_metrics(card), model_id=tags.get(TAG + "model_id"))
        pointer = {"digest": digest, "run_id": run.id, "documents": file_digest(documents)}
        self._tag(version, key, json.dumps(pointer | {"created": card.created.isoformat()}))

    def scorecards(self, version: Version) -> list[Scorecard]:
        """The scorecards of a version, newest last. Each is read from MLflow once, then from `home()`.

        Raises DamagedArtifact where one is not what was recorded.
        """
        cards = []
        for value in self._tagged(version, "scorecard."):
            pointer = json.loads(value)
            what = f"the scorecard of {version.ref}"
            path = self._fetched(pointer, "scorecard.json", _card_digest, pointer["digest"], what)
            cards.append(Scorecard.model_validate_json(path.read_text()))
        return sorted(cards, key=lambda card: card.created)

    def documents(self, version: Version, card: Scorecard) -> Path:
        """The local parquet file of a scorecard's documents.

        Raises BadInput where there is none, DamagedArtifact where it is not what was recorded.
        """
        for value in self._tagged(version, f"scorecard.{card.digest()[:16]}"):
            pointer = json.loads(value)
            what = f"the documents of {version.ref}"
            return self._fetched(pointer, "documents.parquet", file_digest, pointer["documents"], what)
        raise BadInput(f"{version.ref} has no such scorecard", fix=f"limbeck eval {version.ref} --tasks ...")

    def add_parity(self, version: Version, parity: Parity) -> None:
        """Keep how an ONNX variant compares with its PyTorch model."""
        self._tag(version, TAG + "parity", parity.model_dump_json())

    def parity(self, version: Version) -> Parity | None:
        """The parity kept for a version, or None."""
        return next((Parity.model_validate_json(v) for v in self._tagged(version, "parity")), None)

    def add_verdict(self, version: Version, verdict: Verdict) -> Verdict:
        """Keep a verdict. One that says the same as a kept one is not kept again: that one is given back."""
        for kept in self.verdicts(version):
            if kept == verdict.model_copy(update={"created": kept.created}):
                return kept
        self._tag(version, f"{TAG}verdict.{verdict.digest()[:16]}", verdict.model_dump_json())
        return verdict

    def verdicts(self, version: Version) -> list[Verdict]:
        """The verdicts on a version, newest last."""
        verdicts = [Verdict.model_validate_json(value) for value in self._tagged(version, "verdict.")]
        return sorted(verdicts, key=lambda verdict: verdict.created)

    def _tags(self, version: Version) -> dict[str, str]:
        return dict(self.client.get_model_version(version.name, str(version.version)).tags)

    def _tagged(self, version: Version, prefix: str) -> list[str]:
        return [value for key, value in self._tags(version).items() if key.startswith(TAG + prefix)]

    def _tag(self, version: Version, key: str, value: str) -> None:
        self.client.set_model_version_tag(version.name, str(version.version), key, value)

    def _fetched(
        self, pointer: dict[str, str], file: str, digest_of: Callable[[Path], str], digest: str, what: str
    ) -> Path:
        """An artifact of a scorecard's run, kept in `home()`; fetched again where it was damaged there."""
        cached = home() / "scorecards" / pointer["digest"] / file
        if cached.exists() and digest_of(cached) == digest:
            return cached
        uri = self.client.get_run(pointer["run_id"]).info.artifact_uri
        with TemporaryDirectory() as temporary, written_whole(cached) as part:
            shutil.copyfile(self.client.download(f"{uri}/{file}", Path(temporary)), part)
            if digest_of(part) != digest:
                raise DamagedArtifact(what, [f"{uri}/{file} is not what was recorded"])
        return cached


def _card_digest(file: Path) -> str:
    """The digest of the scorecard in a file; "" where there is none."""
    try:
        return Scorecard.model_validate_json(file.read_text()).digest()
    except ValueError:
        return ""


def _metrics(card: Scorecard) -> dict[str, float]:
    """A scorecard's numbers, as MLflow shows them."""
    values: dict[str, Any] = {f"{task}.{result.metric}": result.value for task, result in card.tasks.items()}
    if card.cost:
        values |= {f"cost.{k}": v for k, v in card.cost.model_dump().items() if isinstance(v, int | float)}
    if relative := card.relative:
        if relative.retention:
            values |= {f"retention.{k}": v for k, v in relative.retention.model_dump().items() if k != "confidence"}
        values |= {"cost_ratio": relative.cost_ratio, "speedup": relative.speedup}
    return {name: float(value) for name, value in values.items() if value is not None}
