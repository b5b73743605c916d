"""Webhooks of MLflow's server: it sends a notice to a URL after an event.

Notices are sent after the event, and nobody waits for the answer: a webhook cannot veto anything. Whether an alias may
move is decided by `limbeck.registry.gate`.
"""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from limbeck.registry.core.errors import BadInput, LimbeckError, redact_urls
from limbeck.registry.mlflow.client import NotFound
from limbeck.registry.mlflow.store import Store

# Limbeck's name of an event -> MLflow's
EVENTS = {
    "promoted": "model_version_alias.created",  # an alias points at another version, also after a rollback
    "withdrawn": "model_version_alias.deleted",
    "registered": "model_version.created",
    "new-model": "registered_model.created",
    "tagged": "model_version_tag.set",  # scorecards, verdicts, requests and approvals are tags
}


class Webhook(NamedTuple):
    """A webhook, without its secret: MLflow's server does not reveal it."""

    id: str
    url: str
    events: tuple[str, ...]  # of EVENTS, or MLflow's name if it is none of these
    active: bool


def list_webhooks(store: Store) -> list[Webhook]:
    """The webhooks of a server, oldest first."""
    _check_server(store)
    found: list[Any] = []
    token = None
    while True:
        page = store.client.list_webhooks(page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return [_to_webhook(each) for each in sorted(found, key=lambda each: each.creation_timestamp)]


def add_webhook(store: Store, url: str, event_names: list[str], secret: str | None) -> Webhook:
    """Have the server send notices of events to `url`.

    Args:
        event_names: of EVENTS.
        secret: signs the notices (HMAC-SHA256); None: they are not signed.

    Raises:
        BadInput: the address is neither https nor on this machine, the store is not a server, or the webhook exists.
        Forbidden: the user is not an administrator of the server.
    """
    _check_server(store)
    _check_url(url)
    for webhook in list_webhooks(store):
        if webhook.url == redact_urls(url) and set(webhook.events) == set(event_names):
            raise BadInput(f"webhook {webhook.id} exists already", fix=f"limbeck webhooks remove {webhook.id}")
    events = [EVENTS[name] for name in event_names]
    return _to_webhook(store.client.create_webhook("limbeck-" + "-".join(event_names), url, events, secret=secret))


def remove_webhook(store: Store, webhook_id: str) -> None:
    """Delete a webhook. Raises BadInput if there is none with this id."""
    _check_server(store)
    try:
        store.client.delete_webhook(webhook_id)
    except NotFound:
        raise _unknown_webhook_error(webhook_id) from None


def send_test_notice(store: Store, webhook_id: str) -> int:
    """Have the server send an example notice now. Returns the HTTP status of the answer.

    Raises LimbeckError if there was no answer or an error status, BadInput if there is no webhook with this id.
    """
    _check_server(store)
    try:
        result = store.client.test_webhook(webhook_id)
    except NotFound:
        raise _unknown_webhook_error(webhook_id) from None
    if not result.success:
        answer = f"it answers {result.response_status}" if result.response_status else result.error_message
        raise LimbeckError(
            f"webhook {webhook_id}: {answer}",
            fix="the server must be able to reach it; MLflow sends only to public addresses, see docs/team.md",
        )
    return int(result.response_status)


def _unknown_webhook_error(webhook_id: str) -> BadInput:
    return BadInput(f"there is no webhook {webhook_id}", fix="limbeck webhooks list")


def _to_webhook(found: Any) -> Webhook:
    names = {event: name for name, event in EVENTS.items()}
    events = tuple(names.get(str(event), str(event)) for event in found.events)
    return Webhook(found.webhook_id, redact_urls(found.url), events, str(found.status) == "ACTIVE")


def _check_server(store: Store) -> None:
    if not store.is_server:
        raise BadInput(
            f"an MLflow server sends notices, and {store.tracking_uri} is not one",
            fix="set MLFLOW_TRACKING_URI to a server: docs/team.md",
        )


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise BadInput(f"{url!r} is not an address for notices", fix="use https, or http on this machine only")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
