"""What MLflow keeps for Limbeck: runs, registered versions with their files, scorecards, parity and verdicts.

A version's files are the artifacts of an MLflow LoggedModel; its fields are tags `limbeck.*` of the model
version. The tag, or the version, is always written last: what can be seen is whole and was verified.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from limbeck.registry.core.digest import verify_files
from limbeck.registry.core.errors import BadInput, DamagedArtifact, Unreachable
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.home import tracking_uri as default_uri
from limbeck.registry.mlflow import client, identity, transfer
from limbeck.registry.mlflow.client import AlreadyExists, Locked
from limbeck.registry.mlflow.filters import Condition, parse_filter
from limbeck.registry.mlflow.findings import TAG_PREFIX, Findings, VersionFindings
from limbeck.registry.mlflow.listing import ListedVersion, describe_read_error, list_versions, read_aliases
from limbeck.registry.mlflow.run import Run, mlflow_key
from limbeck.registry.records import NewVersion, TrainingCost, Version

EXPERIMENT = "limbeck"
TRAINING_COST_TAG = TAG_PREFIX + "making"  # a tag of the run that made a version
PARENT = "mlflow.parentRunId"
FIELDS = set(Version.model_fields) - {"name", "version", "source", "created", "run_id", "aliases"}
NAME = re.compile(r"[^\W_][\w.-]{0,199}")
LOCAL_ARTIFACTS_PATTERN = re.compile(r".*/models/m-\w+/artifacts")  # the local folder of a LoggedModel
DIGEST = re.compile(r"[0-9a-f]{64}")
REF = re.compile(r"(?:models:/+)?(?P<name>[^/@]+)(?:/(?P<version>\d{1,9})|@(?P<alias>[^/@]+))")


class Store(Findings):
    """MLflow's tracking store and model registry, as Limbeck uses them.

    Args:
        tracking_uri: MLflow's address; `limbeck.registry.core.home.tracking_uri()` where it is None.

    Raises:
        Unreachable: a server that does not answer, within about five seconds.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri or default_uri()
        self.is_server = client.is_server(self.tracking_uri)
        self.client = client.connect(self.tracking_uri)
        self._experiments: dict[str, str] = {}

    # --- runs

    @contextmanager
    def run(
        self,
        name: str,
        *,
        experiment: str = EXPERIMENT,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> Iterator[Run]:
        """An MLflow run: FINISHED when the block ends well, KILLED by Ctrl-C, FAILED by any other error.

        Args:
            parent: the id of the run that it is shown below.
        """
        made = self.client.create_run(
            self._experiment_id(experiment),
            run_name=name,
            tags={mlflow_key(k): str(v) for k, v in (tags or {}).items()} | ({PARENT: parent} if parent else {}),
        )
        with self._finish_run(Run(self.client, made.info.run_id)) as run:
            run.log_params(params or {})
            yield run

    @contextmanager
    def parent_run(self, name: str, digest: str) -> Iterator[Run]:
        """The MLflow run that the runs of one sweep are shown below: as `run`, but one that did not finish goes on.

        Args:
            digest: of all that the sweep makes.
        """
        tag, experiment = TAG_PREFIX + "sweep", self._experiment_id(EXPERIMENT)
        asked = f"tags.`{tag}` = '{digest}' and attributes.status != 'FINISHED'"
        if found := self.client.search_runs([experiment], asked, max_results=1):
            run = Run(self.client, found[0].info.run_id)
            self.client.update_run(run.id, status="RUNNING")
        else:
            run = Run(self.client, self.client.create_run(experiment, run_name=name, tags={tag: digest}).info.run_id)
        with self._finish_run(run):
            yield run

    @contextmanager
    def _finish_run(self, run: Run) -> Iterator[Run]:
        """Sets the status of a run at the end of the block."""
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            self.client.set_terminated(run.id, status=status)

    def _experiment_id(self, name: str) -> str:
        """The id of the experiment, made if it is missing; artifacts of a local one lie in `home()`."""
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is None:
                where = None if self.is_server else str(home() / "artifacts")
                try:
                    self._experiments[name] = self.client.create_experiment(name, artifact_location=where)
                    return self._experiments[name]
                except AlreadyExists:  # another process was quicker
                    found = self.client.get_experiment_by_name(name)
            if found.lifecycle_stage != "active":
                raise BadInput(
                    f"the MLflow experiment {name!r} of {self.tracking_uri} is deleted",
                    fix=f"mlflow experiments restore --experiment-id {found.experiment_id}",
                )
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    # --- versions

    def register(self, new: NewVersion, folder: Path, *, extra_tags: Mapping[str, Any] | None = None) -> Version:
        """Store the files of `folder` as a version of the model `new.name`.

        Idempotent: if the model has a version with the same digest, parent and recipe, nothing is stored and that
        version is returned. A new version appears only after its files are stored and their digest is verified.

        Args:
            new: what its maker states. The registry assigns the rest: version number, digest, source, time, author.
            folder: the files; compared with their manifest first, if the folder has one.
            extra_tags: further MLflow tags of the version.

        Raises:
            BadInput: the name cannot be used, or the folder is empty or missing.
            DamagedArtifact: the files differ from the manifest, or changed on the way.
        """
        folder = Path(folder)
        if not NAME.fullmatch(new.name):
            raise BadInput(
                f"{new.name!r} is not a name for a model", fix="use letters, digits, dots, dashes and underscores"
            )
        if not folder.is_dir() or not any(folder.iterdir()):
            raise BadInput(f"{folder}: {'an empty folder' if folder.is_dir() else 'no such folder'}")
        digest = verify_files(folder)
        wanted = Version(
            **dict(new),
            digest=digest,
            author=identity.current_user(self.tracking_uri),
            version=0,  # MLflow assigns the number, the source and the time
            source="",
            created=datetime.now(UTC),
        )
        with self.lock(f"register-{new.name}"):
            same = {"digest": digest, **new.model_dump(include={"parent", "recipe", "recipe_digest"})}
            if existing := self.find_version(new.name, **same):
                return existing
            return self._store_files(wanted, folder, extra_tags or {})

    def _store_files(self, wanted: Version, folder: Path, extra_tags: Mapping[str, Any]) -> Version:
        values = {field: getattr(wanted, field) for field in sorted(FIELDS)}
        tags = {TAG_PREFIX + field: str(value) for field, value in values.items() if value is not None}
        model = transfer.begin_upload(self.client, self._experiment_id(EXPERIMENT), wanted, tags)
        try:
            self._upload_verified(folder, model.artifact_location, wanted)
            self.client.finalize_logged_model(model.model_id, "READY")
            with suppress(AlreadyExists):
                self.client.create_registered_model(wanted.name)
            made = self._create_model_version(
                wanted, model, tags | {mlflow_key(k): str(v) for k, v in extra_tags.items()}
            )
        except (Unreachable, KeyboardInterrupt):  # the same command goes on with it
            raise
        except BaseException:  # nobody sees it, so that it matters little where it stays
            with suppress(Exception):
                transfer.discard_upload(self.client, model.model_id, model.artifact_location)
            raise
        return _version(made)

    def unfinished_uploads(self) -> list[transfer.UnfinishedUpload]:
        """The uploads that never became a version and that nobody went on with for a day."""
        found = self.client.get_experiment_by_name(EXPERIMENT)
        models = {
            each.tags[TAG_PREFIX + "model_id"]
            for each in self._list_tagged_versions(None)
            if TAG_PREFIX + "model_id" in each.tags
        }
        return transfer.unfinished_uploads(self.client, [found.experiment_id] if found else [], models)

    def _create_model_version(self, wanted: Version, model: Any, tags: Mapping[str, str]) -> Any:
        """The model version of a LoggedModel whose files are there, made once."""

        def make() -> Any:
            return self.client.create_model_version(
                wanted.name,
                model.artifact_location,
                run_id=wanted.run_id,
                tags={**tags, TAG_PREFIX + "model_id": model.model_id},
                # A server checks the source against it; a database would look it up in the wrong store.
                model_id=model.model_id if self.is_server else None,
            )

        try:
            return make()
        except (Unreachable, Locked):
            made = (
                each
                for each in self._list_tagged_versions(wanted.name)
                if each.tags.get(TAG_PREFIX + "model_id") == model.model_id
            )
            return next(made, None) or make()

    def _upload_verified(self, folder: Path, uri: str, wanted: Version) -> None:
        """Send the files of a version and read them back; once more where they arrived changed."""
        what = f"{wanted.name} {wanted.precision}"
        transfer.upload_folder(self.client, folder, uri, what)
        try:
            self._verified_files(uri, wanted.digest, what, fresh=True)
        except DamagedArtifact:
            transfer.upload_folder(self.client, folder, uri, what, resend_all=True)
            self._verified_files(uri, wanted.digest, what, fresh=True)

    def get(self, ref: str) -> Version:
        """The version that `NAME/VERSION`, `NAME@ALIAS` or a `models:/` URI of these means.

        Raises BadInput, with near names, where there is none.
        """
        return _version(self._mlflow_version(ref))

    def _mlflow_version(self, ref: str) -> Any:
        match = REF.fullmatch(ref.strip())
        if match is None:
            raise BadInput(f"{ref!r} is no version", fix="write NAME/VERSION or NAME@ALIAS")
        name, number, alias = match["name"], match["version"], match["alias"]
        try:
            if number:
                return self.client.get_model_version(name, number)
            return self.client.get_model_version_by_alias(name, alias)
        except BadInput:
            raise self.not_found_error(name, number, alias) from None

    def not_found_error(self, name: str, number: str | None = None, alias: str | None = None) -> BadInput:
        """The error for a name, version or alias that is not there, with the near ones."""
        versions = self.versions(name) if NAME.fullmatch(name) else []
        if not versions:
            names = self.model_names()
            near = get_close_matches(name, names, n=1)
            known = f"registered are: {', '.join(names)}" if names else "nothing is registered yet"
            return BadInput(f"no model is registered as {name!r}", fix=f"did you mean {near[0]}?" if near else known)
        if number:
            return BadInput(
                f"{name} has no version {number}",
                fix=f"it has {', '.join(str(v.version) for v in versions)}",
            )
        aliases = list(self.aliases(name))
        return BadInput(
            f"{name} has no alias {alias!r}",
            fix=f"it has {', '.join(aliases)}" if aliases else f"give it one: limbeck promote {name} --alias {alias}",
        )

    def versions(self, name: str | None = None, filter_string: str = "") -> list[Version]:
        """All versions that Limbeck registered, by name and oldest first.

        Args:
            name: of this registered model alone.
            filter_string: in MLflow's language, such as "tags.`limbeck.precision` = 'int8'".

        Those whose tags cannot be read are left out; `listing` has them too.
        """
        return _readable(self._list_tagged_versions(name, parse_filter(filter_string)))

    def versions_or_errors(
        self, name: str | None = None, conditions: Sequence[Condition] = (), metrics: Iterable[str] = ()
    ) -> list[tuple[ListedVersion, Version | BadInput]]:
        """As `versions`, each with what MLflow has of it, and with the error instead where its tags cannot be read.

        Args:
            conditions: that all hold of them.
            metrics: to give besides those that the conditions are about.
        """
        return [(each, _version_or_error(each)) for each in self._list_tagged_versions(name, conditions, metrics)]

    def _list_tagged_versions(
        self, name: str | None, conditions: Sequence[Condition] = (), metrics: Iterable[str] = ()
    ) -> list[ListedVersion]:
        if name is not None and not NAME.fullmatch(name):
            return []
        found = list_versions(self.client, self.tracking_uri, name, conditions, metrics)
        return [each for each in found if TAG_PREFIX + "digest" in each.tags]

    def findings(self, name: str) -> list[VersionFindings]:
        """The versions of `name`, oldest first, each with its scorecards and verdicts; all in one query."""
        listing = ((each.tags, _version_or_error(each)) for each in self._list_tagged_versions(name))
        return [self._to_findings(version, tags) for tags, version in listing if isinstance(version, Version)]

    def tags(self, versions: Sequence[Version]) -> dict[str, Mapping[str, str]]:
        """NAME/VERSION -> the tags that MLflow has of it, for versions of one name; of several in one query."""
        if len(versions) == 1:
            return {versions[0].ref: self._read_tags(versions[0])}
        there = {each.version: each.tags for each in self._list_tagged_versions(versions[0].name)} if versions else {}
        return {version.ref: there.get(version.version) or self._read_tags(version) for version in versions}

    def model_names(self) -> list[str]:
        """The registered models that have versions of Limbeck's."""
        return sorted({version.name for version in self.versions()})

    def find_version(self, name: str, **fields: Any) -> Version | None:
        """The newest version of `name` whose fields are all as given, or None."""
        for version in reversed(self.versions(name)):
            if all(getattr(version, field) == value for field, value in fields.items()):
                return version
        return None

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version number, of a registered model; empty where there is no such model."""
        return read_aliases(self.client, name)

    def training_cost(self, version: Version) -> TrainingCost | None:
        """What making a version took; of an ONNX variant, what its student took. None where it is not recorded."""
        if version.run_id is None:
            return None
        found = self.client.get_run(version.run_id).data.tags.get(TRAINING_COST_TAG)
        return TrainingCost.model_validate_json(found) if found else None

    # --- files

    def verified_folder(self, version: Version) -> Path:
        """The local folder of a version's files; from a server they are fetched once.

        The digest is checked at each call. Raises DamagedArtifact.
        """
        return self._verified_files(version.source, version.digest, version.ref)

    def is_local(self, version: Version) -> bool:
        """True where the store keeps a version's files on this machine; false where they are fetched."""
        return _local_path(version.source) is not None

    def find_local_folder(self, version: Version) -> Path | None:
        """The folder of a version's files where they are on this machine, not verified; else None."""
        path = _local_path(version.source) or home() / "artifacts-cache" / version.digest
        known = LOCAL_ARTIFACTS_PATTERN.fullmatch(str(path)) or path.parent.name == "artifacts-cache"
        return path if known and path.is_dir() else None

    def _verified_files(self, source: str, digest: str, label: str, *, fresh: bool = False) -> Path:
        """The verified folder of files; `fresh`: as they are in the store now, whatever was fetched before."""
        path = _local_path(source)
        if path is not None:
            if not LOCAL_ARTIFACTS_PATTERN.fullmatch(str(path)):
                raise DamagedArtifact(label, [f"its files are said to be in {path}, where Limbeck keeps none"])
            if not path.is_dir():
                raise DamagedArtifact(label, [f"its files are gone from {path}"])
            verify_files(path, digest)
            return path
        cached = home() / "artifacts-cache" / digest
        with self.lock(f"fetch-{digest[:16]}"):
            if cached.exists() and not fresh:
                try:
                    verify_files(cached, digest)
                    return cached
                except DamagedArtifact:  # the store's own files decide
                    shutil.rmtree(cached)
            with atomic_write(cached) as part:
                title = f"reading {label} back" if fresh else f"fetching {label}"
                got = transfer.download_folder(self.client, source, part.with_suffix(".fetched"), title)
                try:
                    verify_files(got, digest)
                    got.rename(part)
                finally:
                    shutil.rmtree(part.with_suffix(".fetched"), ignore_errors=True)
        return cached

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process of this machine at a time (a file lock in `home()`)."""
        from filelock import FileLock

        path = home() / "locks" / (re.sub(r"[^A-Za-z0-9_.-]", "_", name) + ".lock")
        path.parent.mkdir(exist_ok=True)
        with FileLock(path):
            yield


def _version(found: Any) -> Version:
    """MLflow's model version as a record."""
    fields = {f: found.tags[TAG_PREFIX + f] for f in FIELDS if TAG_PREFIX + f in found.tags}
    if "digest" not in fields or "kind" not in fields:
        raise BadInput(
            f"{found.name}/{found.version} was not registered by Limbeck: it has no digest",
            fix="register its files with Limbeck first",
        )
    if not DIGEST.fullmatch(fields["digest"]):  # folders are named after it
        raise BadInput(f"{found.name}/{found.version} is unreadable: its digest is {fields['digest']!r:.60}")
    try:
        return Version.model_validate(
            fields
            | {
                "name": found.name,
                "version": int(found.version),
                "source": found.source,
                "created": datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
                "run_id": found.run_id or None,
                "aliases": tuple(sorted(found.aliases or ())),
            }
        )
    except (ValueError, TypeError, OverflowError, OSError) as error:  # tags or a date that somebody changed
        raise BadInput(
            f"{found.name}/{found.version} is unreadable: {describe_read_error(error)}",
            fix="put right in MLflow what was changed there, or delete the version and register it anew",
        ) from None


def _version_or_error(found: ListedVersion) -> Version | BadInput:
    try:
        return _version(found)
    except BadInput as error:
        return error


def _readable(found: Iterable[ListedVersion]) -> list[Version]:
    return [version for version in map(_version_or_error, found) if isinstance(version, Version)]


def _local_path(uri: str) -> Path | None:
    """The path that an artifact URI means on this machine, or None where it lies elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if not parts.scheme else None
