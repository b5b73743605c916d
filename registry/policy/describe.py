"""Describes what a policy requires, rule by rule."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.policy.plugins import find_plugin
from limbeck.registry.policy.schema import ApprovalRules, Policy, QualityRules
from limbeck.registry.records import FIGURES, limit_name

COST_FIGURES = {name: figure.description for name, figure in FIGURES.items()} | {
    "cost_ratio": "dollars per million tokens over the teacher's"
}
PARITY_FIGURES = {
    "mean_kl": "mean KL to its PyTorch model, nats per token",
    "p99_kl": "KL to its PyTorch model of 99 tokens in 100, nats",
    "top1_agreement": "share of tokens on which it and its PyTorch model agree",
    "bits_per_byte_increase": "bits per byte over its PyTorch model's",
}


def describe_policy(policy: Policy) -> Iterator[tuple[str, str]]:
    """Each rule of a policy and what it requires; at the end, who may override it."""
    yield from _describe_quality(policy.quality)
    yield from _describe_limits("cost", COST_FIGURES, policy.cost.model_dump(exclude_none=True))
    if policy.lineage.require_distillation_licence:
        yield "lineage.require_distillation_licence", "the licence of each teacher allows a student to learn from it"
    if policy.lineage.max_contamination is not None:
        text = f"at most {policy.lineage.max_contamination:.4g} of each task's documents occur in the training text"
        yield "lineage.max_contamination", text
    for kind, allowed in policy.licence:
        if allowed is not None:
            yield f"licence.{kind}", f"its licence is one of {', '.join(allowed)}"
    if policy.parity.required:
        yield "parity.required", "an ONNX variant was compared with its PyTorch model, and passed"
    parity = policy.parity.model_dump(exclude={"required"}, exclude_none=True)
    yield from _describe_limits("parity", PARITY_FIGURES, parity)
    if policy.deploy.aliases:
        yield "deploy.aliases", f"under {', '.join(policy.deploy.aliases)}: a version that limbeck serve runs"
    if policy.approvals.needed:
        yield "approvals.needed", _describe_approvals(policy.approvals)
    for name, options in policy.rules.items():
        plugin = find_plugin(name)
        option_texts = ", ".join(f"{key} = {value}" for key, value in options.items())
        text = f"{plugin.summary() or 'a rule in Python'} ({plugin.package})"
        yield f"rules.{name}", text + (f": {option_texts}" if option_texts else "")
    people = policy.override.people
    yield "override", f"{', '.join(people)} may override it" if people else "nobody may override it"


def cost_limits_table() -> str:
    """The cost limits of a policy as a Markdown table, for docs/policy.md."""
    keys = {limit_name(name): COST_FIGURES[name] for name in FIGURES} | {"max_cost_ratio": COST_FIGURES["cost_ratio"]}
    return "| key | limits |\n| --- | --- |\n" + "".join(f"| `{key}` | {text} |\n" for key, text in keys.items())


def _describe_quality(rules: QualityRules) -> Iterator[tuple[str, str]]:
    interval = f", compared with the lower end of its {rules.confidence * 100:g}% interval"
    if rules.tasks:
        yield "quality.tasks", f"it was scored on {', '.join(rules.tasks)}"
    if rules.min_documents is not None:
        yield "quality.min_documents", f"on at least {rules.min_documents:,} documents of each task"
    if rules.max_age_days is not None:
        yield "quality.max_age_days", f"at most {rules.max_age_days:g} days ago"
    if rules.min_retention is not None:
        text = f"at least {rules.min_retention:g} of the teacher's quality, mean over the tasks"
        yield "quality.min_retention", text + interval
    for task, limit in rules.min_task_retention.items():
        text = f"at least {limit:g} of the teacher's quality on {task}"
        yield f"quality.min_task_retention.{task}", text + interval
    for key, margin in rules.margin.items():
        text = f"worse than the teacher by less than {margin:g} on {key}, a task or a metric of tasks"
        yield f"quality.margin.{key}", text + interval
    if not (rules.min_retention is not None or rules.min_task_retention or rules.margin):
        yield "quality", "nothing is required of its quality"


def _describe_limits(section: str, figures: dict[str, str], limits: dict[str, float]) -> Iterator[tuple[str, str]]:
    for key, limit in limits.items():
        bound, _, figure = key.partition("_")
        number = f"{limit:,}" if limit >= 1000 else f"{limit:g}"
        yield f"{section}.{key}", f"at {'most' if bound == 'max' else 'least'} {number} {figures[figure]}"


def _describe_approvals(rules: ApprovalRules) -> str:
    of_people = f" of {', '.join(rules.people)}" if rules.people else ""
    text = f"approved by {rules.needed}{of_people}, neither its author nor who made the request"
    return f"{text}, and signed with the key of each" if rules.keys else text
