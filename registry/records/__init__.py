"""The records: frozen pydantic models of versions and of all that is known about them. MLflow stores them as JSON."""

from limbeck.registry.records.base import (
    Engine,
    Estimate,
    Frozen,
    Kind,
    Outcome,
    Record,
)
from limbeck.registry.records.comparisons import (
    AnswerDifferences,
    ComparedModels,
    ComparedTask,
    ControlComparison,
    ControlTaskResult,
    Flip,
    LeaderboardRow,
    Noninferiority,
)
from limbeck.registry.records.cost import FIGURES, HEADLINES, USD, BatchCost, Cost, Figure, limit_name
from limbeck.registry.records.gate import Approval, LedgerEntry, Request, RuleResult, Verdict
from limbeck.registry.records.scores import (
    Contamination,
    Overlap,
    Parity,
    Relative,
    Scorecard,
    TaskResult,
    top_level_tasks,
)
from limbeck.registry.records.version import REFERENCES, NewVersion, TrainingCost, Version

__all__ = [
    "FIGURES",
    "HEADLINES",
    "REFERENCES",
    "USD",
    "AnswerDifferences",
    "Approval",
    "BatchCost",
    "ComparedModels",
    "ComparedTask",
    "Contamination",
    "ControlComparison",
    "ControlTaskResult",
    "Cost",
    "Engine",
    "Estimate",
    "Figure",
    "Flip",
    "Frozen",
    "Kind",
    "LeaderboardRow",
    "LedgerEntry",
    "NewVersion",
    "Noninferiority",
    "Outcome",
    "Overlap",
    "Parity",
    "Record",
    "Relative",
    "Request",
    "RuleResult",
    "Scorecard",
    "TaskResult",
    "TrainingCost",
    "Verdict",
    "Version",
    "limit_name",
    "top_level_tasks",
]
