"""Controls: the same student trained on labels alone, at equal tokens and at equal cost, and untrained.

Cost is time on this machine. Dollars paid to an endpoint count as the time that they would buy here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Budget, Recipe, Training
from limbeck.distill.students.keys import student_key
from limbeck.distill.students.matching import plans_to_match
from limbeck.distill.training import distributed
from limbeck.registry.core.errors import Refused
from limbeck.registry.core.terminal import print_status
from limbeck.registry.records import TrainingCost

if TYPE_CHECKING:
    from limbeck.distill.context import Setting
    from limbeck.registry.mlflow.store import Store


class Cost(NamedTuple):
    """The cost of a student in seconds of this machine: its training, and the teacher's whole part."""

    training: float
    teacher: float

    @property
    def seconds(self) -> float:
        return self.training + self.teacher


def matched_training_costs(setting: Setting, plan: Plan, store: Store) -> list[tuple[Plan, TrainingCost]]:
    """The training costs of the students that a control is matched with; empty if it is matched with none.

    Raises Refused if one of them is not registered.
    """
    costs = []
    for other in plans_to_match(setting.recipe, plan):
        version = store.find_version(setting.recipe.name, engine="torch", recipe_digest=student_key(setting, other))
        training_cost = store.runs.training_cost(version) if version else None
        if training_cost is None:
            raise Refused(
                f"{plan.label}: its length depends on {other.label}, which was not made",
                fix=f"run the same command again when {other.label} can be made",
            )
        costs.append((other, training_cost))
    return costs


def total_cost(training_cost: TrainingCost, recipe: Recipe) -> Cost:
    """The whole cost of a student, as seconds of this machine."""
    usd, usd_per_hour = training_cost.api_usd or 0.0, recipe.budget.usd_per_hour
    # A recipe with controls and endpoint prices has usd_per_hour: its checks require it.
    bought_seconds = usd / usd_per_hour * 3600 if usd_per_hour else 0.0
    return Cost(training_cost.training_seconds, training_cost.teacher_seconds + bought_seconds)


def training_and_budget(
    setting: Setting, plan: Plan, matched_costs: list[tuple[Plan, TrainingCost]]
) -> tuple[Training, Budget]:
    """The training settings and the budget of a student.

    Labels at equal tokens read as many tokens as the distilled student that read the most. Labels at equal cost take
    as many steps as labels at equal tokens would take in the time of the most expensive distilled student, with the
    teacher's whole pass. This number is fixed before the run, so that the learning rate completes its schedule. If it
    needs more text than there is, the text is read again.
    """
    recipe = setting.recipe
    training = recipe.training_of(plan.student)
    distilled = [(other, training_cost) for other, training_cost in matched_costs if other.control is None]
    if not distilled:
        return training, recipe.budget
    if plan.control == "labels":
        return training, Budget(max_tokens=max(training_cost.tokens for _, training_cost in distilled))
    costs = [(total_cost(training_cost, recipe), other) for other, training_cost in distilled]
    most, most_expensive = max(costs, key=lambda pair: pair[0].seconds)
    labels = next(training_cost for other, training_cost in matched_costs if other.control == "labels")
    blocks = training.per_device_train_batch_size * training.gradient_accumulation_steps * distributed.world_size()
    tokens_per_step = blocks * setting.train.ids.shape[1]
    tokens = labels.tokens * most.seconds / labels.training_seconds
    print_status(
        f"  {plan.label}: {tokens:,.0f} tokens, in the {most.seconds:,.0f} s that {most_expensive.label} cost "
        f"({most.training:,.0f} s of training, {most.teacher:,.0f} s of the teacher)"
    )
    return training.model_copy(update={"max_steps": max(1, round(tokens / tokens_per_step))}), Budget()
