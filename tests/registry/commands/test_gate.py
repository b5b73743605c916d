"""`limbeck promote`, `rollback` and `models history`, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.ledger import log
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


def test_promote_and_rollback(scored: Still, limbeck: Limbeck, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_USER", "ada")
    tried = limbeck("promote", "still", "--dry-run")
    assert (tried.code, tried.err) == (0, "still@production would be still/4 (it was nothing)\n")
    assert "retention 0.5000 [0.4000, 0.6000], at least 0.8000 is required" in tried.out  # why not the cheapest
    assert scored.store.aliases("still") == {}
    done = limbeck("promote", "still/3", "--reason", "first [/b]\x1b[2J", "--format", "json")
    said = json.loads(done.out)
    assert (said["chosen"], said["from_version"], said["moved"]) == ("still/3", None, True)
    assert (said["entry"]["who"], said["entry"]["to_version"]) == ("ada", 3)
    assert [candidate["verdict"]["outcome"] for candidate in said["candidates"]] == ["pass"]
    assert limbeck("promote", "still").err == "still@production is now still/4 (it was still/3)\n"
    assert limbeck("promote", "still").err == "still@production is still/4 already\n"
    history = limbeck("models", "history", "still", "--verify")
    assert (history.code, history.err) == (0, "2 entries, each in its place\n")
    assert r"first [/b]\x1b[2J" in history.out
    back = limbeck("rollback", "still", "--reason", "slow", "--format", "json")
    assert json.loads(back.out)["to_version"] == 3
    assert back.err == "still@production is still/3 again (it was still/4)\n"
    assert limbeck("rollback", "still").err == "still@production is taken away (it was still/3)\n"
    assert limbeck("rollback", "still").code == 1
    kept = json.loads(limbeck("models", "history", "still", "--format", "json").out)
    assert [entry["action"] for entry in kept["entries"]] == ["promote", "promote", "rollback", "rollback"]
    assert (kept["aliases"], kept["problems"]) == ({}, [])


def test_a_refusal(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    refused = limbeck("promote", "still/5")
    assert (refused.code, refused.out) == (1, "")
    assert "quality.min_retention (fail): retention 0.5000" in refused.err
    policy.write_text("[quality]\nmin_retention = 1.5\n")
    refused = limbeck("promote", "still", "--format", "json")
    said = json.loads(refused.out)
    assert (refused.code, said["chosen"], said["moved"], len(said["candidates"])) == (1, None, False, 3)
    assert scored.store.aliases("still") == {}


def test_policies_and_aliases_that_cannot_be_used(scored: Still, limbeck: Limbeck) -> None:
    result = limbeck("promote", "still")
    assert (result.code, "give one: --policy FILE" in result.err) == (2, True)
    assert limbeck("promote", "still", "--policy", "absent.toml").code == 2
    Path("policy.toml").write_text("[quality]\nmin_retantion = 0.8\n")
    result = limbeck("promote", "still")
    assert (result.code, "policy.toml:2: unknown key quality.min_retantion" in result.err) == (2, True)
    Path("policy.toml").write_text("[quality]\nmin_retention = 0.8\n")
    result = limbeck("promote", "still", "--alias", "v1")
    assert (result.code, "reserved by MLflow" in result.err) == (2, True)
    assert limbeck("rollback", "still", "--alias", "a b").code == 2
    assert limbeck("promote", "still", "--reason", "x" * 3000).code == 2
    assert scored.store.aliases("still") == {}


def test_an_alias_moved_behind_our_back(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    limbeck("promote", "still/3")
    scored.store.client.set_registered_model_alias("still", "production", "5")
    told = limbeck("models", "history", "still")
    assert (told.code, "somebody moved it through MLflow itself" in told.err) == (0, True)
    assert limbeck("models", "history", "still", "--verify").code == 1
    assert limbeck("promote", "still").code == limbeck("rollback", "still").code == 1
    assert limbeck("rollback", "still", "--adopt").err == "still@production is still/3 again (it was still/5)\n"
    assert limbeck("models", "history", "still", "--verify").code == 0


def test_history_tells_of_an_unfinished_move(scored: Still, limbeck: Limbeck) -> None:
    fields = dict(from_version=None, to_version=3, artifact=None, verdict=None, reason="")
    log.append_entry(scored.store, "still", who="me", alias="production", action="promote", **fields)
    told = limbeck("models", "history", "still")
    assert (told.code, "entry 1 is not carried out yet" in told.err) == (0, True)
