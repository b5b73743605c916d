"""What the steps of a distillation run share."""

from __future__ import annotations

import subprocess

import pytest

from limbeck.distill.context import code_version
from tests import ROOT


def test_the_code_version_names_the_commit_of_a_clone() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("these files are not a git clone")
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    assert f"+g{commit.stdout.strip()}" in code_version()
