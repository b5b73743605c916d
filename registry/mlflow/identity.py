"""Who the user is, and what MLflow's server allows them to do; docs/trust.md says how far to trust a name."""

from __future__ import annotations

import getpass
import os
from functools import lru_cache
from typing import Any

from limbeck.registry.mlflow import client

CURRENT_USER_PATH = "/api/2.0/mlflow/users/current"
PERMISSION_PATH = "/api/3.0/mlflow/users/permissions/get"


def current_user(tracking_uri: str) -> str:
    """The name of the user who runs this process; versions, requests, approvals and ledger entries record it.

    On an MLflow server with accounts it is the name of the account; on one without, `$MLFLOW_TRACKING_USERNAME`.
    Else `$LIMBECK_USER`, or the name of the user of this machine.
    """
    account_name = None
    if client.is_server(tracking_uri):
        account = _current_account(tracking_uri) or {}
        account_name = account.get("username") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    try:
        return account_name or os.environ.get("LIMBECK_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user of a container that has no name
        return f"uid {os.getuid()}"


def can_manage(tracking_uri: str, name: str) -> bool | None:
    """Whether an MLflow server gives this user MANAGE on a registered model; None if it has no accounts."""
    if not client.is_server(tracking_uri):
        return None
    account = _current_account(tracking_uri)
    if not account:
        return None if account is None else False
    if account.get("is_admin"):
        return True
    query = {"username": account["username"], "resource_type": "registered_model", "resource_id": name}
    status, answer = get_rest_json(tracking_uri, PERMISSION_PATH, **query)
    return status == 200 and answer.get("permission") == "MANAGE"


def _current_account(tracking_uri: str) -> dict[str, Any] | None:
    """The account of this user on the server; {} if the server does not accept them, None if it has no accounts."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
    return _fetch_account(tracking_uri, *(os.environ.get(name) for name in names))


@lru_cache  # a server takes up to half a second to check a password
def _fetch_account(tracking_uri: str, *credentials: str | None) -> dict[str, Any] | None:
    status, answer = get_rest_json(tracking_uri, CURRENT_USER_PATH)
    if status == 404:
        return None
    return answer.get("user", {}) if status == 200 else {}


def get_rest_json(tracking_uri: str, path: str, **params: str) -> tuple[int, dict[str, Any]]:
    """Send a GET request to an MLflow server, for what MLflow's client has no method for.

    Args:
        path: below the server's address, such as `/api/2.0/mlflow/users/current`.

    Returns:
        The HTTP status and the JSON object of the answer; {} if it is not a JSON object.
    """

    def request() -> tuple[int, dict[str, Any]]:
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        answer = http_request(get_default_host_creds(tracking_uri), path, "GET", params=params)
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        found = answer.json() if is_json else None
        return answer.status_code, found if isinstance(found, dict) else {}

    return client.call_with_retries(tracking_uri, request)
