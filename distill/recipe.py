"""The recipe: one TOML file that says all of a distillation run. Names are those of transformers where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from registry import tomlfile
from registry.records import Record

# Suffix of a file with a text column -> its loader in Hugging Face datasets.
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]


class Data(Record):
    """`[data]`: the text, and how it is laid out in blocks."""

    source: Literal["stdlib", "text", "dataset"] | None = None  # None: as the path's suffix says
    path: str | None = None  # text: a file or folder; dataset: .jsonl/.json/.parquet/.csv file or a hub id
    dataset_name: str | None = None  # a hub dataset's configuration
    split: str = "train"
    text_column: str = "text"
    heldout: float = Field(0.1, gt=0, lt=1)  # share of documents held out, by a hash of their path
    max_length: int = Field(256, ge=8)  # tokens a block
    max_tokens: int | None = Field(None, ge=8)  # use only this many training tokens (a fair sample)

    @model_validator(mode="after")
    def _has_path(self) -> Data:
        if self.source != "stdlib" and not self.path:
            raise ValueError("the text is missing: set path, or source = 'stdlib'")
        return self

    @property
    def kind(self) -> str:
        """`source`, or what the suffix of `path` says: `dataset` for a table of rows, else `text`."""
        return self.source or ("dataset" if Path(self.path or "").suffix in TABLES else "text")


class Tokenizer(Record):
    """`[tokenizer]`: trained on the training text; only for a recipe without a teacher."""

    vocab_size: int = Field(2048, ge=257)


class Teacher(Record):
    """`[teacher]`: a folder (beside the recipe or here), a hub id, NAME/VERSION or NAME@ALIAS."""

    model: str
    licence: str | None = None
    trust_remote_code: bool = False


class Cache(Record):
    """`[cache]`: what is stored of the teacher's distribution at each position."""

    top_k: int = Field(32, ge=0)  # most likely tokens stored, and the mass of the rest; 0: teacher runs online


class Objective(Record):
    """`[objectives.NAME]`: labels * cross-entropy + (1 - labels) * divergence from the teacher."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] | None = None
    labels: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)  # jsd: weight of the teacher in the mixture

    @model_validator(mode="after")
    def _has_a_signal(self) -> Objective:
        if self.divergence is None and self.labels != 1.0:
            raise ValueError("an objective without a divergence learns from labels alone: set labels = 1.0")
        return self


class Training(Record):
    """`[training]`: as in transformers.TrainingArguments; `bf16` None means where the hardware has it."""

    max_steps: int = Field(-1, ge=-1)
    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    optim: Literal["adamw_torch", "muon"] = "adamw_torch"  # muon: for the matrices of fresh students
    learning_rate: float = Field(2e-3, gt=0)
    lr_scheduler_type: Scheduler = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    bf16: bool | None = None
    torch_compile: bool = False
    logging_steps: int = Field(20, ge=1)
    save_minutes: float = Field(2.0, gt=0)  # a killed run goes on from its last checkpoint


class Student(Record):
    """`[students.NAME]`: a fresh model from `config`, or a pretrained one from `model`."""

    model: str | None = None
    config: dict[str, Any] = {}
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the saved weights
    training: Training = Training()  # the keys given here override [training] for this student

    @model_validator(mode="after")
    def _has_a_start(self) -> Student:
        if (self.model is None) == ("model_type" not in self.config):
            raise ValueError("a student needs either model (pretrained) or config with a model_type, not both")
        return self


class Recipe(Record):
    """A whole distillation recipe. The students are every student under every objective."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    licence: str | None = None
    seed: int = 0
    data: Data
    tokenizer: Tokenizer | None = None
    teacher: Teacher | None = None
    cache: Cache = Cache()
    students: dict[str, Student] = Field(min_length=1)
    objectives: dict[str, Objective] = Field(min_length=1)
    training: Training = Training()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        needing = [name for name, objective in self.objectives.items() if objective.divergence]
        if needing and self.teacher is None:
            raise ValueError(f"objectives.{needing[0]} has a divergence but the recipe has no [teacher]")
        if self.tokenizer and self.teacher:
            raise ValueError("[tokenizer] is trained only where there is no [teacher]; students take the teacher's")
        for name in needing:
            if self.objectives[name].temperature != 1.0 and self.cache.top_k:
                raise ValueError(
                    f"objectives.{name}.temperature {self.objectives[name].temperature} needs every logit of the "
                    f"teacher and the cache keeps {self.cache.top_k}: set cache.top_k = 0 to run the teacher online"
                )
        return self

    def training_of(self, student: str) -> Training:
        """`[training]` with this student's overrides."""
        return self.training.model_copy(update=self.students[student].training.model_dump(exclude_unset=True))


class Plan(Record):
    """One student to train: a size and an objective of the recipe."""

    label: str
    student: str
    objective: str


def plans(recipe: Recipe) -> list[Plan]:
    """Every student under every objective; the objective is left out of the label where there is only one."""
    single = len(recipe.objectives) == 1
    return [
        Plan(label=student if single else f"{student}-{objective}", student=student, objective=objective)
        for student in recipe.students
        for objective in recipe.objectives
    ]


def load(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe; each of `overrides` is `KEY=VALUE`. Raises BadInput with file, line and key."""
    return tomlfile.load(path, Recipe, overrides or [])


class Source(NamedTuple):
    """Where a recipe was read from."""

    path: Path
    overrides: tuple[str, ...] = ()

    def place(self, *key: str) -> str:
        """Where `key` was given: `recipe.toml:12: students.small.config.hidden_size`, or the `--set` that did."""
        name = ".".join(key)
        override = next((o for o in self.overrides if o.partition("=")[0].strip() == name), None)
        if override:
            return f"--set {override}"
        line = tomlfile.key_lines(self.path.read_text(encoding="utf-8")).get(key)
        return f"{self.path}:{line}: {name}" if line else f"{self.path}: {name}"
