"""What is found out about a version, kept with it in MLflow: scorecards, parity, verdicts.

Small things are tags of the model version. A scorecard and its parquet of documents are artifacts of an
MLflow run; the tag that points at them is written last, so what can be seen is whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from limbeck.registry.core.digest import file_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.mlflow.client import RetryingMlflowClient
from limbeck.registry.mlflow.run import Run
from limbeck.registry.records import Parity, Scorecard, Verdict, Version

TAG_PREFIX = "limbeck."
LARGEST = 20_000_000  # bytes of a scorecard
POINTER = {"digest": r"[0-9a-f]{64}", "run_id": r"[0-9a-f]{32}", "file": r"[0-9a-f]{64}", "documents": r"[0-9a-f]{64}"}
Kept = TypeVar("Kept", Parity, Verdict)


class VersionFindings(NamedTuple):
    """A version and what was found out about it, each newest last."""

    version: Version
    scorecards: list[Scorecard]
    verdicts: list[Verdict]


class Findings:
    """The part of `limbeck.registry.mlflow.store.Store` that keeps scorecards, parity and verdicts."""

    client: RetryingMlflowClient
    run: Callable[..., AbstractContextManager[Run]]

    def add_scorecard(self, version: Version, card: Scorecard, documents: Path) -> None:
        """Keep a scorecard and its parquet of documents with the version, in an MLflow run of its own.

        Its numbers are logged as metrics of the run and of the version's LoggedModel. Idempotent.
        """
        digest = card.digest()
        key = f"{TAG_PREFIX}scorecard.{digest[:16]}"
        tags = self._read_tags(version)
        if key in tags:
            return
        about = {"version": version.ref, "digest": version.digest, "tasks": card.tasks_digest}
        named = {TAG_PREFIX + name: value for name, value in about.items()}
        with TemporaryDirectory() as temporary, self.run(f"score {version.ref}", tags=named) as run:
            file = Path(temporary) / "scorecard.json"
            file.write_text(card.model_dump_json(indent=1))
            run.log_artifact(file)
            written = file_digest(file)
            parquet = Path(temporary) / "documents.parquet"
            shutil.copyfile(documents, parquet)
            run.log_artifact(parquet)
            run.log_metrics(_metrics(card), model_id=tags.get(TAG_PREFIX + "model_id"))
            with atomic_write(_cached(digest, file.name)) as part:  # here nobody has to fetch it
                shutil.copyfile(file, part)
        pointer = {"digest": digest, "run_id": run.id, "file": written, "documents": file_digest(documents)}
        self._write_tag(version, key, json.dumps(pointer | {"created": card.created.isoformat()}))

    def scorecards(self, version: Version, tags: Mapping[str, str] | None = None) -> list[Scorecard]:
        """The scorecards of a version, newest last. Each is read from MLflow once, then from `home()`.

        Args:
            tags: of the version, where they are known.

        Raises DamagedArtifact where one is not what was recorded.
        """
        return self._load_scorecards(version, self._read_tags(version) if tags is None else tags)

    def _load_scorecards(self, version: Version, tags: Mapping[str, str]) -> list[Scorecard]:
        cards = []
        for key, value in _tags_with_prefix(tags, "scorecard.").items():
            pointer = _pointer(version.ref, key, value)
            # Scorecards of before have no digest of their file, but one of their fields.
            digest_of, digest = (
                (file_digest, pointer["file"]) if "file" in pointer else (_card_digest, pointer["digest"])
            )
            what = f"the scorecard of {version.ref}"
            path = self._fetch_file(pointer, "scorecard.json", digest_of, digest, what)
            try:
                cards.append(_read(path))
            except ValueError as error:
                raise DamagedArtifact(what, [f"it cannot be read: {error}"]) from None
        return sorted(cards, key=lambda card: card.created)

    def _to_findings(self, version: Version, tags: Mapping[str, str]) -> VersionFindings:
        return VersionFindings(version, self._load_scorecards(version, tags), _verdicts(version.ref, tags))

    def documents(self, version: Version, card: Scorecard) -> Path:
        """The local parquet file of a scorecard's documents.

        Raises BadInput where there is none, DamagedArtifact where it is not what was recorded.
        """
        for key, value in _tags_with_prefix(self._read_tags(version), f"scorecard.{card.digest()[:16]}").items():
            pointer = _pointer(version.ref, key, value)
            what = f"the documents of {version.ref}"
            return self._fetch_file(pointer, "documents.parquet", file_digest, pointer["documents"], what)
        raise BadInput(f"{version.ref} has no such scorecard", fix=f"limbeck eval {version.ref} --tasks ...")

    def add_parity(self, version: Version, parity: Parity) -> None:
        """Keep how an ONNX variant compares with its PyTorch model."""
        self._write_tag(version, TAG_PREFIX + "parity", parity.model_dump_json())

    def parity(self, version: Version, tags: Mapping[str, str] | None = None) -> Parity | None:
        """The parity kept for a version, or None. `tags`: of the version, where they are known."""
        tags = self._read_tags(version) if tags is None else tags
        value = tags.get(TAG_PREFIX + "parity")
        return None if value is None else _record(Parity, version.ref, TAG_PREFIX + "parity", value)

    def add_verdict(self, version: Version, verdict: Verdict) -> Verdict:
        """Keep a verdict. One that says the same as a kept one is not kept again: that one is given back."""
        for kept in self.verdicts(version):
            if kept == verdict.model_copy(update={"created": kept.created}):
                return kept
        self._write_tag(version, f"{TAG_PREFIX}verdict.{verdict.digest()[:16]}", verdict.model_dump_json())
        return verdict

    def verdicts(self, version: Version) -> list[Verdict]:
        """The verdicts on a version, newest last. Raises BadInput where one was changed."""
        return _verdicts(version.ref, self._read_tags(version))

    def _read_tags(self, version: Version) -> dict[str, str]:
        return dict(self.client.get_model_version(version.name, str(version.version)).tags)

    def _write_tag(self, version: Version, key: str, value: str) -> None:
        self.client.set_model_version_tag(version.name, str(version.version), key, value)

    def _fetch_file(
        self, pointer: dict[str, str], file: str, compute_digest: Callable[[Path], str], digest: str, label: str
    ) -> Path:
        """An artifact of a scorecard's run, kept in `home()`; fetched again where it was damaged there."""
        cached = _cached(pointer["digest"], file)
        if cached.exists() and compute_digest(cached) == digest:
            return cached
        uri = self.client.get_run(pointer["run_id"]).info.artifact_uri
        with TemporaryDirectory() as temporary, atomic_write(cached) as part:
            shutil.copyfile(self.client.download(f"{uri}/{file}", Path(temporary)), part)
            if compute_digest(part) != digest:
                raise DamagedArtifact(label, [f"{uri}/{file} is not what was recorded"])
        return cached


def _cached(digest: str, file: str) -> Path:
    return home() / "scorecards" / digest / file


def _tags_with_prefix(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key.startswith(TAG_PREFIX + prefix)}


def _verdicts(ref: str, tags: Mapping[str, str]) -> list[Verdict]:
    verdicts = []
    for key, value in _tags_with_prefix(tags, "verdict.").items():
        verdict = _record(Verdict, ref, key, value)
        if key != f"{TAG_PREFIX}verdict.{verdict.digest()[:16]}":
            raise _changed_tag_error(ref, key)
        verdicts.append(verdict)
    return sorted(verdicts, key=lambda verdict: verdict.created)


def _record(record: type[Kept], ref: str, key: str, value: str) -> Kept:
    try:
        return record.model_validate_json(value)
    except ValidationError:
        raise _changed_tag_error(ref, key) from None


def _pointer(ref: str, key: str, value: str) -> dict[str, str]:
    """Where a scorecard is. Its digest becomes the name of a folder, so it has to be one."""
    try:
        pointer: dict[str, str] = json.loads(value)
        sound = all(re.fullmatch(POINTER[name], pointer[name]) for name in POINTER if name in pointer or name != "file")
    except (ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound or key != f"{TAG_PREFIX}scorecard.{pointer['digest'][:16]}":
        raise _changed_tag_error(ref, key)
    return pointer


def _changed_tag_error(ref: str, key: str) -> BadInput:
    return BadInput(
        f"the tag {key} of {ref} is not as Limbeck wrote it: it was changed through MLflow itself",
        fix="put it right in MLflow, or delete it there and do again what it tells of",
    )


def _read(file: Path) -> Scorecard:
    """The scorecard in a file. Raises ValueError."""
    if (size := file.stat().st_size) > LARGEST:
        raise ValueError(f"it has {size:,} bytes, at most {LARGEST:,}")
    return Scorecard.model_validate_json(file.read_bytes())


def _card_digest(file: Path) -> str:
    """The digest of the scorecard in a file; "" where there is none."""
    try:
        return _read(file).digest()
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
    if card.contamination:
        values |= {f"contamination.{task}": overlap.share for task, overlap in card.contamination.tasks.items()}
    return {name: float(value) for name, value in values.items() if value is not None}
