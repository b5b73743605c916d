"""The rule on deployment: under an alias that is served, a version has to be one that `limbeck serve` runs."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.gate.rules.limits import rule_result
from limbeck.registry.policy.schema import DeployRules
from limbeck.registry.records import RuleResult, Version

NAME = "deploy.aliases"


def deployment_results(rules: DeployRules, evidence: Evidence) -> Iterator[RuleResult]:
    """Whether the version can be served. Empty if the alias is not one of those that are served."""
    if evidence.alias not in rules.aliases:
        return
    obstacle = serving_obstacle(evidence.version)
    if obstacle is None:
        yield rule_result(NAME, "pass", "limbeck serve runs it")
    else:
        yield rule_result(NAME, "fail", f"{evidence.alias} is served, and this is {obstacle}")


def serving_obstacle(version: Version) -> str | None:
    """What keeps `limbeck serve` from running a version, and what to do; None if it runs it."""
    if version.engine == "onnxruntime":
        return None
    if version.engine == "endpoint":
        return "an endpoint, which limbeck serve does not run; promote a model that was distilled from it"
    return f"a PyTorch model, which limbeck serve does not run; export it: limbeck export {version.ref}"
