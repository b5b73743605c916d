"""What somebody deleted, purged (`mlflow gc`), renamed or moved in MLflow, each as a fault with its mending.

Faults are found one after the other, so that a mended one does not show as further faults: a restored experiment has
its runs again, and a renamed model its lineage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from functools import partial

from limbeck.registry.core.errors import BadInput
from limbeck.registry.doctor.check import Fault
from limbeck.registry.ledger import anchor, log
from limbeck.registry.mlflow import layout, transfer
from limbeck.registry.mlflow.listing import ListedVersion
from limbeck.registry.mlflow.store import REF, Store
from limbeck.registry.mlflow.versions import MODEL_ID_TAG, TAG_PREFIX
from limbeck.registry.records import REFERENCES, Version

Versions = Sequence[tuple[ListedVersion, Version]]


def faults(store: Store) -> Iterator[Fault]:
    """All faults of a tracking store, the ones that cause others first."""
    yield from _paths_elsewhere(store)
    yield from _experiments(store)
    versions = _versions(store)
    renamed = _renamed_models(store, versions)
    for (former, name), model_ids in renamed.items():
        mend = partial(_follow_rename, store, former, name, model_ids)
        yield Fault(f"model {name}", f"it was renamed from {former}", f"let lineages name {name} too", mend)
    yield from _anchors(store, sorted({version.name for _, version in versions}))
    versions = _versions(store)
    known = {version.ref for _, version in versions}
    yield from _deleted_ancestors(versions, known, {former for former, _ in renamed})
    yield from _deleted_versions(store, versions)
    yield from _runs(store, versions)


def _versions(store: Store) -> Versions:
    return [(listed, found) for listed, found in store.versions_or_errors() if isinstance(found, Version)]


def _paths_elsewhere(store: Store) -> Iterator[Fault]:
    """Files that a copied database still reads where it came from."""
    if paths := layout.paths_outside_workspace(store.tracking_uri):
        found = f"{len(paths)} of its folders are elsewhere, such as {paths[0]}"
        bring = partial(layout.bring_into_workspace, store.tracking_uri, paths)
        yield Fault("workspace", found, "copy them here", bring)


def _experiments(store: Store) -> Iterator[Fault]:
    experiments = store.runs.experiments()
    for name, tag in ((layout.EXPERIMENT, layout.LAYOUT_TAG), (anchor.EXPERIMENT, anchor.ROOT_RUN_TAG)):
        own = next((each for each in experiments if each.name == name), None)
        if own is not None and own.lifecycle_stage != "active":
            restore = partial(store.client.restore_experiment, own.experiment_id)
            yield Fault(f"experiment {name}", "it was deleted", "restore it", restore)
        renamed = [each for each in experiments if tag in each.tags and each.lifecycle_stage == "active"]
        if own is None and renamed:
            rename = partial(store.client.rename_experiment, renamed[0].experiment_id, name)
            yield Fault(f"experiment {name}", f"it was renamed to {renamed[0].name}", "rename it back", rename)


def _renamed_models(store: Store, versions: Versions) -> dict[tuple[str, str], list[str]]:
    """Former and present name of a model -> the ids of its files, which remember the former name."""
    former_names = {each.model_id: each.tags.get(transfer.NAME_TAG) for each in transfer.uploads(store.client)}
    names = {version.name for _, version in versions}
    renamed: dict[tuple[str, str], list[str]] = defaultdict(list)
    for listed, version in versions:
        model_id = listed.tags.get(MODEL_ID_TAG, "")
        former = former_names.get(model_id)
        if former and former != version.name and former not in names:
            renamed[former, version.name].append(model_id)
    return renamed


def _follow_rename(store: Store, former: str, name: str, model_ids: Sequence[str]) -> None:
    for version in store.versions():
        for field in REFERENCES:
            match = REF.fullmatch(getattr(version, field) or "")
            if match and match["version"] and match["name"] == former:
                tag, value = TAG_PREFIX + field, f"{name}/{match['version']}"
                store.client.set_model_version_tag(version.name, str(version.version), tag, value)
    for model_id in model_ids:
        store.client.set_logged_model_tags(model_id, {transfer.NAME_TAG: name})


def _anchors(store: Store, names: Sequence[str]) -> Iterator[Fault]:
    """Anchors of ledgers, and their root run, that were deleted."""
    if (root := anchor.find_root_run(store)) and store.runs.lifecycle(root) == "deleted":
        restore = partial(store.client.restore_run, root)
        yield Fault("ledgers", f"their root run {root} was deleted", "restore it", restore)
    for name in names:
        ledger = log.read_ledger(store, name)
        subject, hashes = f"ledger of {name}", {entry.sequence: entry.hash for entry in ledger.entries}
        run_id = ledger.anchor.run_id if ledger.anchor else ledger.entries[-1].anchor if ledger.entries else None
        if run_id is None:
            continue
        lifecycle = store.runs.lifecycle(run_id)
        if lifecycle == "deleted":
            yield Fault(
                subject, f"its anchor {run_id} was deleted", "restore it", partial(store.client.restore_run, run_id)
            )
        if lifecycle is None:
            mend = partial(anchor.set_anchor, store, name, None, hashes)
            mending = f"make a new one, to be accepted by: limbeck models history {name} --adopt --reason ..."
            yield Fault(subject, f"its anchor {run_id} was deleted for good", mending, mend)
        elif ledger.anchor is None:
            mend = partial(anchor.set_anchor, store, name, run_id, {})
            yield Fault(subject, f"no root run names its anchor {run_id} any more", "name it again", mend)


def _deleted_ancestors(versions: Versions, known: Set[str], renamed: Set[str]) -> Iterator[Fault]:
    """Parents and teachers that were deleted."""
    for _, version in versions:
        for field in ("parent", "teacher"):
            ref = getattr(version, field)
            match = REF.fullmatch(ref or "")
            if match and match["version"] and ref not in known and match["name"] not in renamed:
                found = f"its {field} {ref} was deleted: rules of a policy about it are inconclusive"
                yield Fault(version.ref, found, "", is_wrong=False)


def _deleted_versions(store: Store, versions: Versions) -> Iterator[Fault]:
    """Versions, or whole models, that were deleted while their files remain. Somebody may have wanted that."""
    known = {listed.tags.get(MODEL_ID_TAG) for listed, _ in versions}
    places: dict[str, list[str]] = defaultdict(list)
    for upload in transfer.uploads(store.client):
        if str(upload.status) == "READY" and upload.model_id not in known:
            places[upload.tags.get(transfer.NAME_TAG, upload.name)].append(upload.artifact_location)
    for name, folders in places.items():
        found = f"{len(folders)} of its versions were deleted, and their files remain, such as {folders[0]}"
        again = f"limbeck register FOLDER --name {name}"
        yield Fault(f"model {name}", f"{found}; to have them again: {again}", "", is_wrong=False)


def _runs(store: Store, versions: Versions) -> Iterator[Fault]:
    """Runs of training and of scorecards that were deleted."""
    lifecycles = store.runs.lifecycles()
    seen: set[str] = set()  # an ONNX variant has the run of its student
    for listed, version in versions:
        if (run_id := version.run_id) and run_id not in seen:
            seen.add(run_id)
            if run_id not in lifecycles:
                found = f"the run that made it, {run_id}, was deleted for good: its recipe and cost are unknown"
                yield Fault(version.ref, found, "", is_wrong=False)
            elif lifecycles[run_id] == "deleted":
                restore = partial(store.client.restore_run, run_id)
                yield Fault(version.ref, f"the run that made it, {run_id}, was deleted", "restore it", restore)
        yield from _scorecards(store, listed, version, lifecycles)


def _scorecards(store: Store, listed: ListedVersion, version: Version, lifecycles: dict[str, str]) -> Iterator[Fault]:
    try:
        runs = store.findings.scorecard_runs(version, listed.tags)
    except BadInput as error:
        yield Fault(version.ref, error.message, error.fix or "see above")
        return
    for digest, run_id in runs.items():
        label = f"its scorecard {digest[:12]}"
        if lifecycles.get(run_id) == "deleted":
            restore = partial(store.client.restore_run, run_id)
            yield Fault(version.ref, f"the run {run_id} of {label} was deleted", "restore it", restore)
        elif run_id not in lifecycles:
            mend = partial(_restore_or_forget_scorecard, store, version, digest)
            mending = "store it again from the cache of this machine; if it is not there, forget it"
            yield Fault(version.ref, f"{label} is missing: the run {run_id} was deleted for good", mending, mend)


def _restore_or_forget_scorecard(store: Store, version: Version, digest: str) -> None:
    if not store.findings.restore_scorecard(version, digest):
        store.findings.forget_scorecard(version, digest)
