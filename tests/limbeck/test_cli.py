"""The command itself: quick to answer, clear about what it does not know, and what the README says of it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import click
import pytest

from limbeck.cli import COMMANDS, cli
from tests import ROOT


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from limbeck.cli import cli; cli.main(['--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'transformers', 'mlflow', 'numpy', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_imports_nothing_heavy(name: str) -> None:
    code = (
        f"import sys; from limbeck.cli import cli; cli.main([{name!r}, '--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'transformers', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_a_mistyped_command(limbeck) -> None:  # type: ignore[no-untyped-def]
    done = limbeck("leaderbord", "x")
    assert done.code == 2
    assert "Did you mean 'leaderboard'?" in done.err


def commands(text: str) -> list[str]:
    """The command lines of a Markdown text's shell blocks, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


README = commands((ROOT / "README.md").read_text())
DOCS = [line for file in sorted((ROOT / "docs").glob("*.md")) for line in commands(file.read_text())]


@pytest.mark.parametrize("line", [line for line in README + DOCS if line.startswith("limbeck ")])
def test_the_commands_of_readme_and_docs_are_commands(line: str) -> None:
    words = shlex.split(line.split(" | ")[0].split(" > ")[0])[1:]
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, f"no command {words[0]}"
        command, words = found, words[1:]
    command.make_context(command.name, words)  # raises UsageError for an option or argument that is not there


def test_the_readme_s_targets_are_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [line.split()[1] for line in README if line.startswith("make ")]
    assert {"quickstart", "test"} <= set(named)
    assert set(named) <= set(targets)
