"""Controls: what the same student becomes without the teacher, at equal tokens and at equal cost, and untrained.

Cost is time on this machine; the dollars of an endpoint count as the time that they would have bought here.
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
    """What a student took, in seconds of this machine: its training, and the teacher's part in full."""

    training: float
    teacher: float

    @property
    def seconds(self) -> float:
        return self.training + self.teacher


def records_to_match(setting: Setting, plan: Plan, store: Store) -> list[tuple[Plan, TrainingCost]]:
    """What the matched students took. Raises Refused where one of them was not made."""
    found = []
    for other in plans_to_match(setting.recipe, plan):
        version = store.find_version(setting.recipe.name, engine="torch", recipe_digest=student_key(setting, other))
        making = store.training_cost(version) if version else None
        if making is None:
            raise Refused(
                f"{plan.label}: it is as long as {other.label} took, which was not made",
                fix=f"run the same command again when {other.label} can be made",
            )
        found.append((other, making))
    return found


def cost(making: TrainingCost, recipe: Recipe) -> Cost:
    """What a student cost in all, as seconds of this machine."""
    dollars, hour = making.api_usd or 0.0, recipe.budget.usd_per_hour
    bought = dollars / hour * 3600 if hour else 0.0  # a recipe with both has a price for an hour
    return Cost(making.training_seconds, making.teacher_seconds + bought)


def schedule(setting: Setting, plan: Plan, others: list[tuple[Plan, TrainingCost]]) -> tuple[Training, Budget]:
    """How long a student trains.

    Labels at equal cost train for as many steps as labels at equal tokens would have made in the time of the
    costliest distilled student, the teacher's pass counted in full: fixed beforehand, so that the learning rate
    comes to its end. Where they need more text than there is they read it again.
    """
    recipe = setting.recipe
    training = recipe.training_of(plan.student)
    distilled = [(other, making) for other, making in others if other.control is None]
    if not distilled:
        return training, recipe.budget
    if plan.control == "labels":
        return training, Budget(max_tokens=max(making.tokens for _, making in distilled))
    dearest, spent = max(((other, cost(making, recipe)) for other, making in distilled), key=lambda of: of[1].seconds)
    labels = next(making for other, making in others if other.control == "labels")
    blocks = training.per_device_train_batch_size * training.gradient_accumulation_steps * distributed.world_size()
    step = blocks * setting.train.ids.shape[1]
    tokens = labels.tokens * spent.seconds / labels.training_seconds
    print_status(
        f"  {plan.label}: {tokens:,.0f} tokens, in the {spent.seconds:,.0f} s that {dearest.label} cost "
        f"({spent.training:,.0f} s of training, {spent.teacher:,.0f} s of the teacher)"
    )
    return training.model_copy(update={"max_steps": max(1, round(tokens / step))}), Budget()
