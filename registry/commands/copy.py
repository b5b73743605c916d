"""`limbeck models copy`: a version from one tracking store to another."""

from __future__ import annotations

import click

from limbeck.registry.core.errors import redact_urls
from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table


@click.command()
@click.argument("ref")
@click.option(
    "--to",
    "tracking_uri",
    required=True,
    metavar="TRACKING_URI",
    help="The other store: a server's address, or sqlite:///PATH/.limbeck/mlflow.db.",
)
@format_option
def copy(ref: str, tracking_uri: str, output_format: str) -> None:
    """Copy the version REF, NAME/VERSION or NAME@ALIAS, to another tracking store, such as staging to production.

    Copied with it are its ancestors, scorecards, parity reports, verdicts, SBOMs and the ledger of its model, and all
    is read back and compared with its digest. No alias moves there: promote it under that store's policies. The same
    command again copies what is new since, and verifies the rest. Exit code 1 if the ledger here has problems.
    """
    from limbeck.registry.catalog.copy_version import copy_version
    from limbeck.registry.gate import audit
    from limbeck.registry.mlflow.store import Store

    source = Store()
    name = source.get(ref).name
    ledger = audit.audit_ledger(source, name)
    if problems := ledger.problems():
        fix = f"look at: limbeck models history {name}; to accept the current state, add --adopt"
        raise ledger.disagreement(problems, fix)
    copied = copy_version(source, ref, Store(tracking_uri))
    if output_format == "json":
        print_json([each.json() for each in copied])
        return
    columns = ["version", "copy", "", "scorecards", "other records", "ledger entries", "digest"]
    rows = [
        (
            each.original,
            each.copy,
            "copied" if each.is_new else "was there",
            each.scorecards,
            each.records,
            each.ledger_entries,
            each.digest[:12],
        )
        for each in copied
    ]
    print_table("copied and verified", columns, rows)
    there = redact_urls(tracking_uri)
    print_status(f"no alias moved; to promote it: MLFLOW_TRACKING_URI={there} limbeck promote {copied[-1].copy}")
