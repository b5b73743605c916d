"""`limbeck doctor`, as a user types it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from limbeck.registry.core.home import home
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


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
