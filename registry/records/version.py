"""A version: one exact artifact under a registered name, and what its training cost."""

from __future__ import annotations

from datetime import datetime

from limbeck.registry.records.base import Engine, Frozen, Kind, Record


class Version(Frozen):
    """One exact artifact under a registered model name."""

    name: str
    version: int
    kind: Kind
    digest: str  # limbeck.registry.core.digest.folder_digest of its files
    source: str  # MLflow artifact URI of the folder
    created: datetime
    engine: Engine = "torch"
    precision: str = "fp32"
    parent: str | None = None  # NAME/VERSION it was made from
    teacher: str | None = None  # NAME/VERSION it was distilled from
    recipe: str | None = None  # the recipe's label for it, such as "small" or "small-labels"
    recipe_digest: str | None = None
    family: str | None = None  # digest of what a student and its controls share: start, text, training, seed
    control: str | None = None  # of distillation: "labels", "labels_equal_cost" or "untrained"
    data_digest: str | None = None
    code_version: str | None = None
    licence: str | None = None
    # Of a student: whether the licence of what it learnt from lets a model learn from it; text alone always does.
    licence_allows_distillation: bool | None = None
    # What it came from, as far as it was told; an ONNX variant's are its student's.
    teacher_licence: str | None = None
    data_licence: str | None = None  # of the training text
    code_licence: str | None = None  # of the code that made it
    base_model: str | None = None  # of a student that began pretrained: NAME/VERSION, hub id or folder of that model
    base_model_digest: str | None = None
    base_model_licence: str | None = None
    author: str | None = None  # who registered it, see limbeck.registry.mlflow.identity
    params: int | None = None
    run_id: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """`NAME/VERSION`."""
        return f"{self.name}/{self.version}"


class TrainingCost(Record):
    """What making a student took."""

    training_seconds: float  # of all parts of a run that was stopped and resumed; online teacher included
    teacher_seconds: float = 0.0  # of the teacher's forward passes whose logits were stored and learnt from
    students_sharing_teacher: int = 1  # students of the recipe that share those logits; the seconds are not divided
    tokens: int  # seen in training
    machine: str  # limbeck.registry.core.machine.describe_hardware
    device: str = "cpu"
    api_input_tokens: int = 0  # sent to and got from a teacher behind an API
    api_output_tokens: int = 0
    api_model: str | None = None
    api_usd: float | None = None  # what those cost at the recipe's prices; None where it named none
