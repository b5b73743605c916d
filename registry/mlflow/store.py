"""The store: MLflow's tracking store and model registry as Limbeck uses them.

The files of a version are the artifacts of an MLflow LoggedModel; its fields are tags `limbeck.*` of the model version.
The version, or the tag that makes something visible, is written last: what can be seen is complete and verified.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from limbeck.registry.core.digest import verify_files
from limbeck.registry.core.errors import BadInput, Unreachable
from limbeck.registry.core.home import machine_lock
from limbeck.registry.core.home import tracking_uri as default_tracking_uri
from limbeck.registry.core.terminal import print_status
from limbeck.registry.mlflow import client, identity, transfer
from limbeck.registry.mlflow.artifacts import Artifacts
from limbeck.registry.mlflow.client import AlreadyExists, Forbidden, Locked
from limbeck.registry.mlflow.filters import Condition, parse_filter
from limbeck.registry.mlflow.findings import Findings, VersionFindings
from limbeck.registry.mlflow.layout import CURRENT_MARK, DIGEST_TAG, check_layout, relocate_workspace
from limbeck.registry.mlflow.listing import ListedVersion, list_versions, read_aliases
from limbeck.registry.mlflow.runs import Runs, mlflow_key
from limbeck.registry.mlflow.versions import MODEL_ID_TAG, to_version, to_version_or_error, version_tags
from limbeck.registry.records import NewVersion, Version

NAME = re.compile(r"[^\W_][\w.-]{0,199}")
SAME_VERSION = ("digest", "parent", "recipe", "recipe_digest")  # versions of one name that have these in common
REF = re.compile(r"(?:models:/+)?(?P<name>[^/@]+)(?:/(?P<version>\d{1,9})|@(?P<alias>[^/@]+))")


class Store:
    """The versions in a tracking store. Its parts hold what belongs to them: `runs`, `artifacts` and `findings`.

    Args:
        tracking_uri: MLflow's address; None for `limbeck.registry.core.home.tracking_uri()`.

    Attributes:
        client: MLflow's client, for what no method here does.
        runs: MLflow runs.
        artifacts: the files of versions.
        findings: scorecards, parity reports and verdicts of versions.

    Raises:
        Unreachable: a server does not answer within about five seconds.
        BadInput: the store was written under another layout of Limbeck.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri or default_tracking_uri()
        self.is_server = client.is_server(self.tracking_uri)
        self.client = client.connect(self.tracking_uri)
        check_layout(self.client, self.tracking_uri)
        if moved := relocate_workspace(self.tracking_uri):
            print_status(f"{self.tracking_uri} was moved or copied here: {moved} recorded paths follow it")
        self.runs = Runs(self.client, self.tracking_uri)
        self.artifacts = Artifacts(self.client)
        self.findings = Findings(self.client, self.runs)

    # --- registering

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
        with machine_lock(f"register-{new.name}"):
            same = {field: getattr(wanted, field) for field in SAME_VERSION}
            if existing := self.find_version(new.name, **same):
                return existing
            return self._store_version(wanted, folder, extra_tags or {})

    def _store_version(self, wanted: Version, folder: Path, extra_tags: Mapping[str, Any]) -> Version:
        tags = version_tags(wanted)
        model = transfer.begin_upload(self.client, self.runs.experiment_id(), wanted, tags)
        try:
            self.artifacts.upload(folder, model.artifact_location, wanted)
            self.client.finalize_logged_model(model.model_id, "READY")
            with suppress(AlreadyExists):
                self.client.create_registered_model(wanted.name)
            all_tags = tags | CURRENT_MARK | {mlflow_key(key): str(value) for key, value in extra_tags.items()}
            created = to_version(self._create_model_version(wanted, model, all_tags))
        except (Unreachable, KeyboardInterrupt):  # the same command resumes the upload
            raise
        except BaseException:  # no version shows the upload, so a failure to discard it does no harm
            with suppress(Exception):
                self._discard(model, wanted.name)
            raise
        return self._first_of_same(created, model)

    def _first_of_same(self, created: Version, model: Any) -> Version:
        """The oldest version that is the same as one just created; that one is deleted if it is not the oldest.

        Another machine may register the same folder at the same moment. Each of the two lists the versions after it
        created its own, and MLflow gives each another number, so both see the same one as the oldest.
        """
        same = [
            each
            for each in self.versions(created.name)
            if all(getattr(each, field) == getattr(created, field) for field in SAME_VERSION)
        ]
        if not same or same[0].version == created.version:
            return created
        with suppress(Forbidden):  # a server may let nobody delete; the oldest counts all the same
            self.client.delete_model_version(created.name, str(created.version))
            self._discard(model, created.name)
        return same[0]

    def _discard(self, model: Any, name: str) -> None:
        """Delete an upload, unless a version has its files: another machine may have finished it."""
        if all(listed.tags.get(MODEL_ID_TAG) != model.model_id for listed in self._list_registered(name)):
            transfer.discard_upload(self.client, model.model_id, model.artifact_location)

    def _create_model_version(self, wanted: Version, model: Any, tags: Mapping[str, str]) -> Any:
        """Create the model version of a LoggedModel whose files are stored; exactly once, even if an answer is lost."""

        def create() -> Any:
            return self.client.create_model_version(
                wanted.name,
                model.artifact_location,
                run_id=wanted.run_id,
                tags={**tags, MODEL_ID_TAG: model.model_id},
                # A server compares the source with it; with a database MLflow would look it up in the wrong store.
                model_id=model.model_id if self.is_server else None,
            )

        try:
            return create()
        except (Unreachable, Locked):
            for listed in self._list_registered(wanted.name):
                if listed.tags.get(MODEL_ID_TAG) == model.model_id:
                    return listed
            return create()

    def unfinished_uploads(self) -> list[transfer.UnfinishedUpload]:
        """The uploads that never became a version and that no command resumed for a day."""
        model_ids = {listed.tags[MODEL_ID_TAG] for listed in self._list_registered() if MODEL_ID_TAG in listed.tags}
        return transfer.unfinished_uploads(self.client, model_ids)

    # --- finding

    def get(self, ref: str) -> Version:
        """The version that `NAME/VERSION`, `NAME@ALIAS` or a `models:/` URI of these names.

        Raises BadInput, with similar names, if there is none.
        """
        match = REF.fullmatch(ref.strip())
        if match is None:
            raise BadInput(f"{ref!r} is not a version", fix="write NAME/VERSION or NAME@ALIAS")
        name, number, alias = match["name"], match["version"], match["alias"]
        try:
            if number:
                found = self.client.get_model_version(name, number)
            else:
                found = self.client.get_model_version_by_alias(name, alias)
        except BadInput:
            raise self.not_found_error(name, number, alias) from None
        return to_version(found)

    def not_found_error(self, name: str, number: str | None = None, alias: str | None = None) -> BadInput:
        """The error for a name, version or alias that does not exist, with similar ones."""
        versions = self.versions(name)
        if not versions:
            names = self.model_names()
            near = get_close_matches(name, names, n=1)
            known = f"registered are: {', '.join(names)}" if names else "nothing is registered yet"
            return BadInput(f"no model is registered as {name!r}", fix=f"did you mean {near[0]}?" if near else known)
        if number:
            return BadInput(
                f"{name} has no version {number}", fix=f"it has {', '.join(str(v.version) for v in versions)}"
            )
        aliases = list(self.aliases(name))
        return BadInput(
            f"{name} has no alias {alias!r}",
            fix=f"it has {', '.join(aliases)}" if aliases else f"give it one: limbeck promote {name} --alias {alias}",
        )

    def find_version(self, name: str, **fields: Any) -> Version | None:
        """The newest version of `name` whose fields have the given values, or None."""
        for version in reversed(self.versions(name)):
            if all(getattr(version, field) == value for field, value in fields.items()):
                return version
        return None

    def versions(self, name: str | None = None, filter_string: str = "") -> list[Version]:
        """All versions that Limbeck registered, by name and oldest first. Those with unreadable tags are left out.

        Args:
            name: only the versions of this registered model.
            filter_string: in MLflow's language, such as "tags.`limbeck.precision` = 'int8-weight'".
        """
        found = self.versions_or_errors(name, parse_filter(filter_string))
        return [version for _, version in found if isinstance(version, Version)]

    def versions_or_errors(
        self, name: str | None = None, conditions: Sequence[Condition] = (), metrics: Iterable[str] = ()
    ) -> list[tuple[ListedVersion, Version | BadInput]]:
        """As `versions`, each with what MLflow has of it; with an error instead of the version if it is unreadable.

        Args:
            conditions: all of them hold for each version returned.
            metrics: to return besides those that the conditions are about.
        """
        return [(listed, to_version_or_error(listed)) for listed in self._list_registered(name, conditions, metrics)]

    def versions_with_findings(self, name: str) -> list[VersionFindings]:
        """The versions of `name`, oldest first, each with its scorecards and verdicts; all in one query."""
        return [
            VersionFindings(
                version,
                self.findings.scorecards(version, listed.tags),
                self.findings.verdicts(version, listed.tags),
            )
            for listed, version in self.versions_or_errors(name)
            if isinstance(version, Version)
        ]

    def tags(self, versions: Sequence[Version]) -> dict[str, Mapping[str, str]]:
        """NAME/VERSION -> all MLflow tags of versions of one name; several versions take one query."""
        listed = {each.version: each.tags for each in self._list_registered(versions[0].name)} if versions[1:] else {}
        return {version.ref: listed.get(version.version) or self._read_tags(version) for version in versions}

    def _read_tags(self, version: Version) -> Mapping[str, str]:
        return dict(self.client.get_model_version(version.name, str(version.version)).tags)

    def model_names(self) -> list[str]:
        """The registered models that have versions of Limbeck."""
        return sorted({version.name for version in self.versions()})

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> version number of a registered model; empty if there is no such model."""
        return read_aliases(self.client, name)

    def _list_registered(
        self, name: str | None = None, conditions: Sequence[Condition] = (), metrics: Iterable[str] = ()
    ) -> list[ListedVersion]:
        """What MLflow has of the versions that Limbeck registered."""
        if name is not None and not NAME.fullmatch(name):
            return []
        found = list_versions(self.client, self.tracking_uri, name, conditions, metrics)
        return [listed for listed in found if DIGEST_TAG in listed.tags]
