"""Who somebody is, and what MLflow's server lets them do: see docs/trust.md for how much a name is worth."""

from __future__ import annotations

import getpass
import os
from functools import lru_cache
from typing import Any

from limbeck.registry.mlflow import client

CURRENT = "/api/2.0/mlflow/users/current"
PERMISSION = "/api/3.0/mlflow/users/permissions/get"


def current_user(tracking_uri: str) -> str:
    """The name of whoever runs this process: what versions, requests, approvals and the ledger carry.

    On an MLflow server with accounts it is the name that the server knows; on one without,
    `$MLFLOW_TRACKING_USERNAME`. Else `$LIMBECK_USER`, or the name of the user of this machine.
    """
    known = None
    if client.is_server(tracking_uri):
        known = (_current_account(tracking_uri) or {}).get("username") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        return known or os.environ.get("LIMBECK_USER") or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"


def can_manage(tracking_uri: str, name: str) -> bool | None:
    """Whether an MLflow server gives this user MANAGE on a registered model; None where nobody has an account."""
    if not client.is_server(tracking_uri):
        return None
    account = _current_account(tracking_uri)
    if not account:
        return None if account is None else False
    if account.get("is_admin"):
        return True
    asked = {"username": account["username"], "resource_type": "registered_model", "resource_id": name}
    status, answer = client.get_rest_json(tracking_uri, PERMISSION, **asked)
    return status == 200 and answer.get("permission") == "MANAGE"


def _current_account(tracking_uri: str) -> dict[str, Any] | None:
    """What the server knows of this user; {} where it does not let them in, None where it has no accounts."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    return _fetch_account(tracking_uri, *(os.environ.get(name) for name in names))


@lru_cache  # a password takes a server up to half a second
def _fetch_account(tracking_uri: str, *credentials: str | None) -> dict[str, Any] | None:
    status, answer = client.get_rest_json(tracking_uri, CURRENT)
    if status == 404:
        return None
    return answer.get("user", {}) if status == 200 else {}
