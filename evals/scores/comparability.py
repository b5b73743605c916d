"""Group the scorecards that may be ranked together: those that were measured the same way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from limbeck.registry.records import Cost, Relative, Scorecard, TaskResult, top_level_tasks


class MeasurementSetting(NamedTuple):
    """What the scorecards of one ranking have in common; None for a part that a scorecard does not have."""

    tasks: str  # digest of the tasks and their documents
    prompts: str
    harness: str
    teacher: str | None  # its digest
    cost: tuple[object, ...] | None  # Cost.setting

    def is_compatible_with(self, other: MeasurementSetting) -> bool:
        """Whether every part that this setting has equals that of `other`."""
        return self[:3] == other[:3] and self.teacher in (None, other.teacher) and self.cost in (None, other.cost)


def measurement_setting(card: Scorecard, task: str | None = None) -> MeasurementSetting:
    """The setting of a scorecard, or of one task of it."""
    result = card.tasks[task] if task else None
    return MeasurementSetting(
        result.task_hash if result else card.tasks_digest,
        result.prompt_hash if result else card.prompts_digest,
        card.harness,
        card.relative.teacher_digest if card.relative else None,
        card.cost.setting if card.cost else None,
    )


def group_comparable(cards: Mapping[int, Sequence[Scorecard]], task: str | None = None) -> list[dict[int, Scorecard]]:
    """Group the scorecards that were measured the same way: the largest group first, the newer of equals.

    Each version appears in the largest group that it has a scorecard for, with its newest scorecard there; one that
    is relative to the teacher and has a cost is preferred.

    Args:
        cards: scorecards by version number, oldest first; those without the task are left out.
    """
    with_settings = {
        number: sorted(
            ((measurement_setting(card, task), card) for card in several if not task or task in card.tasks),
            key=_completeness,
        )
        for number, several in cards.items()
    }
    merged = _merge_settings([setting for several in with_settings.values() for setting, _ in several])
    cards_by_setting: dict[MeasurementSetting, dict[int, Scorecard]] = defaultdict(dict)
    for number, several in with_settings.items():
        for setting, card in several:
            cards_by_setting[merged[setting]][number] = card  # the last one stays
    groups: list[dict[int, Scorecard]] = []
    taken: set[int] = set()
    for group in sorted(cards_by_setting.values(), key=_size_and_age, reverse=True):
        groups.append({number: card for number, card in group.items() if number not in taken})
        taken |= group.keys()
    return sorted(filter(None, groups), key=len, reverse=True)


def _size_and_age(group: Mapping[int, Scorecard]) -> tuple[int, datetime]:
    """A sort key: how many versions a group has, then its newest scorecard."""
    return len(group), max(card.created for card in group.values())


def _completeness(scored: tuple[MeasurementSetting, Scorecard]) -> tuple[int, datetime]:
    """A sort key: how many parts a scorecard has, then how new it is."""
    setting, card = scored
    return -setting.count(None), card.created


def _merge_settings(settings: Sequence[MeasurementSetting]) -> dict[MeasurementSetting, MeasurementSetting]:
    """Map each setting to itself, or to the most frequent compatible setting that has the parts it lacks."""
    counts = Counter(settings)
    kept_by_task: dict[tuple[str, ...], list[MeasurementSetting]] = defaultdict(list)
    merged: dict[MeasurementSetting, MeasurementSetting] = {}
    # Settings with fewer missing parts come first, so that the others can join them; then the most frequent.
    for setting in sorted(counts, key=lambda setting: (setting.count(None), -counts[setting])):
        kept = kept_by_task[setting[:3]]
        merged[setting] = next((other for other in kept if setting.is_compatible_with(other)), setting)
        if merged[setting] is setting:
            kept.append(setting)
    return merged


def describe_differences(
    cards: Collection[Scorecard], others: Collection[Scorecard], task: str | None = None
) -> list[str]:
    """Describe how the setting of some scorecards differs from that of others."""
    (ours, card), (theirs, other) = (
        max(((measurement_setting(card, task), card) for card in side), key=_completeness) for side in (cards, others)
    )
    found = [] if ours[:2] == theirs[:2] else list(_tasks(card, other, task))
    if ours.harness != theirs.harness:
        found.append(f"scored with {card.harness}, not {other.harness}")
    if ours.teacher != theirs.teacher:
        found.append(_teacher(card.relative, other.relative))
    if ours.cost != theirs.cost:
        found.append(describe_cost_difference(card.cost, other.cost))
    return found


def _tasks(card: Scorecard, other: Scorecard, task: str | None) -> Iterator[str]:
    ours, theirs = ([task] if task else top_level_tasks(each.tasks) for each in (card, other))
    if set(ours) != set(theirs):
        yield f"scored on {_join_names(ours)}"
        return
    for name in ours:
        here, there = card.tasks[name], other.tasks[name]
        if here.full_metric != there.full_metric:
            yield f"{here.full_metric} of {name}, not {there.full_metric}"
        elif here.documents != there.documents:
            yield f"{here.documents:,} documents of {name}, not {there.documents:,}"
        elif here.limit_seed != there.limit_seed:
            yield f"{_sample(here)} of {name}, not {_sample(there)}"
        elif here.task_hash != there.task_hash:
            yield f"another version, or other documents, of {name}"
        elif here.prompt_hash != there.prompt_hash:
            yield f"other prompts of {name}"


def _sample(result: TaskResult) -> str:
    """How the documents were chosen, in words."""
    if result.limit_seed is not None:
        return f"the sample with seed {result.limit_seed}"
    return "picked documents" if result.documents != (result.of_documents or result.documents) else "all documents"


def _teacher(ours: Relative | None, theirs: Relative | None) -> str:
    if ours is None:
        return "without a teacher"
    same_name = theirs is not None and ours.teacher == theirs.teacher
    return f"against {'other files of ' if same_name else ''}{ours.teacher} as the teacher"


def describe_cost_difference(ours: Cost | None, theirs: Cost | None) -> str:
    """Describe how the measurement of one cost differs from that of another, which has a different setting."""

    if ours is None or theirs is None:
        return "without a cost" if ours is None else "with a cost"
    pairs = [
        pair
        for pair in zip(_describe_cost_setting(ours), _describe_cost_setting(theirs), strict=True)
        if len(set(pair)) > 1
    ]
    here, there = (", ".join(words) for words in zip(*pairs, strict=True))
    return f"cost measured {here}, not {there}"


def _describe_cost_setting(cost: Cost) -> list[str]:
    """The parts of `Cost.setting` in words."""
    machine, threads, prompt, new, price, protocol = cost.setting
    request = f"for {prompt} tokens in and {new} out"
    return [
        f"on {machine}",
        f"with {threads} thread{'s' * (threads != 1)}",
        request,
        f"at ${price:g} an hour",
        f"by protocol {protocol}",
    ]


def _join_names(names: Sequence[str], at_most: int = 4) -> str:
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
