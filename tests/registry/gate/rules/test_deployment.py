"""The rule on deployment: an alias that is served takes only versions that `limbeck serve` runs."""

from __future__ import annotations

import pytest

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.records import Version
from tests.registry.gate.rules.rule_helpers import ONNX, STUDENT, results

ENDPOINT = STUDENT.model_copy(update={"kind": "teacher", "engine": "endpoint"})


@pytest.mark.parametrize(
    ("version", "alias", "rules", "outcome"),
    [
        (ONNX, "production", {}, "pass"),
        (STUDENT, "production", {}, "fail"),
        (ENDPOINT, "production", {}, "fail"),
        (STUDENT, "baseline", {}, None),
        (STUDENT, "canary", {"deploy": {"aliases": ["production", "canary"]}}, "fail"),
        (STUDENT, "production", {"deploy": {"aliases": []}}, None),
    ],
)
def test_what_an_alias_takes(
    version: Version, alias: str, rules: dict[str, dict[str, list[str]]], outcome: str | None
) -> None:
    found = results(rules | {"licence": {"code": ["mit"]}}, Evidence(version, None, alias=alias))
    assert found.get("deploy.aliases", (None, ""))[0] == outcome


def test_the_message_names_the_command_that_helps() -> None:
    message = results({}, Evidence(STUDENT, None, alias="production"))["deploy.aliases"][1]
    assert message == (
        "production is served, and this is a PyTorch model, which limbeck serve does not run; "
        "export it: limbeck export still/4"
    )


def test_the_rule_alone_is_not_a_policy() -> None:
    found = results({"parity": {"required": False}}, Evidence(ONNX, None, alias="production"))
    assert found["deploy.aliases"] == ("pass", "limbeck serve runs it")
    assert found["policy"][0] == "inconclusive"
