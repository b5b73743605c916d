"""`limbeck doctor`, as a user types it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from limbeck.registry.core.home import home
from limbeck.registry.core.overlay import overlay_versions
from limbeck.registry.doctor.checks import read_tested_versions
from tests.conftest import Result
from tests.registry.conftest import Still

Limbeck = Callable[..., Result]


def states(result: Result) -> dict[str, str]:
    return {check["subject"]: check["state"] for check in json.loads(result.out)}


def findings(result: Result) -> dict[str, str]:
    return {check["subject"]: check["found"] for check in json.loads(result.out)}


REQUIRED = [
    "click>=8.0",
    "limbeck[registry]; extra == 'serve'",
    "absent-one>=1; extra == 'serve'",
    "scipy>=99; extra == 'registry'",
    "numpy<2; extra == 'other'",
    "absent-two; extra == 'other'",
    "absent-three; extra == 'dev'",
]


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


def test_doctor_says_whether_optimum_is_installed_and_how_to_install_it(
    limbeck_home: Path, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(limbeck_home / "cache"))
    monkeypatch.setattr(sys, "prefix", str(limbeck_home))
    result = limbeck("doctor", "--format", "json")
    assert states(result)["optimum"] == "note"
    assert "limbeck doctor --install-optimum" in findings(result)["optimum"]
    failed = limbeck("doctor", "--install-optimum")
    assert failed.code == 2
    assert "cannot be installed: No matching distribution found" in failed.err
    folder = find_folder_for_overlay(failed.err)
    folder.mkdir(parents=True)
    result = limbeck("doctor", "--format", "json")
    assert states(result)["optimum"] == "ok"
    assert findings(result)["optimum"].endswith(f"transformers {overlay_versions()['transformers']} in {folder}")
    assert limbeck("doctor", "--install-optimum").out == f"{folder}\n"


def find_folder_for_overlay(status: str) -> Path:
    return Path(status.splitlines()[0].rpartition(" in ")[2])


def test_doctor_finds_what_is_wrong(scored: Still, limbeck: Limbeck, policy: Path) -> None:
    limbeck("promote", "still/3")
    store = scored.store
    weights = store.artifacts.verified_folder(scored.variants["int8-weight"]) / "model.onnx"
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


def test_doctor_names_the_extra_of_what_is_not_installed(
    limbeck_home: Path, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: REQUIRED)
    result = limbeck("doctor", "--format", "json")
    found = findings(result)
    assert result.code == 1  # scipy, of an extra that is there as a whole
    assert found["extra serve"] == "not installed: absent-one; to install: pip install 'limbeck[serve]'"
    assert states(result)["extra serve"] == states(result)["extra other"] == "note"
    assert "extra dev" not in found
    assert (states(result)["scipy"], "required is >=99" in found["scipy"]) == ("wrong", True)
    assert states(result)["numpy"] == "note"  # its extra is not there as a whole
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["absent-four>=2"])
    result = limbeck("doctor", "--format", "json")
    assert (result.code, findings(result)["absent-four"]) == (1, "not installed")


def test_doctor_knows_the_tested_versions_or_says_that_it_does_not(
    limbeck_home: Path, limbeck: Limbeck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert read_tested_versions()["lm-eval"]
    pins = tmp_path / "constraints.txt"
    monkeypatch.setattr("limbeck.registry.doctor.checks.CONSTRAINTS", pins)
    pins.write_text("# pins\nclick==1.0\n")
    result = limbeck("doctor", "--format", "json")
    assert (states(result)["click"], "tested with 1.0" in findings(result)["click"]) == ("note", True)
    pins.unlink()
    result = limbeck("doctor", "--format", "json")
    assert states(result)["packages"] == "note"
    assert "unknown" in findings(result)["packages"]
    assert "have the tested version" not in result.out
