"""Write the parts of docs/ that the code determines: `python -m tests.generate_docs`; `--check` reports stale ones.

docs/cli.md is the `--help` of every command; docs/policy.md has a table of the cost limits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from limbeck.cli import cli
from limbeck.registry.policy.describe import cost_limits_table
from tests import ROOT

WIDTH = 100  # columns of a command's help
COST_LIMITS = ("<!-- cost limits: made by `python -m tests.generate_docs` -->", "<!-- end of cost limits -->")


def command_help(command: click.Command, path: str, parent: click.Context | None = None) -> Iterator[str]:
    """A Markdown section for a command, then one for each of its subcommands."""
    context = click.Context(command, info_name=path.split()[-1], parent=parent, terminal_width=WIDTH)
    yield f"{'#' * (1 + len(path.split()))} {path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None, name
            yield from command_help(subcommand, f"{path} {name}", context)


def with_generated_part(path: Path, marks: tuple[str, str], part: str) -> str:
    """The text of a file with `part` between two marks."""
    before, _, rest = path.read_text().partition(marks[0])
    _, _, after = rest.partition(marks[1])
    return f"{before}{marks[0]}\n{part.strip()}\n{marks[1]}{after}"


def generated_files() -> dict[Path, str]:
    """The text that each file with generated parts must have."""
    head = "# Command line\n\nThe `--help` of every command. Generated: `python -m tests.generate_docs`.\n\n"
    policy = ROOT / "docs/policy.md"
    return {
        ROOT / "docs/cli.md": head + "\n".join(command_help(cli, "limbeck")),
        policy: with_generated_part(policy, COST_LIMITS, cost_limits_table()),
    }


def main(arguments: list[str]) -> int:
    """Write the files, or with --check return 1 if one is not as it would be written."""
    stale = {path: text for path, text in generated_files().items() if not path.is_file() or path.read_text() != text}
    for path, text in stale.items():
        if "--check" in arguments:
            print(f"{path.relative_to(ROOT)} is stale: run python -m tests.generate_docs", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
