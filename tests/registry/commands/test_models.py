"""`limbeck models`, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from limbeck.registry.mlflow.store import Store
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


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
    for text in (
        scored.variants["int8-weight"].digest,
        "0.970 [0.950, 0.990]",
        "newest gate decision: pass",
        "model.onnx",
        "mean_kl",
        "limbeck deploy still/4 --output DIR",
    ):
        assert text in result.out
    about = json.loads(limbeck("models", "show", "still/4", "--format", "json").out)
    assert (about["parent"], about["aliases"]) == ("still/2", ["production"])
    assert about["files"] == {"config.json": 23, "model.onnx": 1100}
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
    assert [child["version"] for child in student["children"]] == ["still/4"]  # its ancestors only
    (root,) = json.loads(limbeck("models", "lineage", "still/2", "--format", "json").out)
    assert len(root["children"][0]["children"]) == 3  # and all its descendants
    still.store.client.delete_model_version("still", "1")
    (root,) = json.loads(limbeck("models", "lineage", "still", "--format", "json").out)
    assert (root["version"], root["missing"], root["children"][0]["version"]) == ("still/1", True, "still/2")
    assert "deleted" in limbeck("models", "lineage", "still/5").out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom limbeck.cli import main\n"
        "try: main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'mlflow', 'pydantic', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    for command in ("models", "promote", "doctor"):
        done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
