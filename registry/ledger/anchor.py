"""The anchor of a ledger: one MLflow run for each registered model, with a parameter for each entry.

MLflow lets nobody change or delete a parameter of a run: its first value stays. So the parameter `000007` of that
run decides, also between machines, which entry is the seventh; the second to write it gets an error. The anchor also
proves which entries were changed or deleted, even if the last ones or all of them are gone.

Which run belongs to which model is written once as well, as a parameter of a root run. All of these runs are in the
experiment `limbeck-ledger`; if the server has accounts, people who promote need EDIT on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.mlflow.client import NotFound, artifact_location
from limbeck.registry.mlflow.layout import place_tag
from limbeck.registry.mlflow.store import Store

EXPERIMENT = "limbeck-ledger"
ROOT_RUN_TAG = "limbeck.root"  # the experiment's tag that names the root run

_RUN_IDS: WeakKeyDictionary[Store, dict[str, str]] = WeakKeyDictionary()  # registered model -> run, which never changes


class Anchor(NamedTuple):
    """The run that anchors the ledger of a registered model."""

    run_id: str
    hashes: dict[int, str]  # sequence number -> hash of its entry
    deleted: bool  # MLflow takes no further entry then; the entries can still be read


def find_anchor(store: Store, name: str) -> Anchor | None:
    """The anchor of a registered model; None if no entry was ever written."""
    run_ids = _RUN_IDS.setdefault(store, {})
    if name not in run_ids:
        run_id = _root_params(store).get(name)
        if run_id is None:
            return None
        run_ids[name] = run_id
    try:
        run = store.client.get_run(run_ids[name])
    except NotFound:
        return Anchor(run_ids.pop(name), {}, deleted=True)
    hashes = {int(key): value for key, value in run.data.params.items() if key.isdecimal()}
    return Anchor(run.info.run_id, hashes, run.info.lifecycle_stage != "active")


def ensure_anchor(store: Store, name: str) -> Anchor:
    """The anchor of a registered model, created if it is missing."""
    if existing := find_anchor(store, name):
        return existing
    root = find_root_run(store) or _create_root_run(store)
    try:
        experiment = store.client.get_run(root).info.experiment_id
    except NotFound:
        raise _deleted_run_error(root) from None
    run = store.client.create_run(experiment, run_name=f"ledger of {name}").info.run_id
    store.client.set_terminated(run)
    if _write_param_once(store, root, name, run) != run:
        store.client.delete_run(run)
    created = find_anchor(store, name)
    assert created is not None
    return created


def claim_sequence_number(store: Store, run_id: str, number: int, digest: str) -> bool:
    """Claim a sequence number for the entry with hash `digest`; False if another entry has the number."""
    return _write_param_once(store, run_id, f"{number:06d}", digest) == digest


def set_anchor(store: Store, name: str, run_id: str | None, hashes: Mapping[int, str]) -> None:
    """Name the anchor of a model anew, after its run or the root run was deleted for good.

    A root run takes one value for each model, so another value needs another root run. Entries name their anchor: the
    ledger reports a new one until somebody adopts it.

    Args:
        run_id: of an anchor that still exists; None to make one with `hashes`: those of the entries that are left.
    """
    client, old = store.client, _root_params(store)
    root = find_root_run(store)
    if root is None or store.runs.lifecycle(root) is None:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        root = _new_root_run(store, experiment.experiment_id, {}) if experiment else _create_root_run(store)
    experiment_id = client.get_run(root).info.experiment_id
    if run_id is None:
        run_id = client.create_run(experiment_id, run_name=f"ledger of {name}").info.run_id
        client.set_terminated(run_id)
        client.log_params(run_id, {f"{number:06d}": digest for number, digest in sorted(hashes.items())})
    if name in old:
        _new_root_run(store, experiment_id, old | {name: run_id})
    else:
        client.log_param(root, name, run_id)
    _RUN_IDS.pop(store, None)


def _new_root_run(store: Store, experiment_id: str, params: Mapping[str, str]) -> str:
    """Create a root run with these anchors in an existing experiment, and name it there."""
    run = store.client.create_run(experiment_id, run_name="ledgers").info.run_id
    store.client.set_terminated(run)
    store.client.log_params(run, dict(params))
    store.client.set_experiment_tag(experiment_id, ROOT_RUN_TAG, run)
    return str(run)


def _write_param_once(store: Store, run_id: str, key: str, value: str) -> str:
    """Write a parameter that has no value yet. Returns its value: the given one, or that of the first writer."""
    try:
        store.client.log_param(run_id, key, value)
        return value
    except LimbeckError as error:
        try:
            run = store.client.get_run(run_id)
        except NotFound:
            raise _deleted_run_error(run_id) from error
        if run.info.lifecycle_stage != "active":
            raise _deleted_run_error(run_id) from error
        if key not in run.data.params:
            raise
        return str(run.data.params[key])


def find_root_run(store: Store) -> str | None:
    """The id of the run that names the anchors of all models; None if there is none."""
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    return experiment.tags.get(ROOT_RUN_TAG) if experiment else None


def _root_params(store: Store) -> dict[str, str]:
    """Registered model -> the run of its anchor; empty if there is no root run, or if it was deleted for good."""
    root = find_root_run(store)
    try:
        return dict(store.client.get_run(root).data.params) if root else {}
    except NotFound:
        return {}


def _create_root_run(store: Store) -> str:
    """Create the root run in a draft experiment, which gets its name when complete; the first one named wins."""
    client = store.client
    location = artifact_location(store.tracking_uri)
    name = f"{EXPERIMENT}-{uuid4().hex[:8]}"
    draft = client.create_experiment(name, artifact_location=location, tags=place_tag(location))
    run = client.create_run(draft, run_name="ledgers").info.run_id
    client.set_terminated(run)
    client.set_experiment_tag(draft, ROOT_RUN_TAG, run)
    try:
        client.rename_experiment(draft, EXPERIMENT)
    except LimbeckError:  # another process was first
        client.delete_experiment(draft)
        if (root := find_root_run(store)) is None:
            raise
        return root
    return str(run)


def _deleted_run_error(run_id: str) -> BadInput:
    return BadInput(
        f"the MLflow run {run_id}, which anchors the ledger, was deleted",
        fix="restore it: limbeck doctor --repair",
    )
