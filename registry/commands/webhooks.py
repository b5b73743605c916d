"""`limbeck hooks list`, `add`, `remove` and `test`: notices by webhook, for those who want them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store
    from limbeck.registry.mlflow.webhooks import Webhook

EVENT_NAMES = ("promoted", "withdrawn", "registered", "new-model", "tagged")  # limbeck.registry.mlflow.webhooks.EVENTS


@click.command("list")
@format_option
def list_(output_format: str) -> None:
    """The webhooks of the server."""
    from limbeck.registry.mlflow.webhooks import list_webhooks

    _print(list_webhooks(_store()), output_format)


@click.command()
@click.argument("url")
@click.option(
    "--on", "on", type=click.Choice(EVENT_NAMES), multiple=True, required=True, help="What to tell of; repeatable."
)
@format_option
def add(url: str, on: tuple[str, ...], output_format: str) -> None:
    """Have the server tell URL of what happens, after it has happened: a notice cannot veto.

    `promoted` tells of rollbacks too: an alias points at another version. Notices are signed where
    LIMBECK_HOOK_SECRET is set (HMAC-SHA256; X-MLflow-Signature). It takes an administrator of the server.
    """
    from limbeck.registry.mlflow import webhooks

    secret = os.environ.get("LIMBECK_HOOK_SECRET") or None
    made = webhooks.add_webhook(_store(), url, list(dict.fromkeys(on)), secret)
    _print([made], output_format)
    if secret is None:
        print_status("its notices are not signed: LIMBECK_HOOK_SECRET is not set")


@click.command()
@click.argument("hook")
def remove(hook: str) -> None:
    """Send no more notices by the webhook of the id HOOK."""
    from limbeck.registry.mlflow import webhooks

    webhooks.remove_webhook(_store(), hook)
    print_status(f"hook {hook} is removed")


@click.command()
@click.argument("hook")
def test(hook: str) -> None:
    """Have the server send an example by the webhook of the id HOOK now."""
    from limbeck.registry.mlflow import webhooks

    print_status(f"hook {hook} answers {webhooks.send_test_notice(_store(), hook)}")


def _print(found: list[Webhook], output_format: str) -> None:
    if output_format == "json":
        print_json([hook._asdict() for hook in found])
    else:
        rows = [(hook.id, hook.url, " ".join(hook.events), "yes" if hook.active else "no") for hook in found]
        print_table("", ["hook", "address", "tells of", "active"], rows)


def _store() -> Store:
    from limbeck.registry.mlflow.store import Store

    return Store()
