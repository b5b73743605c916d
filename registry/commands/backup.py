"""`limbeck backup` and `limbeck restore`: a workspace as one file."""

from __future__ import annotations

from pathlib import Path

import click

from limbeck.registry.core.terminal import format_bytes, format_option, print_json, print_status


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@format_option
def backup(file: Path, output_format: str) -> None:
    """Write the workspace into FILE, a tar: all versions with their files, evidence and ledger.

    Caches are left out. Other commands may run meanwhile. A tracking server is backed up with its own tools.
    """
    from limbeck.registry.catalog.backup import back_up

    made = back_up(file)
    if output_format == "json":
        print_json(made.json())
    else:
        print(f"{made.file}: {made.files} files, {format_bytes(made.bytes)}, digest {made.digest[:12]}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@format_option
def restore(file: Path, output_format: str) -> None:
    """Make the workspace from the backup FILE. The state folder must not have one yet.

    Every file is compared with its digest first, and the digest of every version afterwards. Exit code 2 if the backup
    is damaged: nothing is restored then.
    """
    from limbeck.registry.catalog import backup as backups
    from limbeck.registry.mlflow.store import Store

    made = backups.restore(file)
    store = Store()
    versions = store.versions()
    for version in versions:
        store.artifacts.verified_folder(version)
    if output_format == "json":
        print_json(made.json() | {"versions": [version.ref for version in versions]})
    else:
        print(f"{len(versions)} versions, {made.files} files, {format_bytes(made.bytes)}, all verified")
        print_status("to check ledgers and aliases too: limbeck doctor")
