"""Scorecards, parity reports and verdicts of a version, kept with it in MLflow.

A parity report or a verdict is a tag of the model version. A scorecard and its parquet of documents are artifacts of
an MLflow run; the tag that points at them is written last, so a scorecard that can be seen is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from limbeck.registry.core.digest import file_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, LimbeckError, Unreachable
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.terminal import print_status
from limbeck.registry.mlflow.client import Forbidden, NotFound, RetryingMlflowClient
from limbeck.registry.mlflow.runs import Run, Runs
from limbeck.registry.mlflow.versions import MODEL_ID_TAG, TAG_PREFIX
from limbeck.registry.records import Parity, Scorecard, Verdict, Version

LARGEST = 20_000_000  # bytes of a scorecard
PARITY_TAG = TAG_PREFIX + "parity"
SCORECARD_TAG_PREFIX, VERDICT_TAG_PREFIX = TAG_PREFIX + "scorecard.", TAG_PREFIX + "verdict."
# What a scorecard's tag holds. digest: of the record; file, documents: SHA-256 of its two files.
POINTER = {"digest": r"[0-9a-f]{64}", "run_id": r"[0-9a-f]{32}", "file": r"[0-9a-f]{64}", "documents": r"[0-9a-f]{64}"}
TagRecord = TypeVar("TagRecord", Parity, Verdict)


class MissingRecord(BadInput):
    """A record that a tag points at, whose run or file was deleted in MLflow for good."""


class VersionFindings(NamedTuple):
    """A version with its scorecards and verdicts, each newest last."""

    version: Version
    scorecards: list[Scorecard]
    verdicts: list[Verdict]


class Findings:
    """The scorecards, parity reports and verdicts of the versions in a tracking store."""

    def __init__(self, client: RetryingMlflowClient, runs: Runs) -> None:
        self._client = client
        self._runs = runs
        self._reported: set[str] = set()  # missing scorecards, each printed once

    def add_scorecard(self, version: Version, card: Scorecard, documents: Path) -> None:
        """Store a scorecard and its parquet of documents with the version, in an MLflow run of its own.

        Its numbers are logged as metrics of the run and of the version's LoggedModel. Idempotent.
        """
        digest = card.digest()
        key = f"{SCORECARD_TAG_PREFIX}{digest[:16]}"
        version_tags = self._read_tags(version)
        if key in version_tags:
            return
        with TemporaryDirectory() as temporary, self._start_run(version, card) as run:
            file = Path(temporary) / "scorecard.json"
            file.write_text(card.model_dump_json(indent=1))
            run.log_artifact(file)
            card_file_digest = file_digest(file)
            parquet = Path(temporary) / "documents.parquet"
            shutil.copyfile(documents, parquet)
            run.log_artifact(parquet)
            run.log_metrics(_metrics(card), model_id=self._logged_model(version_tags))
            with atomic_write(_cached_file(digest, file.name)) as part:  # this machine need not fetch it
                shutil.copyfile(file, part)
        pointer = {"digest": digest, "run_id": run.id, "file": card_file_digest, "documents": file_digest(documents)}
        self._write_tag(version, key, json.dumps(pointer))

    def scorecards(self, version: Version, tags: Mapping[str, str] | None = None) -> list[Scorecard]:
        """The scorecards of a version, newest last. Each is read from MLflow once, then from `home()`.

        One whose run was deleted for good is left out, and a line says so.

        Args:
            tags: of the version, if they were read already.

        Raises DamagedArtifact if one is not what was recorded.
        """
        cards, missing = self.scorecards_and_missing(version, tags)
        for problem in missing:
            if problem not in self._reported:
                self._reported.add(problem)
                print_status(problem)
        return cards

    def scorecards_and_missing(
        self, version: Version, tags: Mapping[str, str] | None = None
    ) -> tuple[list[Scorecard], list[str]]:
        """As `scorecards`, with a line for each scorecard that is missing instead of printing it."""
        tags = self._read_tags(version) if tags is None else tags
        cards, missing = [], []
        for pointer in _scorecard_pointers(version.ref, tags):
            label = f"the scorecard {pointer['digest'][:12]} of {version.ref}"
            try:
                path = self._fetch_file(pointer, "scorecard.json", pointer["file"], label)
                self._check_documents(pointer, label)
                cards.append(_read_scorecard(path))
            except MissingRecord as error:
                missing.append(error.message)
            except ValueError as error:
                raise DamagedArtifact(label, [f"it cannot be read: {error}"]) from None
        return sorted(cards, key=lambda card: card.created), missing

    def scorecard_runs(self, version: Version, tags: Mapping[str, str]) -> dict[str, str]:
        """Digest of a scorecard -> the run that its files are with."""
        return {pointer["digest"]: pointer["run_id"] for pointer in _scorecard_pointers(version.ref, tags)}

    def verify_stored_scorecards(self, version: Version, tags: Mapping[str, str]) -> None:
        """Fetch the files of all scorecards of a version, past the cache. Raises MissingRecord or DamagedArtifact."""
        for pointer in _scorecard_pointers(version.ref, tags):
            label = f"the scorecard {pointer['digest'][:12]} of {version.ref}"
            for file, field in (("scorecard.json", "file"), ("documents.parquet", "documents")):
                with TemporaryDirectory() as temporary:
                    self._download(pointer, file, pointer[field], Path(temporary), label)

    def restore_scorecard(self, version: Version, digest: str) -> bool:
        """Store a scorecard whose run was deleted again, from this machine's cache; False if it is not there."""
        (pointer,) = _scorecard_pointers(version.ref, self._read_tags(version), digest[:16])
        files = {_cached_file(digest, "scorecard.json"): "file", _cached_file(digest, "documents.parquet"): "documents"}
        if not all(file.exists() and file_digest(file) == pointer[field] for file, field in files.items()):
            return False
        card = _read_scorecard(next(iter(files)))
        with self._start_run(version, card) as run:
            for file in files:
                run.log_artifact(file)
            run.log_metrics(_metrics(card), model_id=self._logged_model(self._read_tags(version)))
        self._write_tag(version, f"{SCORECARD_TAG_PREFIX}{digest[:16]}", json.dumps(pointer | {"run_id": run.id}))
        return True

    def forget_scorecard(self, version: Version, digest: str) -> None:
        """Delete the tag that points at a scorecard."""
        key = f"{SCORECARD_TAG_PREFIX}{digest[:16]}"
        self._client.delete_model_version_tag(version.name, str(version.version), key)

    def documents(self, version: Version, card: Scorecard) -> Path:
        """The local parquet file of a scorecard's documents.

        Raises BadInput if the version has no such scorecard, MissingRecord if the file was deleted, DamagedArtifact if
        it is not what was recorded.
        """
        pointers = _scorecard_pointers(version.ref, self._read_tags(version), card.digest()[:16])
        if not pointers:
            raise BadInput(f"{version.ref} has no such scorecard", fix=f"limbeck eval {version.ref} --tasks ...")
        digest = pointers[0]["documents"]
        label = f"the documents of the scorecard {card.digest()[:12]} of {version.ref}"
        return self._fetch_file(pointers[0], "documents.parquet", digest, label)

    def add_parity(self, version: Version, parity: Parity) -> None:
        """Store how an ONNX variant compares with its PyTorch model; it replaces the report before."""
        self._write_tag(version, PARITY_TAG, parity.model_dump_json())

    def parity(self, version: Version, tags: Mapping[str, str] | None = None) -> Parity | None:
        """The parity report of a version, or None. `tags`: of the version, if they were read already."""
        tags = self._read_tags(version) if tags is None else tags
        value = tags.get(PARITY_TAG)
        return None if value is None else _parse_record(Parity, version.ref, PARITY_TAG, value)

    def add_verdict(self, version: Version, verdict: Verdict) -> Verdict:
        """Store a verdict. If the version has one that differs only in its time, that one is returned instead."""
        for existing in self.verdicts(version):
            if existing.content_digest == verdict.content_digest:
                return existing
        self._write_tag(version, f"{VERDICT_TAG_PREFIX}{verdict.digest()[:16]}", verdict.model_dump_json())
        return verdict

    def verdicts(self, version: Version, tags: Mapping[str, str] | None = None) -> list[Verdict]:
        """The verdicts on a version, newest last. Raises BadInput if one was changed.

        Args:
            tags: of the version, if they were read already.
        """
        tags = self._read_tags(version) if tags is None else tags
        verdicts = []
        for key, value in _tags_with_prefix(tags, VERDICT_TAG_PREFIX).items():
            verdict = _parse_record(Verdict, version.ref, key, value)
            if key != f"{VERDICT_TAG_PREFIX}{verdict.digest()[:16]}":
                raise _changed_tag_error(version.ref, key)
            verdicts.append(verdict)
        return sorted(verdicts, key=lambda verdict: verdict.created)

    def _read_tags(self, version: Version) -> dict[str, str]:
        return dict(self._client.get_model_version(version.name, str(version.version)).tags)

    def _write_tag(self, version: Version, key: str, value: str) -> None:
        self._client.set_model_version_tag(version.name, str(version.version), key, value)

    def _start_run(self, version: Version, card: Scorecard) -> AbstractContextManager[Run]:
        """A new run that holds the files of a scorecard."""
        about = {"version": version.ref, "digest": version.digest, "tasks": card.tasks_digest}
        return self._runs.start(
            f"score {version.ref}", tags={TAG_PREFIX + name: value for name, value in about.items()}
        )

    def _check_documents(self, pointer: dict[str, str], label: str) -> None:
        """Raise MissingRecord if the documents of a cached scorecard are gone from a workspace: it proves nothing then.

        A server is not asked, since that takes a request for each scorecard.
        """
        file = "documents.parquet"
        folder = self._runs.local_folder(pointer["run_id"])
        if folder is None or (folder / file).exists() or _cached_file(pointer["digest"], file).exists():
            return
        self._fetch_file(pointer, file, pointer["documents"], label)  # they may be elsewhere

    def _logged_model(self, version_tags: Mapping[str, str]) -> str | None:
        """The id of a version's LoggedModel; None if that was deleted, since MLflow takes no metrics for it then."""
        try:
            model_id = version_tags.get(MODEL_ID_TAG)
            return str(self._client.get_logged_model(model_id).model_id) if model_id else None
        except NotFound:
            return None

    def _fetch_file(self, pointer: dict[str, str], file: str, digest: str, label: str) -> Path:
        """An artifact of a scorecard's run, cached in `home()`; fetched again if the cached file was damaged.

        Raises MissingRecord if the run or the file was deleted.
        """
        cached = _cached_file(pointer["digest"], file)
        if cached.exists() and file_digest(cached) == digest:
            return cached
        with TemporaryDirectory() as temporary, atomic_write(cached) as part:
            shutil.copyfile(self._download(pointer, file, digest, Path(temporary), label), part)
        return cached

    def _download(self, pointer: dict[str, str], file: str, digest: str, folder: Path, label: str) -> Path:
        """Download a file of a scorecard's run into a folder, and compare it with its digest."""
        run_id = pointer["run_id"]
        try:
            uri = self._client.get_run(run_id).info.artifact_uri
        except NotFound:
            raise _missing_record(label, f"the MLflow run {run_id} was deleted") from None
        try:
            downloaded = self._client.download(f"{uri}/{file}", folder)
        except (Unreachable, Forbidden):
            raise
        except LimbeckError:
            if file in self._client.file_sizes(uri):
                raise
            raise _missing_record(label, f"the MLflow run {run_id} has no file {file}") from None
        if file_digest(downloaded) != digest:
            raise DamagedArtifact(label, [f"{uri}/{file} is not what was recorded"])
        return downloaded


def _missing_record(label: str, why: str) -> MissingRecord:
    return MissingRecord(
        f"{label} is missing: {why}", fix="restore it from a backup, or score the version again: limbeck eval"
    )


def _cached_file(digest: str, file: str) -> Path:
    return home() / "scorecards" / digest / file


def _tags_with_prefix(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {key: value for key, value in tags.items() if key.startswith(prefix)}


def _parse_record(record: type[TagRecord], ref: str, key: str, value: str) -> TagRecord:
    try:
        return record.model_validate_json(value)
    except ValidationError:
        raise _changed_tag_error(ref, key) from None


def _scorecard_pointers(ref: str, tags: Mapping[str, str], short_digest: str = "") -> list[dict[str, str]]:
    """Where the scorecards are: the contents of the tags whose digest begins with `short_digest`.

    A digest becomes the name of a folder, so each field is checked. Raises BadInput if a tag was changed.
    """
    pointers = []
    for key, value in _tags_with_prefix(tags, SCORECARD_TAG_PREFIX + short_digest).items():
        try:
            pointer: dict[str, str] = json.loads(value)
            is_valid = all(re.fullmatch(pattern, pointer[name]) for name, pattern in POINTER.items())
        except (ValueError, TypeError, KeyError, RecursionError):
            is_valid = False
        if not is_valid or key != f"{SCORECARD_TAG_PREFIX}{pointer['digest'][:16]}":
            raise _changed_tag_error(ref, key)
        pointers.append(pointer)
    return pointers


def _changed_tag_error(ref: str, key: str) -> BadInput:
    return BadInput(
        f"the tag {key} of {ref} is not as Limbeck wrote it: it was changed through MLflow itself",
        fix="undo the change in MLflow, or delete the tag there and run the command that wrote it again",
    )


def _read_scorecard(file: Path) -> Scorecard:
    """The scorecard in a file. Raises ValueError."""
    if (size := file.stat().st_size) > LARGEST:
        raise ValueError(f"it has {size:,} bytes, at most {LARGEST:,}")
    return Scorecard.model_validate_json(file.read_bytes())


def _metrics(card: Scorecard) -> dict[str, float]:
    """The numbers of a scorecard by the names that MLflow shows them under."""
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
