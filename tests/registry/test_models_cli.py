"""`limbeck models`, `promote`, `rollback` and `doctor`, as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import ledger
from registry.home import home
from registry.store import Store
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


@pytest.fixture
def policy() -> Path:
    """`policy.toml` in the current folder; use it after `still` or `scored`."""
    file = Path("policy.toml")
    file.write_text("[quality]\nmin_retention = 0.8\n[cost]\nmax_cost_ratio = 0.5\n")
    return file


def test_list(still: Still, limbeck: Limbeck) -> None:
    still.store.client.set_registered_model_alias("still", "production", "4")
    result = limbeck("models", "list")
    assert result.code == 0
    lines = [line for line in result.out.split("\n") if "still/" in line]
    assert [line.split("│")[1].strip() for line in lines] == [f"still/{n}" for n in range(1, 6)]
    assert "production" in lines[3]
    versions = json.loads(limbeck("models", "list", "still", "--format", "json").out)
    assert [v["version"] for v in versions] == [1, 2, 3, 4, 5]
    assert versions[3]["aliases"] == ["production"]
    only = json.loads(
        limbeck("models", "list", "--filter", "tags.`limbeck.precision` = 'int4'", "--format", "json").out
    )
    assert [v["version"] for v in only] == [5]
    result = limbeck("models", "list", "stil")
    assert (result.code, result.err) == (2, "error: no model is registered as 'stil'\n  did you mean still?\n")
    result = limbeck("models", "list", "--filter", "nonsense")
    assert result.code == 2
    assert result.err.startswith("error: --filter 'nonsense': ")


def test_an_empty_registry(store: Store, limbeck: Limbeck) -> None:
    assert json.loads(limbeck("models", "list", "--format", "json").out) == []
    result = limbeck("models", "show", "still/1")
    assert (result.code, "nothing is registered yet" in result.err) == (2, True)


def test_show(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    limbeck("promote", "still")
    result = limbeck("models", "show", "still@production")
    assert result.code == 0
    for words in (
        scored.variants["int8"].digest,
        "0.970 [0.950, 0.990]",
        "newest verdict: pass",
        "model.onnx",
        "mean_kl",
        "limbeck deploy still/4 --to DIR",
    ):
        assert words in result.out
    about = json.loads(limbeck("models", "show", "still/4", "--format", "json").out)
    assert (about["parent"], about["aliases"]) == ("still/2", ["production"])
    assert about["files"] == {"config.json": 23, "model.onnx": 400}
    assert [card["model"] for card in about["scorecards"]] == ["still/4"]
    assert [verdict["outcome"] for verdict in about["verdicts"]] == ["pass"]
    assert limbeck("models", "show", "still").code == 2


def test_lineage(still: Still, limbeck: Limbeck) -> None:
    lines = limbeck("models", "lineage", "still").out.split("\n")
    tree = [line.split("│", 1)[1] for line in lines if "still/" in line]
    assert [line[:14].rstrip() for line in tree] == [
        " still/1",
        " └─ still/2",
        "    ├─ still/3",
        "    ├─ still/4",
        "    └─ still/5",
    ]
    (root,) = json.loads(limbeck("models", "lineage", "still/4", "--format", "json").out)
    student = root["children"][0]
    assert (root["version"], root["kind"], student["version"]) == ("still/1", "teacher", "still/2")
    assert [child["version"] for child in student["children"]] == ["still/4"]  # the way up alone
    (root,) = json.loads(limbeck("models", "lineage", "still/2", "--format", "json").out)
    assert len(root["children"][0]["children"]) == 3  # and all the way down
    still.store.client.delete_model_version("still", "1")
    (root,) = json.loads(limbeck("models", "lineage", "still", "--format", "json").out)
    assert (root["version"], root["missing"], root["children"][0]["version"]) == ("still/1", True, "still/2")
    assert "not there any more" in limbeck("models", "lineage", "still/5").out


def test_promote_and_rollback(scored: Still, limbeck: Limbeck, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIMBECK_USER", "ada")
    tried = limbeck("promote", "still", "--dry-run")
    assert (tried.code, tried.err) == (0, "still@production would be still/4 (it was nothing)\n")
    assert "retention 0.5000 [0.4000, 0.6000], at least 0.8000 is asked" in tried.out  # why not the cheapest
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
    result = limbeck("promote", "still", "--to", "v1")
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
    ledger.append(scored.store, "still", who="me", alias="production", action="promote", **fields)
    told = limbeck("models", "history", "still")
    assert (told.code, "entry 1 is not carried out yet" in told.err) == (0, True)


def states(result: Result) -> dict[str, str]:
    return {check["what"]: check["state"] for check in json.loads(result.out)}


def test_doctor_on_a_healthy_machine(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    limbeck("promote", "still")
    result = limbeck("doctor", "--deep", "--format", "json")
    assert result.code == 0
    found = states(result)
    assert "wrong" not in found.values()
    assert {"python", "packages", "machine", "state folder", "CUDA", "bf16", "tracking store"} <= found.keys()
    assert found["hub"] == "note"  # HF_HUB_OFFLINE is set
    assert found["artifacts"] == found["aliases of still"] == "ok"


def test_doctor_before_anything_is_there(limbeck_home: Path, limbeck: Limbeck) -> None:
    result = limbeck("doctor", "--format", "json")
    assert (result.code, states(result)["tracking store"]) == (0, "note")
    assert not (limbeck_home / "mlflow.db").exists()


def test_doctor_finds_what_is_wrong(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    limbeck("promote", "still/3")
    store = scored.store
    weights = store.folder(scored.variants["int8"]) / "model.onnx"
    weights.write_text(weights.read_text()[:-1] + "!")
    assert limbeck("doctor").code == 0  # it is there
    deep = limbeck("doctor", "--deep", "--format", "json")
    assert (deep.code, states(deep)["still/4"]) == (1, "wrong")
    shutil.rmtree(weights.parent)
    quick = limbeck("doctor", "--format", "json")
    assert (quick.code, states(quick)["still/4"]) == (1, "wrong")
    store.client.delete_model_version("still", "3")
    result = limbeck("doctor")
    assert "aliases of still: look at: limbeck models history still --verify" in result.err
    assert "production points at no version, but the ledger says version 3" in result.out
    (home() / "mlflow.db").write_text("this is no database at all, but some text that is long enough")
    result = limbeck("doctor")
    assert (result.code, "not a database" in result.out) == (1, True)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom limbeck import main\n"
        "try: main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'mlflow', 'pydantic', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    for command in ("models", "promote", "doctor"):
        done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
