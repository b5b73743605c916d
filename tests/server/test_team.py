"""All of Limbeck through one team's server: PostgreSQL, S3 and accounts. Nothing but its address is set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Result
from tests.quickstart.test_quickstart import QUALITY, RECIPE, TEACHER
from tests.server.conftest import Team

pytestmark = [pytest.mark.server, pytest.mark.timeout(280)]

Limbeck = Callable[..., Result]


def told(result: Result) -> Any:
    """What a command that went well says in JSON."""
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_the_whole_loop_by_several_people(be: Callable[..., None], limbeck: Limbeck, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(teacher=TEACHER))
    (tmp_path / "policy.toml").write_text(QUALITY.format(0.3))
    be("ann")
    done = limbeck("quickstart", "--recipe", "recipe.toml", "--policy", "policy.toml", "--limit", 12)
    assert done.code == 0, done.err
