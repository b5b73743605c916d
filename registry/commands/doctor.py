"""`limbeck doctor`."""

from __future__ import annotations

import click

from limbeck.registry.core.errors import Refused
from limbeck.registry.core.terminal import format_option, indented, print_json, print_table


@click.command()
@click.option("--deep", is_flag=True, help="Verify the digest of every version's files (fetches them from a server).")
@click.option("--clean", is_flag=True, help="Take away uploads that nobody went on with for a day.")
@format_option
def doctor(deep: bool, clean: bool, output: str) -> None:
    """What is installed, reachable, and what is wrong. Exit code 1 where something is wrong."""
    from limbeck.registry.doctor import examine

    checks = list(examine(deep=deep, clean=clean))
    if output == "json":
        print_json([check.json() for check in checks])
    else:
        print_table("", ["", "what", "found"], [(check.state, check.what, check.found) for check in checks])
    wrong = [check for check in checks if check.state == "wrong"]
    if wrong:
        raise Refused("\n".join([f"{len(wrong)} things are wrong:", *indented(f"{c.what}: {c.fix}" for c in wrong)]))
