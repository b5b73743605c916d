"""Notices of what happens to models, sent by MLflow's server: its webhooks, under Limbeck's words.

They are sent after the fact and at leisure, and nobody waits for an answer: they cannot veto. What may move an alias is
the gate's to say.
"""

from __future__ import annotations

import ipaddress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from limbeck.registry.core.errors import BadInput, LimbeckError, redact_urls
from limbeck.registry.mlflow.client import NotFound
from limbeck.registry.mlflow.store import Store

# what happens -> MLflow's event
EVENTS = {
    "promoted": "model_version_alias.created",  # an alias points at another version: by a rollback too
    "withdrawn": "model_version_alias.deleted",
    "registered": "model_version.created",
    "new-model": "registered_model.created",
    "tagged": "model_version_tag.set",  # scorecards, verdicts, requests and answers are tags
}


class Webhook(NamedTuple):
    """A webhook, without its secret: MLflow's server does not give that away."""

    id: str
    url: str
    events: tuple[str, ...]  # of EVENTS, or MLflow's own word
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
    """Have notices of the events `event_names` sent to `url`.

    Args:
        event_names: of EVENTS.
        secret: that notices are signed with (HMAC-SHA256); None: they are not signed.

    Raises:
        BadInput: an address that is not https, but for this machine's own; a store that is no server.
        Forbidden: somebody who is not an administrator of the server.
    """
    _check_server(store)
    _check_url(url)
    if same := [
        each for each in list_webhooks(store) if each.url == redact_urls(url) and set(each.events) == set(event_names)
    ]:
        raise BadInput(f"webhook {same[0].id} is there already", fix=f"limbeck webhooks remove {same[0].id}")
    events = [EVENTS[word] for word in event_names]
    return _to_webhook(store.client.create_webhook("limbeck-" + "-".join(event_names), url, events, secret=secret))


def remove_webhook(store: Store, webhook_id: str) -> None:
    """Send no more notices by the webhook of this id."""
    _check_server(store)
    try:
        store.client.delete_webhook(webhook_id)
    except NotFound:
        raise _unknown_webhook_error(webhook_id) from None


def send_test_notice(store: Store, webhook_id: str) -> int:
    """Have the server send an example by a webhook now. Returns the HTTP status of the answer.

    Raises LimbeckError where there was none, or one that is no success.
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
            fix="the server has to reach it; MLflow sends to public addresses alone, see docs/team.md",
        )
    return int(result.response_status)


def _unknown_webhook_error(webhook_id: str) -> BadInput:
    return BadInput(f"there is no webhook {webhook_id}", fix="limbeck webhooks list")


def _to_webhook(found: Any) -> Webhook:
    words = {event: word for word, event in EVENTS.items()}
    on = tuple(words.get(str(event), str(event)) for event in found.events)
    return Webhook(found.webhook_id, redact_urls(found.url), on, str(found.status) == "ACTIVE")


def _check_server(store: Store) -> None:
    if not store.is_server:
        raise BadInput(
            f"notices are sent by an MLflow server, and {store.tracking_uri} is none",
            fix="set MLFLOW_TRACKING_URI to one: docs/team.md",
        )


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        raise BadInput(f"{url!r} is no address for notices", fix="use https, or http on this machine alone")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
