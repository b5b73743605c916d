"""The one metric that Limbeck records for each task."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.config.group import AggMetricConfig


class Metric(NamedTuple):
    """The one metric that is recorded for a task, and the lm-eval filter it is computed after."""

    name: str
    filter: str

    @property
    def key(self) -> str:
        """The key in lm-eval's results."""
        return f"{self.name},{self.filter}"


class MetricChoice(NamedTuple):
    """What a user asked for: task or group -> metric, and task or group -> filter."""

    metrics: Mapping[str, str] = {}
    filters: Mapping[str, str] = {}

    def for_task(self, name: str, groups: Mapping[str, Group]) -> tuple[str | None, str | None]:
        """(metric, filter) of a task, by its own name or that of a group around it; None for its own."""
        around = [group.name for group in groups.values() if name in {task.task_name for task in group.get_all_tasks()}]
        metric, filter_name = (
            next((wanted[each] for each in (name, *around) if each in wanted), None)
            for wanted in (self.metrics, self.filters)
        )
        return metric, filter_name

    def check_names(self, known: Collection[str]) -> None:
        """Raise BadInput for a task or group that is not among those that are scored."""
        for option, wanted in (("--metric", self.metrics), ("--filter", self.filters)):
            for name in wanted:
                if name not in known:
                    raise BadInput(f"{option} names the task {name!r}", fix=f"the tasks are {', '.join(known)}")


DEFAULT_CHOICE = MetricChoice()


def choose_metric(name: str, task: Task, groups: Mapping[str, Group], choice: MetricChoice = DEFAULT_CHOICE) -> Metric:
    """The metric that was asked for, else that of the task's group, else the task's first mean over documents.

    Raises BadInput if the task has no such metric or filter, or the group no value of that metric.
    """
    from lm_eval.api.metrics import bits_per_byte, mean

    means = [metric for metric, how in task.aggregation().items() if how in (mean, bits_per_byte)]
    if not means:
        raise BadInput(
            f"task {name} has no metric that is a mean over its documents: {', '.join(task.aggregation())}",
            fix="give it acc, exact_match or bits_per_byte",
        )
    filters = [each.name for each in task._filters]
    metric, filter_name = choice.for_task(name, groups)
    for wanted, known, what in ((metric, means, "mean over documents called"), (filter_name, filters, "filter")):
        if wanted is not None and wanted not in known:
            raise BadInput(f"task {name} has no {what} {wanted!r}", fix=f"it has {', '.join(known)}")
    for group, leaves in outermost_groups(groups).items():
        if name in leaves and (found := group_aggregation(groups[group], metric)):
            chosen = metric or (found.metric if found.metric in means else means[0])
            listed = found.filter_list if chosen == found.metric else None
            return Metric(chosen, filter_name or (listed or filters)[0])
    return Metric(metric or means[0], filter_name or filters[0])


def group_aggregation(group: Group, metric: str | None) -> AggMetricConfig | None:
    """How a group combines its tasks' values of a metric; of None its first metric.

    Raises BadInput if the group has values, but none of this metric.
    """
    known = group.aggregate_metric_list or []
    for each in known:
        if metric in (None, each.metric):
            return each
    if known:
        has = ", ".join(each.metric for each in known)
        raise BadInput(f"group {group.name} has no value of {metric}", fix=f"its aggregate_metric_list has {has}")
    return None


def check_one_metric(chosen: Mapping[str, Metric], groups: Mapping[str, Group]) -> None:
    """Raise BadInput for a group with a value whose tasks were given different metrics or filters."""
    for group, leaves in outermost_groups(groups).items():
        different = {chosen[leaf].key: leaf for leaf in leaves if leaf in chosen}
        if len(different) > 1:
            (one, first), (other, second), *_ = different.items()
            raise BadInput(
                f"group {group} has one value, but {first} is scored by {one} and {second} by {other}",
                fix=f"give the metric or filter of the group: {group}=NAME",
            )


def outermost_groups(groups: Mapping[str, Group]) -> dict[str, list[str]]:
    """Group -> its tasks, for each group that has a value of its own and is in no other such group."""
    valued = [group for group in groups.values() if group.has_aggregation]
    inner = {below.name for group in valued for below in group.get_all_groups()}
    return {
        group.name: [task.task_name for task in group.get_all_tasks()] for group in valued if group.name not in inner
    }
