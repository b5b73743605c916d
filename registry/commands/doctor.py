"""`limbeck doctor`: checks the installation, the machine and the registry."""

from __future__ import annotations

import click

from limbeck.registry.core.errors import Refused
from limbeck.registry.core.terminal import format_option, indent_lines, print_json, print_status, print_table


@click.command()
@click.option("--deep", is_flag=True, help="Verify the digest of every version's files; fetches them from a server.")
@click.option(
    "--clean", is_flag=True, help="Delete uploads that were left unfinished for a day, and files of deleted versions."
)
@click.option("--repair", is_flag=True, help="Mend what can be mended of what was deleted, renamed or moved in MLflow.")
@click.option(
    "--install-optimum",
    is_flag=True,
    help="Install the packages of the export engine optimum beside this environment, and check nothing.",
)
@format_option
def doctor(deep: bool, clean: bool, repair: bool, install_optimum: bool, output_format: str) -> None:
    """Check what is installed and reachable, and report what is wrong. Exit code 1 if anything is wrong."""
    if install_optimum:
        from limbeck.registry.core.overlay import install_overlay

        print(install_overlay(print_status))
        return
    from limbeck.registry.doctor.checks import run_checks

    checks = list(run_checks(deep=deep, clean=clean, repair=repair))
    if output_format == "json":
        print_json([check.json() for check in checks])
    else:
        print_table("", ["", "subject", "found"], [(check.state, check.subject, check.found) for check in checks])
    wrong = [check for check in checks if check.state == "wrong"]
    if wrong:
        raise Refused(
            "\n".join([f"{len(wrong)} things are wrong:", *indent_lines(f"{c.subject}: {c.fix}" for c in wrong)])
        )
