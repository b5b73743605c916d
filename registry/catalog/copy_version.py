"""Copies a version with its lineage and evidence from one tracking store to another, such as staging to production.

A copy has the digest of its original, so scorecards, parity reports, verdicts and SBOMs, which are about a digest,
stay true of it; numbers of versions may differ. No alias moves in the other store: its own gate decides. Its own
ledger begins empty, too; that of the original is carried as a file with the copy, so that its entries can be verified
where the copy is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.registry.catalog.lineage import lineage_path
from limbeck.registry.core.digest import file_digest
from limbeck.registry.core.errors import BadInput, DamagedArtifact, redact_urls
from limbeck.registry.ledger import log
from limbeck.registry.ledger.chain import compute_entry_hash
from limbeck.registry.mlflow.findings import PARITY_TAG, VERDICT_TAG_PREFIX
from limbeck.registry.mlflow.store import Store
from limbeck.registry.mlflow.versions import TAG_PREFIX
from limbeck.registry.provenance.attestation import SBOM_TAG_PREFIX, SIGNATURE_TAG_PREFIX
from limbeck.registry.records import REFERENCES, LedgerEntry, NewVersion, Version

CARRIED_TAGS = (PARITY_TAG, VERDICT_TAG_PREFIX, SBOM_TAG_PREFIX, SIGNATURE_TAG_PREFIX)
ORIGIN_TAG = TAG_PREFIX + "origin"  # of a copied version: see `Origin`
COPIED_RUN_TAG = TAG_PREFIX + "copied_run"  # of a copied run: the id of its original
LEDGER_FILE = "ledger.jsonl"


@dataclass(frozen=True)
class Copied:
    """A version and its copy."""

    original: str  # NAME/VERSION
    copy: str  # NAME/VERSION in the other store
    digest: str
    is_new: bool  # False: the other store had it already
    scorecards: int
    records: int  # parity report, verdicts, SBOMs and signatures
    ledger_entries: int

    def json(self) -> dict[str, Any]:
        """The fields."""
        return dict(vars(self))


@dataclass(frozen=True)
class Origin:
    """Where a copied version comes from, and the ledger of its model there."""

    tracking_uri: str
    version: str  # NAME/VERSION
    entries: tuple[LedgerEntry, ...]


def copy_version(source: Store, ref: str, target: Store) -> list[Copied]:
    """Copy a version and its ancestors, oldest first. Copies what is missing only, and verifies everything.

    Raises:
        BadInput: there is no such version, or the two stores are one.
        DamagedArtifact: files, scorecards or the ledger are not what was recorded, in either store.
    """
    if source.tracking_uri == target.tracking_uri:
        raise BadInput(f"{redact_urls(source.tracking_uri)} is the store that the version is in", fix="name another")
    version = source.get(ref)
    refs: dict[str, str] = {}  # original -> copy
    return [_copy_one(source, each, target, refs) for each in _with_ancestors(source, version)]


def read_origin(store: Store, version: Version) -> Origin | None:
    """The origin of a copied version, verified; None if it is not a copy.

    Raises DamagedArtifact if the ledger that was carried is not what was recorded, or its entries are no chain.
    """
    text = store.client.get_model_version(version.name, str(version.version)).tags.get(ORIGIN_TAG)
    if text is None:
        return None
    label = f"the origin of {version.ref}"
    try:
        fields = json.loads(text)
        with TemporaryDirectory() as temporary:
            uri = store.client.get_run(fields["run_id"]).info.artifact_uri
            file = store.client.download(f"{uri}/{LEDGER_FILE}", Path(temporary))
            if file_digest(file) != fields["ledger"]:
                raise DamagedArtifact(label, [f"{LEDGER_FILE} is not what was recorded"])
            entries = [LedgerEntry.model_validate_json(line) for line in file.read_text().splitlines()]
        origin = Origin(str(fields["tracking_uri"]), str(fields["version"]), tuple(entries))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedArtifact(label, [f"it cannot be read: {error}"]) from None
    if problems := _chain_problems(entries):
        raise DamagedArtifact(label, problems)
    return origin


def _with_ancestors(store: Store, version: Version) -> list[Version]:
    """A version after those that it was made from: its parents and their teachers. Deleted ones are left out."""
    found: dict[str, Version] = {}
    for node in lineage_path(store, version):
        if node.version is None:
            continue
        teacher = node.version.teacher
        if teacher and teacher not in found and teacher != version.ref:
            found |= {each.version.ref: each.version for each in _path_to(store, teacher) if each.version}
        found[node.ref] = node.version
    found[version.ref] = found.pop(version.ref)  # last
    return list(found.values())


def _path_to(store: Store, ref: str) -> Sequence[Any]:
    try:
        return lineage_path(store, store.get(ref))
    except BadInput:  # deleted
        return ()


def _copy_one(source: Store, version: Version, target: Store, refs: dict[str, str]) -> Copied:
    folder = source.artifacts.verified_folder(version)
    fields = version.model_dump(include=set(NewVersion.model_fields))
    fields |= {field: refs.get(fields[field] or "", fields[field]) for field in REFERENCES}
    known = {each.version for each in target.versions(version.name)}
    copy = target.register(NewVersion(**fields | {"run_id": _copy_run(source, version.run_id, target)}), folder)
    refs[version.ref] = copy.ref
    cards = source.findings.scorecards(version)
    for card in cards:
        target.findings.add_scorecard(copy, card, source.findings.documents(version, card))
    tags = source.tags([version])[version.ref]
    carried = {key: value for key, value in tags.items() if key.startswith(CARRIED_TAGS)}
    _set_missing_tags(target, copy, carried)
    entries = _carry_ledger(source, version, target, copy)
    _verify(target, copy, {card.digest() for card in cards}, carried)
    is_new = copy.version not in known
    return Copied(version.ref, copy.ref, copy.digest, is_new, len(cards), len(carried), len(entries))


def _copy_run(source: Store, run_id: str | None, target: Store) -> str | None:
    """The copy of the run that made a version: its parameters, last metrics and Limbeck's tags. None without one."""
    if run_id is None or source.runs.lifecycle(run_id) is None:
        return None
    filter_string = f"tags.`{COPIED_RUN_TAG}` = '{run_id}' and attributes.status = 'FINISHED'"
    if found := target.client.search_runs([target.runs.experiment_id()], filter_string, max_results=1):
        return str(found[0].info.run_id)
    original = source.client.get_run(run_id)
    tags = {key: value for key, value in original.data.tags.items() if key.startswith(TAG_PREFIX)}
    name = original.info.run_name or run_id
    with target.runs.start(name, params=original.data.params, tags=tags | {COPIED_RUN_TAG: run_id}) as run:
        run.log_metrics(original.data.metrics)
    return run.id


def _set_missing_tags(store: Store, version: Version, tags: Mapping[str, str]) -> None:
    existing = store.tags([version])[version.ref]
    for key, value in tags.items():
        if key not in existing:
            store.client.set_model_version_tag(version.name, str(version.version), key, value)


def _carry_ledger(source: Store, version: Version, target: Store, copy: Version) -> Sequence[LedgerEntry]:
    """Store the ledger of the original with the copy, as it is now; nothing if it is stored already."""
    entries = log.read_entries(source, version.name)
    if problems := _chain_problems(entries):
        raise DamagedArtifact(f"the ledger of {version.name}", problems)
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / LEDGER_FILE
        file.write_text("".join(f"{entry.model_dump_json()}\n" for entry in entries))
        fields = {
            "tracking_uri": redact_urls(source.tracking_uri),
            "version": version.ref,
            "ledger": file_digest(file),
        }
        known = json.loads(target.tags([copy])[copy.ref].get(ORIGIN_TAG, "{}"))
        if fields.items() <= known.items() and target.runs.lifecycle(known["run_id"]):
            return entries
        with target.runs.start(f"copy {version.ref}", tags={TAG_PREFIX + "version": copy.ref}) as run:
            run.log_artifact(file)
    text = json.dumps(fields | {"run_id": run.id})
    target.client.set_model_version_tag(copy.name, str(copy.version), ORIGIN_TAG, text)
    return entries


def _verify(target: Store, copy: Version, cards: set[str], carried: Mapping[str, str]) -> None:
    """Read back what was copied. Raises DamagedArtifact."""
    target.artifacts.verified_folder(copy)
    stored = target.tags([copy])[copy.ref]
    target.findings.verify_stored_scorecards(copy, stored)
    problems = [f"the tag {key} differs" for key, value in carried.items() if stored.get(key) != value]
    missing = cards - target.findings.scorecard_runs(copy, stored).keys()
    problems += [f"the scorecard {digest[:12]} is missing" for digest in sorted(missing)]
    if problems:
        raise DamagedArtifact(f"the copy {copy.ref}", problems)
    read_origin(target, copy)


def _chain_problems(entries: Sequence[LedgerEntry]) -> list[str]:
    """What is wrong with entries by themselves, without the anchor that only their own store has."""
    problems = [f"entry {each.sequence} was changed" for each in entries if each.hash != compute_entry_hash(each)]
    for before, entry in pairwise(entries):
        if entry.sequence == before.sequence + 1 and entry.previous != before.hash:
            problems.append(f"entry {entry.sequence} does not follow the one before")
    return problems
