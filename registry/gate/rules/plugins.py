"""Judge a version by rules in Python (limbeck.registry.policy.plugins)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from limbeck.registry.core.toml import describe_error
from limbeck.registry.records import RuleResult

if TYPE_CHECKING:
    from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.policy.plugins import RULE_FAILURES, RulePlugin, _cut, _format_exception, find_plugin


def plugin_results(rules: Mapping[str, Mapping[str, Any]], evidence: Evidence) -> Iterator[RuleResult]:
    """What each rule says of the evidence; inconclusive where it cannot be asked, or is broken."""
    for name, options in rules.items():
        try:
            plugin = find_plugin(name)
            given = plugin.options.model_validate(options)
        except RULE_FAILURES as error:
            yield RuleResult(rule=f"rules.{name}", outcome="inconclusive", message=_cut(" ".join(str(error).split())))
            continue
        arguments = {field: getattr(given, field) for field in type(given).model_fields} | (given.model_extra or {})
        try:
            answer = plugin.rule(evidence, **arguments)
            results = [answer] if isinstance(answer, RuleResult) else _results(answer)
        except RULE_FAILURES as error:
            results = [_broken_rule_result(name, f"it raised {_format_exception(error)}")]
        for each in results or [_broken_rule_result(name, "it gave no result")]:
            yield _validated_result(plugin, each)


def _results(answer: Any) -> list[RuleResult]:
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | Mapping):
        raise TypeError(f"gave a {type(answer).__name__}, no RuleResult")
    results = list(answer)
    for each in results:
        if not isinstance(each, RuleResult):
            raise TypeError(f"gave a {type(each).__name__}, no RuleResult")
    return results


def _validated_result(plugin: RulePlugin, result: RuleResult) -> RuleResult:
    """A rule's result under the name that the policy has for it, with the package that it is of."""
    name = plugin.name
    try:
        result = RuleResult.model_validate(result.model_dump(warnings=False))
    except ValidationError as error:
        result = _broken_rule_result(name, f"its result is none: {describe_error(error.errors()[0])}")
    own = result.rule.removeprefix("rules.").removeprefix(name).strip(".")
    return RuleResult(
        rule=f"rules.{name}" + (f".{own[:100]}" if own else ""),
        outcome=result.outcome,
        message=f"{_cut(result.message)} ({plugin.package})",
    )


def _broken_rule_result(name: str, why: str) -> RuleResult:
    return RuleResult(rule=name, outcome="inconclusive", message=f"{why}: mend the rule, or leave it out of the policy")
