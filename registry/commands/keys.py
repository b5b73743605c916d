"""`limbeck keys`: the key that SBOMs and approvals are signed with."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status

name_option = click.option("--name", help="The owner of the key.  [default: your name in Limbeck]")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@name_option
def new(file: Path, name: str | None) -> None:
    """Make a private key in FILE, which nobody else may read, and print its line for a file of trusted keys."""
    from limbeck.registry.core import signing

    print(_trusted_key_line(signing.create_key(file), name))
    print_status(f"to sign with it: export {signing.KEY_FILE_VARIABLE}={shlex.quote(str(file.resolve()))}")
    print_status(
        f"to trust it: put the line above into a file, and the name of that file into {signing.TRUSTED_KEYS_VARIABLE}"
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@name_option
def show(file: Path | None, name: str | None) -> None:
    """Print the public key of the private key in FILE, as a line for a file of trusted keys.

    Without FILE, the key that LIMBECK_SIGNING_KEY names.
    """
    from limbeck.registry.core import signing

    configured = os.environ.get(signing.KEY_FILE_VARIABLE)
    if file is None and not configured:
        raise BadInput(
            f"no key is configured: {signing.KEY_FILE_VARIABLE} is not set", fix="make one: limbeck keys new FILE"
        )
    print(_trusted_key_line(signing.public_key(signing.load_private_key(file or Path(str(configured)))), name))


def _trusted_key_line(key: str, name: str | None) -> str:
    from limbeck.registry.mlflow.identity import current_user

    # Without the default store, since a host that only has a key needs no state folder.
    who = name or current_user(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return f"{key} {' '.join(who.split())}"
