"""Rules in Python from installed packages (`[rules.NAME]` of a policy), applied to the evidence about a version.

`limbeck.registry.policy.plugins` finds the rules and checks their options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from limbeck.registry.core.toml import describe_error
from limbeck.registry.gate.evidence import Evidence
from limbeck.registry.policy.plugins import RULE_FAILURES, RulePlugin, cut_message, find_plugin, format_exception
from limbeck.registry.records import RuleResult


def plugin_results(rules: Mapping[str, Mapping[str, Any]], evidence: Evidence) -> Iterator[RuleResult]:
    """The results of each rule; inconclusive if a rule is not installed or is broken."""
    for name, options in rules.items():
        try:
            plugin = find_plugin(name)
            parsed = plugin.options.model_validate(options)
        except RULE_FAILURES as error:
            message = cut_message(" ".join(str(error).split()))
            yield RuleResult(rule=f"rules.{name}", outcome="inconclusive", message=message)
            continue
        arguments = {field: getattr(parsed, field) for field in type(parsed).model_fields} | (parsed.model_extra or {})
        try:
            answer = plugin.rule(evidence, **arguments)
            results = [answer] if isinstance(answer, RuleResult) else _list_of_results(answer)
        except RULE_FAILURES as error:
            results = [_broken_rule_result(name, f"it raised {format_exception(error)}")]
        for each in results or [_broken_rule_result(name, "it returned no result")]:
            yield _validated_result(plugin, each)


def _list_of_results(answer: Any) -> list[RuleResult]:
    if not isinstance(answer, Iterable) or isinstance(answer, str | bytes | Mapping):
        raise TypeError(f"returned a {type(answer).__name__}, not a RuleResult")
    results = list(answer)
    for each in results:
        if not isinstance(each, RuleResult):
            raise TypeError(f"returned a {type(each).__name__}, not a RuleResult")
    return results


def _validated_result(plugin: RulePlugin, result: RuleResult) -> RuleResult:
    """A rule's result under the name that the policy has for it, with the package in its message."""
    name = plugin.name
    try:
        result = RuleResult.model_validate(result.model_dump(warnings=False))
    except ValidationError as error:
        result = _broken_rule_result(name, f"its result is invalid: {describe_error(error.errors()[0])}")
    own_name = result.rule.removeprefix("rules.").removeprefix(name).strip(".")
    return RuleResult(
        rule=f"rules.{name}" + (f".{own_name[:100]}" if own_name else ""),
        outcome=result.outcome,
        message=f"{cut_message(result.message)} ({plugin.package})",
    )


def _broken_rule_result(name: str, why: str) -> RuleResult:
    message = f"{why}: fix the rule, or leave it out of the policy"
    return RuleResult(rule=name, outcome="inconclusive", message=message)
