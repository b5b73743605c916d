"""`limbeck webhooks list`, `add`, `remove` and `test`: the webhooks of the MLflow server."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.mlflow.webhooks import Webhook

EVENT_NAMES = ("promoted", "withdrawn", "registered", "new-model", "tagged")  # limbeck.registry.mlflow.webhooks.EVENTS
SECRET_VARIABLE = "LIMBECK_WEBHOOK_SECRET"


@click.command("list")
@format_option
def list_(output_format: str) -> None:
    """List the webhooks of the server."""
    from limbeck.registry.mlflow.webhooks import list_webhooks

    _print_webhooks(list_webhooks(_store()), output_format)


@click.command()
@click.argument("url")
@click.option(
    "--event",
    "events",
    type=click.Choice(EVENT_NAMES),
    multiple=True,
    required=True,
    help="Send a notice of this event; repeatable.",
)
@format_option
def add(url: str, events: tuple[str, ...], output_format: str) -> None:
    """Have the server send a notice to URL after an event. A notice cannot veto the event.

    `promoted` means that an alias points at another version, so rollbacks send it too. If LIMBECK_WEBHOOK_SECRET is
    set, the server signs its notices (HMAC-SHA256 in X-MLflow-Signature). Only an administrator of the server can add
    a webhook.
    """
    from limbeck.registry.mlflow import webhooks

    secret = os.environ.get(SECRET_VARIABLE) or None
    webhook = webhooks.add_webhook(_store(), url, list(dict.fromkeys(events)), secret)
    _print_webhooks([webhook], output_format)
    if secret is None:
        print_status(f"its notices are not signed: {SECRET_VARIABLE} is not set")


@click.command()
@click.argument("webhook")
def remove(webhook: str) -> None:
    """Remove the webhook with the id WEBHOOK."""
    from limbeck.registry.mlflow import webhooks

    webhooks.remove_webhook(_store(), webhook)
    print_status(f"webhook {webhook} is removed")


@click.command()
@click.argument("webhook")
def test(webhook: str) -> None:
    """Have the server send an example notice by the webhook with the id WEBHOOK now."""
    from limbeck.registry.mlflow import webhooks

    print_status(f"webhook {webhook} answers {webhooks.send_test_notice(_store(), webhook)}")


def _print_webhooks(webhooks: list[Webhook], output_format: str) -> None:
    if output_format == "json":
        print_json([each._asdict() for each in webhooks])
    else:
        rows = [(each.id, each.url, " ".join(each.events), "yes" if each.active else "no") for each in webhooks]
        print_table("", ["webhook", "address", "events", "active"], rows)


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
