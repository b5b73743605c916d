"""The policy of a gate: what a version must show, and who has to approve it, before an alias may point at it.

A policy is a TOML file; docs/policy.md shows every key. Each rule is optional, and a policy without any rule is
refused. `limbeck policy check policy.toml` describes what a policy requires.

A quality limit is compared with an interval: that of the scorecard at `confidence`, both ends included. The interval
passes if it is wholly on the right side of the limit, fails if it is wholly on the wrong side, and is inconclusive if
it contains the limit; the message then gives the number of documents that would settle it. So `confidence = 0.9` is
the one-sided test at 95% of `limbeck compare`. A margin is a test of non-inferiority: the lower end of
student - teacher, with its sign changed if less is better, has to be at or above minus the margin. A cost limit is
compared with the whole interval if the cost was measured in several rounds, else with the measured number.

What is unknown, such as a licence or the overlap with a training text that is not on this machine, is inconclusive.
Neither a failing nor an inconclusive rule lets the alias move.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, create_model

from limbeck.registry.records import FIGURES, Cost, Frozen, Record, limit_name

Retention = Annotated[float, Field(ge=0, le=1.5)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


class QualityRules(Frozen):
    """How much of the teacher's quality a version has to keep, and on which scorecard."""

    min_retention: Retention | None = None  # mean over the tasks; 1: all of the teacher's quality
    tasks: tuple[Name, ...] = ()  # that have to be in the scorecard
    min_documents: int | None = Field(default=None, ge=1)  # of each task
    min_task_retention: dict[str, Retention] = {}  # task -> its min_retention
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95  # of the intervals, two-sided
    margin: dict[str, Positive] = {}  # task or metric -> how much worse than the teacher, in the metric's units
    max_age_days: Positive | None = None  # since the version was scored


def _cost_limit_fields() -> dict[str, Any]:
    """A key for each figure of `limbeck.registry.records.FIGURES`: max_..., or min_... if more is better."""
    whole = {name for name, field in Cost.model_fields.items() if field.annotation in (int, int | None)}
    kinds = {name: PositiveInt if name in whole else Positive for name in FIGURES}
    return {limit_name(name): (kind | None, None) for name, kind in kinds.items()}


class CostLimits(create_model("CostFigureLimits", __base__=Frozen, **_cost_limit_fields())):  # type: ignore[misc]
    """How much a version may cost to run: a limit for each cost figure, and one on its ratio to the teacher's cost."""

    max_cost_ratio: Positive | None = None


class ParityLimits(Frozen):
    """How close an ONNX variant has to be to its PyTorch model."""

    required: bool = True  # it passed at its export
    max_mean_kl: float | None = Field(default=None, ge=0)  # nats per token
    min_top1_agreement: Share | None = None
    max_p99_kl: NonNegative | None = None  # nats
    max_bits_per_byte_increase: NonNegative | None = None


class LineageRules(Frozen):
    """What a version may have been made from."""

    max_contamination: Share | None = None  # of the documents of each task that occur in the training text
    require_distillation_licence: bool = False


class LicenceRules(Frozen):
    """The licences that are allowed; None: any."""

    teacher: tuple[Name, ...] | None = None
    base_model: tuple[Name, ...] | None = None  # the pretrained model that a student began as
    data: tuple[Name, ...] | None = None  # of the training text
    code: tuple[Name, ...] | None = None  # of the code that made it


class DeployRules(Frozen):
    """Which aliases are served: only a version that `limbeck serve` runs may take them."""

    aliases: tuple[Name, ...] = ("production",)  # empty: the gate does not ask


class ApprovalRules(Frozen):
    """Who has to approve. The version's author and whoever made the request do not count."""

    needed: int = Field(default=0, ge=0)  # number of people
    people: tuple[Name, ...] = ()  # who may approve; empty: anybody
    keys: dict[str, str] = {}  # name -> public key of ed25519, base64; empty: approvals need no signature


class OverrideRules(Frozen):
    """Who may promote a version that does not pass; empty: nobody."""

    people: tuple[Name, ...] = ()


class Policy(Record):
    """The rules of one gate."""

    quality: QualityRules = QualityRules()
    cost: CostLimits = CostLimits()
    parity: ParityLimits = ParityLimits()
    lineage: LineageRules = LineageRules()
    licence: LicenceRules = LicenceRules()
    deploy: DeployRules = DeployRules()
    approvals: ApprovalRules = ApprovalRules()
    override: OverrideRules = OverrideRules()
    rules: dict[str, dict[str, Any]] = {}  # rule of `limbeck.registry.policy.plugins` -> its options
