"""What holds a ledger in place: one MLflow run for each registered model, with a parameter for each entry.

MLflow lets nobody change or delete a parameter of a run: the first value stays. So the parameter `000007` of that
run decides, between machines too, which entry is the seventh: whoever comes second is told so. It is also the
witness of entries that were changed or dropped, the last ones and all of them included.

Which run is whose is written once as well, as a parameter of a root run. All of them lie in the experiment
`limbeck-ledger`; those who promote need EDIT on it where the server has accounts.
"""

from __future__ import annotations

from typing import NamedTuple
from uuid import uuid4
from weakref import WeakKeyDictionary

from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.core.home import home
from limbeck.registry.mlflow.client import NotFound
from limbeck.registry.mlflow.store import Store

EXPERIMENT = "limbeck-ledger"
ROOT_RUN_TAG = "limbeck.root"  # the experiment's tag that names the root run

_RUN_IDS: WeakKeyDictionary[Store, dict[str, str]] = WeakKeyDictionary()  # registered model -> run: never another


class Anchor(NamedTuple):
    """The run that holds the ledger of a registered model in place."""

    run_id: str
    hashes: dict[int, str]  # sequence number -> hash of the entry that it belongs to
    deleted: bool  # nothing can be entered then; what was entered can be read still


def find_anchor(store: Store, name: str) -> Anchor | None:
    """The anchor of a registered model; None where nothing was ever entered."""
    known = _RUN_IDS.setdefault(store, {})
    if name not in known:
        root = _find_root_run(store)
        found = store.client.get_run(root).data.params.get(name) if root else None
        if found is None:
            return None
        known[name] = found
    try:
        run = store.client.get_run(known[name])
    except NotFound:
        return Anchor(known.pop(name), {}, deleted=True)
    hashes = {int(key): value for key, value in run.data.params.items() if key.isdecimal()}
    return Anchor(run.info.run_id, hashes, run.info.lifecycle_stage != "active")


def ensure_anchor(store: Store, name: str) -> Anchor:
    """The anchor of a registered model, made if it is missing."""
    if there := find_anchor(store, name):
        return there
    root = _find_root_run(store) or _create_root_run(store)
    experiment = store.client.get_run(root).info.experiment_id
    run = store.client.create_run(experiment, run_name=f"ledger of {name}").info.run_id
    store.client.set_terminated(run)
    if _write_param_once(store, root, name, run) != run:
        store.client.delete_run(run)
    there = find_anchor(store, name)
    assert there is not None
    return there


def claim_sequence_number(store: Store, run_id: str, number: int, digest: str) -> bool:
    """Make the entry of a hash the one of a number; False where another is already."""
    return _write_param_once(store, run_id, f"{number:06d}", digest) == digest


def anchor_existing_hashes(store: Store, run_id: str, hashes: dict[int, str]) -> None:
    """Enter what a ledger of before there were anchors holds; number -> hash."""
    params = {f"{number:06d}": digest for number, digest in hashes.items()}
    store.client.log_params(run_id, params)


def _write_param_once(store: Store, run_id: str, key: str, value: str) -> str:
    """The value that a parameter has from now on: the given one, or that of whoever was first."""
    try:
        store.client.log_param(run_id, key, value)
        return value
    except LimbeckError as error:
        there = store.client.get_run(run_id)
        if there.info.lifecycle_stage != "active":
            raise _deleted_run_error(run_id) from error
        if key not in there.data.params:
            raise
        return str(there.data.params[key])


def _find_root_run(store: Store) -> str | None:
    experiment = store.client.get_experiment_by_name(EXPERIMENT)
    return experiment.tags.get(ROOT_RUN_TAG) if experiment else None


def _create_root_run(store: Store) -> str:
    """The root run, in an experiment that takes its name when all is there; the first one to take it stays."""
    client = store.client
    where = None if store.is_server else str(home() / "artifacts")
    draft = client.create_experiment(f"{EXPERIMENT}-{uuid4().hex[:8]}", artifact_location=where)
    run = client.create_run(draft, run_name="ledgers").info.run_id
    client.set_terminated(run)
    client.set_experiment_tag(draft, ROOT_RUN_TAG, run)
    try:
        client.rename_experiment(draft, EXPERIMENT)
    except LimbeckError:  # somebody was first
        client.delete_experiment(draft)
        if (root := _find_root_run(store)) is None:
            raise
        return root
    return str(run)


def _deleted_run_error(run_id: str) -> BadInput:
    return BadInput(
        f"the MLflow run {run_id}, which holds the ledger in place, was deleted",
        fix=f"put it back: mlflow runs restore --run-id {run_id}",
    )
