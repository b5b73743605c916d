"""Rules in Python from installed packages, beyond those of `limbeck.registry.policy.schema`: finds and checks them.

A package names its rules as entry points of the group `limbeck.rules`, in its pyproject.toml:

    [project.entry-points."limbeck.rules"]
    short_answers = "acme_rules:short_answers"

A policy uses a rule by a table of its name, whose keys are the rule's options:

    [rules.short_answers]
    max_tokens = 64

A rule is a callable. Its arguments are the evidence, and its options by name; it returns one result or several:

    def short_answers(evidence: Evidence, *, max_tokens: int) -> RuleResult: ...

The options are checked when the policy is loaded: by the annotations and defaults of the parameters, or by a pydantic
model if the callable has one as `Options`. A rule that raises, or returns anything else, is inconclusive: a broken
rule never passes. Rules run in the gate's own process, so install only rules that you trust.
`limbeck.registry.gate.rules.plugins` applies them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.toml import Problem, describe_error

GROUP = "limbeck.rules"
LONGEST = 2000  # characters of a message
RULE_FAILURES = (Exception, SystemExit)  # what a rule may raise; KeyboardInterrupt is the user's


class RulePlugin(NamedTuple):
    """An installed rule."""

    name: str
    rule: Callable[..., Any]
    options: type[BaseModel]
    package: str  # name and version, such as acme 1.2

    def summary(self) -> str:
        """The first line of the rule's docstring; empty without one."""
        return (inspect.getdoc(self.rule) or "").strip().partition("\n")[0]


def find_plugin(name: str) -> RulePlugin:
    """The installed rule of a name. Raises BadInput if there is none or several, or if it cannot be used."""
    installed = entry_points(group=GROUP)
    candidates = {f"{_package(each)} ({each.value})": each for each in installed if each.name == name}
    if not candidates:
        known = sorted({each.name for each in installed})
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"installed are: {', '.join(known)}" if known else "no installed package has any"
        raise BadInput(f"no rule {name} is installed" + (f"; did you mean {near[0]}?" if near else ""), fix=fix)
    if len(candidates) > 1:
        raise BadInput(f"the rule {name} is in {' and in '.join(sorted(candidates))}", fix="uninstall all but one")
    (entry,) = candidates.values()
    label = f"the rule {name} of {_package(entry)}"
    try:
        rule = entry.load()
    except RULE_FAILURES as error:
        raise BadInput(
            f"{label} cannot be imported: {format_exception(error)}", fix="install it again, or another version"
        ) from None
    if not callable(rule):
        raise BadInput(f"{label} is not a callable but a {type(rule).__name__}")
    try:
        return RulePlugin(name, rule, _options(rule), _package(entry))
    except RULE_FAILURES as error:
        raise BadInput(f"{label}: its options cannot be read: {format_exception(error)}") from None


def plugin_problems(rules: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """What is wrong with the `[rules.NAME]` tables of a policy."""
    for name, options in rules.items():
        key = ("rules", name)
        try:
            plugin = find_plugin(name)
        except BadInput as error:
            yield Problem(error.message, (key,), error.fix)
            continue
        try:
            plugin.options.model_validate(options)
        except ValidationError as error:
            for details in error.errors():
                yield _problem(plugin, details)
        except RULE_FAILURES as error:
            yield Problem(
                f"the options of {name} ({plugin.package}) cannot be checked: {format_exception(error)}", (key,)
            )


def _options(rule: Callable[..., Any]) -> type[BaseModel]:
    """The model of a rule's options: its `Options`, else one made from its parameters after the evidence."""
    own = getattr(rule, "Options", None)
    if isinstance(own, type) and issubclass(own, BaseModel):
        return own
    parameters = list(inspect.signature(rule).parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise TypeError("its first parameter has to be the evidence")
    options = [p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    fields: dict[str, Any] = {
        p.name: (Any if p.annotation is p.empty else p.annotation, ... if p.default is p.empty else p.default)
        for p in options
    }
    takes_any_option = any(p.kind is p.VAR_KEYWORD for p in parameters)
    config = ConfigDict(
        extra="allow" if takes_any_option else "forbid", protected_namespaces=(), arbitrary_types_allowed=True
    )
    module = getattr(rule, "__module__", None) or type(rule).__module__
    model = create_model("Options", __config__=config, __module__=module, **fields)
    model.model_rebuild(raise_errors=True)
    return model


def _problem(plugin: RulePlugin, details: Any) -> Problem:
    """The problem of one pydantic error in a rule's options."""
    key = ("rules", plugin.name, *details["loc"])
    name = ".".join(map(str, key))
    known = ", ".join(plugin.options.model_fields) or "none"
    if details["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(details["loc"][-1]), plugin.options.model_fields, n=1)
        message = f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else "")
        return Problem(message, (key,), f"options of {plugin.name} ({plugin.package}): {known}")
    if details["type"] == "missing":
        return Problem(f"{name} is missing", (key,), f"options of {plugin.name} ({plugin.package}): {known}")
    return Problem(f"{name}: {describe_error(details)}", (key,))


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def format_exception(error: BaseException) -> str:
    """The type and message of an exception."""
    return cut_message(f"{type(error).__name__}: {error}".rstrip(": "))


def cut_message(text: str) -> str:
    """The first `LONGEST` characters of a message."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
