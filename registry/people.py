"""Who somebody is: the name that versions, requests, approvals and the ledger carry."""

from __future__ import annotations

import getpass
import os

from registry.connection import is_server


def user(tracking_uri: str) -> str:
    """The name of whoever runs this process.

    On an MLflow server with authentication it is the name that the server knows (`$MLFLOW_TRACKING_USERNAME`);
    else `$LIMBECK_USER`, or the name of the user of this machine.
    """
    known = os.environ.get("MLFLOW_TRACKING_USERNAME") if is_server(tracking_uri) else None
    try:
        return known or os.environ.get("LIMBECK_USER") or getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
