"""A version: one exact artifact under a registered name; and the cost of its training."""

from __future__ import annotations

from datetime import datetime

from limbeck.registry.records.base import Engine, Frozen, Kind, Record

REFERENCES = ("parent", "teacher", "base_model")  # fields that may name another version as NAME/VERSION


class NewVersion(Frozen):
    """What the maker of an artifact states of it: the input of `limbeck.registry.mlflow.store.Store.register`."""

    name: str  # of the registered model: letters, digits, dots, dashes, underscores
    kind: Kind
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
    # Of a student: whether the licences of its sources allow training a model on them; text alone always does.
    licence_allows_distillation: bool | None = None
    # The licences of its sources, as far as they are known; an ONNX variant has those of its student.
    teacher_licence: str | None = None
    data_licence: str | None = None  # of the training text
    code_licence: str | None = None  # of the code that made it
    base_model: str | None = None  # the pretrained model a student started from: NAME/VERSION, hub id or folder
    base_model_digest: str | None = None
    base_model_licence: str | None = None
    params: int | None = None
    run_id: str | None = None  # the MLflow run that made it


class Version(NewVersion):
    """One exact artifact under a registered model name: what its maker states and what the registry assigns."""

    version: int
    digest: str  # limbeck.registry.core.digest.folder_digest of its files
    source: str  # MLflow artifact URI of the folder
    created: datetime
    author: str | None = None  # who registered it, see limbeck.registry.mlflow.identity
    aliases: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """`NAME/VERSION`."""
        return f"{self.name}/{self.version}"

    def onnx_variant(self, precision: str) -> NewVersion:
        """The record of an ONNX variant of this PyTorch version: its lineage and licences are the same."""
        fields = self.model_dump(include=set(NewVersion.model_fields))
        fields |= {"kind": "onnx", "engine": "onnxruntime", "precision": precision, "parent": self.ref}
        return NewVersion(**fields)


class TrainingCost(Record):
    """The cost of training a student."""

    training_seconds: float  # summed over the parts of a resumed run; with the teacher, if it ran online
    teacher_seconds: float = 0.0  # of the teacher's forward passes whose stored logits were trained on
    students_sharing_teacher: int = 1  # students of the recipe that share those logits; the seconds are not divided
    tokens: int  # seen in training
    machine: str  # limbeck.registry.core.machine.describe_hardware
    device: str = "cpu"
    api_input_tokens: int = 0  # of a teacher behind an API
    api_output_tokens: int = 0
    api_model: str | None = None
    api_usd: float | None = None  # the price of these tokens; None if the recipe has no prices
