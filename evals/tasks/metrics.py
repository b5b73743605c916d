"""The one metric that Limbeck records for each task."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task


class Metric(NamedTuple):
    """The one metric that is recorded for a task, and the lm-eval filter it is computed after."""

    name: str
    filter: str

    @property
    def key(self) -> str:
        """The key in lm-eval's results."""
        return f"{self.name},{self.filter}"


def choose_metric(name: str, task: Task, groups: dict[str, Group]) -> Metric:
    """The metric of the task's group, else the task's first metric that is a mean over documents.

    Raises BadInput if the task has no such metric.
    """
    from lm_eval.api.metrics import bits_per_byte, mean

    means = [metric for metric, how in task.aggregation().items() if how in (mean, bits_per_byte)]
    first_filter = task._filters[0].name
    for group, leaves in outermost_groups(groups).items():
        of_group = groups[group].aggregate_metric_list[0]  # type: ignore[index]
        if name in leaves and of_group.metric in means:
            return Metric(of_group.metric, (of_group.filter_list or [first_filter])[0])
    if not means:
        raise BadInput(
            f"task {name} has no metric that is a mean over its documents: {', '.join(task.aggregation())}",
            fix="give it acc, exact_match or bits_per_byte",
        )
    return Metric(means[0], first_filter)


def outermost_groups(groups: dict[str, Group]) -> dict[str, list[str]]:
    """Group -> its tasks, for each group that has a value of its own and is in no other such group."""
    valued = [group for group in groups.values() if group.has_aggregation]
    inner = {below.name for group in valued for below in group.get_all_groups()}
    return {
        group.name: [task.task_name for task in group.get_all_tasks()] for group in valued if group.name not in inner
    }
