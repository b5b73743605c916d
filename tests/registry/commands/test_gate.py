"""`limbeck promote`, `rollback`, `protect` and `models history`, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.ledger import log
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]
SKIPPED = """\
skipped still/1: a PyTorch model, which limbeck serve does not run; export it: limbeck export still/1
skipped still/2: PyTorch, with ONNX variants among the candidates
"""


def test_promote_and_rollback(scored: Still, limbeck: Limbeck, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_USER", "ada")
    tried = limbeck("promote", "still", "--dry-run")
    assert (tried.code, tried.err) == (0, f"{SKIPPED}still@production would be still/4 (it was nothing)\n")
    assert "retention 0.5000 [0.4000, 0.6000], at least 0.8000 is required" in tried.out  # why not the cheapest
    assert scored.store.aliases("still") == {}
    done = limbeck("promote", "still/3", "--reason", "first [/b]\x1b[2J", "--format", "json")
    report = json.loads(done.out)
    assert (report["chosen"], report["from_version"], report["moved"]) == ("still/3", None, True)
    assert (report["entry"]["who"], report["entry"]["to_version"]) == ("ada", 3)
    assert [candidate["verdict"]["outcome"] for candidate in report["candidates"]] == ["pass"]
    assert limbeck("promote", "still").err == f"{SKIPPED}still@production is now still/4 (it was still/3)\n"
    assert limbeck("promote", "still").err == f"{SKIPPED}still@production is still/4 already\n"
    verified = limbeck("models", "history", "still", "--verify")
    assert (verified.code, verified.err) == (0, "2 entries are consistent\n")
    assert r"first [/b]\x1b[2J" in verified.out
    back = limbeck("rollback", "still", "--reason", "slow", "--format", "json")
    assert json.loads(back.out)["to_version"] == 3
    assert back.err == "still@production is still/3 again (it was still/4)\n"
    assert limbeck("rollback", "still").err == "still@production is removed (it was still/3)\n"
    assert limbeck("rollback", "still").code == 1
    history = json.loads(limbeck("models", "history", "still", "--format", "json").out)
    assert [entry["action"] for entry in history["entries"]] == ["promote", "promote", "rollback", "rollback"]
    assert (history["aliases"], history["problems"]) == ({}, [])


def test_a_version_that_does_not_pass(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    refused = limbeck("promote", "still/5")
    assert (refused.code, refused.out) == (1, "")
    assert "quality.min_retention (fail): retention 0.5000" in refused.err
    policy.write_text("[quality]\nmin_retention = 1.5\n")
    refused = limbeck("promote", "still", "--format", "json")
    report = json.loads(refused.out)
    assert (refused.code, report["chosen"], report["moved"], len(report["candidates"])) == (1, None, False, 3)
    assert report["skipped"].keys() == {"still/1", "still/2"}
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


def test_an_alias_that_was_moved_through_mlflow(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    limbeck("promote", "still/3")
    scored.store.client.set_registered_model_alias("still", "production", "5")
    shown = limbeck("models", "history", "still")
    assert (shown.code, "somebody moved it through MLflow itself" in shown.err) == (0, True)
    assert limbeck("models", "history", "still", "--verify").code == 1
    assert limbeck("promote", "still").code == limbeck("rollback", "still").code == 1
    assert limbeck("rollback", "still", "--adopt").err == "still@production is still/3 again (it was still/5)\n"
    assert limbeck("models", "history", "still", "--verify").code == 0


def test_history_reports_an_unfinished_move(scored: Still, limbeck: Limbeck) -> None:
    fields = dict(from_version=None, to_version=3, artifact=None, verdict=None, reason="")
    log.append_entry(scored.store, "still", who="me", alias="production", action="promote", **fields)
    shown = limbeck("models", "history", "still")
    assert (shown.code, "entry 1 is not carried out yet" in shown.err) == (0, True)


def test_protect_and_override(scored: Still, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_USER", "ann")
    file = Path("strict.toml")
    file.write_text('[quality]\nmin_retention = 0.8\n[override]\npeople = ["carol"]\n')
    assert limbeck("protect", "still").err == "still@production is not protected; give it a policy: --policy FILE\n"
    done = limbeck("protect", "still", "--policy", file, "--reason", "ours", "--format", "json")
    assert (done.code, json.loads(done.out)["action"]) == (0, "protect")
    shown = json.loads(limbeck("protect", "still", "--format", "json").out)
    assert (shown["digest"], shown["policy"]["override"]) == (json.loads(done.out)["policy"], {"people": ["carol"]})
    assert "quality.min_retention" in limbeck("protect", "still").out
    assert limbeck("protect", "still", "--policy", file, "--remove").code == 2

    Path("policy.toml").write_text("[quality]\nmin_retention = 0.1\n")  # not used: the alias is protected
    refused = limbeck("promote", "still/5")
    assert (refused.code, "--override" in refused.err) == (1, False)
    assert limbeck("promote", "still/5", "--policy", "policy.toml").code == 1
    refused = limbeck("promote", "still/5", "--override", "--reason", "now")
    assert (refused.code, "the policy lets carol override it, not ann" in refused.err) == (1, True)
    monkeypatch.setenv("LIMBECK_USER", "carol")
    refused = limbeck("promote", "still/5")
    assert "limbeck promote still/5 --alias production --override --reason ..." in refused.err
    tried = limbeck("promote", "still/5", "--override", "--reason", "now", "--dry-run")
    assert (tried.code, scored.store.aliases("still")) == (0, {})
    done = limbeck("promote", "still/5", "--override", "--reason", "now", "--format", "json")
    assert json.loads(done.out)["entry"]["override"] is True
    assert "OVERRIDE: still/5 does not pass the policy:\n  quality.min_retention (fail)" in done.err
    assert "warning" not in done.err
    weights = scored.store.artifacts.verified_folder(scored.variants["fp32"]) / "model.onnx"
    weights.write_text("damaged")
    limbeck("protect", "still", "--policy", "policy.toml")
    damaged = limbeck("promote", "still/3", "--override", "--reason", "now")
    assert (damaged.code, "is damaged" in damaged.err) == (2, True)
    limbeck("protect", "still", "--remove")
    assert (
        "is not protected, so the policy"
        in limbeck("promote", "still/5", "--policy", file, "--override", "--reason", "now").err
    )
    assert scored.store.aliases("still") == {"production": 5}
