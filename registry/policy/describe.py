"""A policy in words: what it asks, rule by rule."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.registry.policy.plugins import find_plugin
from limbeck.registry.policy.schema import Policy, QualityRules
from limbeck.registry.records import FIGURES

COST = {name: figure.description for name, figure in FIGURES.items()} | {
    "cost_ratio": "dollars per million tokens over the teacher's"
}
PARITY = {
    "mean_kl": "mean KL to its PyTorch model, nats per token",
    "p99_kl": "KL to its PyTorch model of 99 tokens in 100, nats",
    "top1_agreement": "share of tokens on which it and its PyTorch model agree",
    "bits_per_byte_increase": "bits per byte over its PyTorch model's",
}


def describe_policy(policy: Policy) -> Iterator[tuple[str, str]]:
    """Each rule of a policy and what it asks; at the end, who may go over it."""
    yield from _quality(policy.quality)
    yield from _limits("cost", COST, policy.cost.model_dump(exclude_none=True))
    if policy.lineage.require_distillation_licence:
        yield "lineage.require_distillation_licence", "the licence of each teacher lets a student learn from it"
    if policy.lineage.max_contamination is not None:
        words = f"at most {policy.lineage.max_contamination:.4g} of each task's documents occur in the training text"
        yield "lineage.max_contamination", words
    for kind, allowed in policy.licence:
        if allowed is not None:
            yield f"licence.{kind}", f"its licence is one of {', '.join(allowed)}"
    if policy.parity.required:
        yield "parity.required", "an ONNX variant was held against its PyTorch model, and passed"
    parity = policy.parity.model_dump(exclude={"required"}, exclude_none=True)
    yield from _limits("parity", PARITY, parity)
    yield from _people(policy)
    for name, options in policy.rules.items():
        plugin = find_plugin(name)
        given = ", ".join(f"{key} = {value}" for key, value in options.items())
        words = f"{plugin.summary() or 'a rule in Python'} ({plugin.package})"
        yield f"rules.{name}", words + (f": {given}" if given else "")
    people = policy.override.people
    yield "override", f"{', '.join(people)} may go over it" if people else "nobody may go over it"


def _quality(rules: QualityRules) -> Iterator[tuple[str, str]]:
    at = f", held against the lower end of its {rules.confidence * 100:g}% interval"
    if rules.tasks:
        yield "quality.tasks", f"it was scored on {', '.join(rules.tasks)}"
    if rules.min_documents is not None:
        yield "quality.min_documents", f"on at least {rules.min_documents:,} documents of each task"
    if rules.max_age_days is not None:
        yield "quality.max_age_days", f"at most {rules.max_age_days:g} days ago"
    if rules.min_retention is not None:
        words = f"at least {rules.min_retention:g} of the teacher's quality, mean over the tasks"
        yield "quality.min_retention", words + at
    for task, limit in rules.min_task_retention.items():
        yield f"quality.min_task_retention.{task}", f"at least {limit:g} of the teacher's quality on {task}{at}"
    for key, margin in rules.margin.items():
        words = f"worse than the teacher by less than {margin:g} on {key}, a task or a metric of tasks"
        yield f"quality.margin.{key}", words + at
    if not (rules.min_retention is not None or rules.min_task_retention or rules.margin):
        yield "quality", "nothing is asked of how good it is"


def _limits(section: str, names: dict[str, str], limits: dict[str, float]) -> Iterator[tuple[str, str]]:
    for name, limit in limits.items():
        bound, _, field = name.partition("_")
        number = f"{limit:,}" if limit >= 1000 else f"{limit:g}"
        yield f"{section}.{name}", f"at {'most' if bound == 'max' else 'least'} {number} {names[field]}"


def _people(policy: Policy) -> Iterator[tuple[str, str]]:
    asked = policy.approvals
    if not asked.needed:
        return
    of = f" of {', '.join(asked.people)}" if asked.people else ""
    words = f"approved by {asked.needed}{of}, neither who made it nor who asked for it"
    yield "approvals.needed", words + (", and signed with the key of each" if asked.keys else "")
