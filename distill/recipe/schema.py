"""The recipe: one TOML file that defines a whole distillation run. Keys have the names of transformers if it has them.

This module is the list of all keys, with their types, limits and defaults. To add a key, add a field to its section's
class here, and if it depends on other keys, a check to `checks.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.registry.records import Record

# Suffix of a table file -> its loader in Hugging Face datasets.
TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "chunks"]
CHUNKS_TEMPERATURE = 100.0  # Minixhofer et al., arXiv 2503.20083
Control = Literal["untrained", "labels", "labels_equal_cost"]


def table_format(path: str | Path) -> str | None:
    """The loader in Hugging Face datasets that reads the file at `path`; None if it is not a table."""
    return TABLE_FORMATS.get(Path(path).suffix)


class Data(Record):
    """`[data]`: the text, and how it is laid out in blocks.

    A row of a table is a text (`text_column`), a prompt with its completion (`prompt_column`,
    `completion_column`) or a conversation (`messages_column`). Of the last two the student learns only the answers.
    """

    source: Literal["stdlib", "text", "dataset"] | None = None  # None: the path's suffix decides
    path: str | None = None  # text: a file or folder; dataset: .jsonl/.json/.parquet/.csv file or a hub id
    dataset_name: str | None = None  # a hub dataset's configuration
    split: str = "train"
    text_column: str = "text"
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    heldout: float = Field(0.1, gt=0, lt=1)  # share of documents held out, by a hash of their path
    max_length: int = Field(256, ge=8)  # tokens per block
    max_tokens: int | None = Field(None, ge=8)  # use at most N training tokens (a fair sample)
    licence: str | None = None  # several as "MIT AND CC-BY-4.0"; None: as the data set's card states

    @model_validator(mode="after")
    def _names_its_text(self) -> Data:
        if self.source != "stdlib" and not self.path:
            raise ValueError("the text is missing: set path, or source = 'stdlib'")
        if self.messages_column and (self.prompt_column or self.completion_column):
            raise ValueError(
                "a row is a conversation or a prompt with its completion: set messages_column, or the others"
            )
        if self.completion_column and not self.prompt_column:
            raise ValueError("a completion needs its prompt: set prompt_column")
        return self

    @property
    def kind(self) -> str:
        """`source`; if it is not set, `dataset` for a `path` that is a table, else `text`."""
        return self.source or ("dataset" if table_format(self.path or "") else "text")


class Filter(Record):
    """`[generate.filter]`: which of the teacher's answers the student learns from."""

    min_tokens: int = Field(1, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    finished: bool = True  # drop answers that max_new_tokens cut off
    max_repetition: float = Field(1.0, gt=0, le=1)  # share of an answer's 4-grams that repeat earlier ones
    regex: str | None = None  # the answer must contain a match
    verifier: str | None = None  # "final_answer" (compares with answer_column), or "package.module:function"
    answer_column: str | None = None  # holds the right answer of the row
    min_logprob: float | None = Field(None, le=0)  # mean log-probability per token under the teacher, in nats

    @model_validator(mode="after")
    def _can_be_applied(self) -> Filter:
        if self.verifier == "final_answer" and self.answer_column is None:
            raise ValueError("the verifier final_answer needs the right answer of each row: set answer_column")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex is not a regular expression: {error}") from error
        return self


class Generate(Record):
    """`[generate]`: the teacher answers the prompts of `[data]`, and the student learns from its answers."""

    samples: int = Field(1, ge=1)  # answers per prompt
    max_prompts: int | None = Field(None, ge=1)  # use at most N prompts (a fair sample)
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: tuple[str, ...] = ()
    chat: bool | None = None  # use the chat template; None: if the teacher has one, except for plain text
    system_prompt: str | None = None
    batch_size: int = Field(16, ge=1)  # answers generated at a time (a local teacher)
    filter: Filter = Filter()

    @model_validator(mode="after")
    def _samples_differ(self) -> Generate:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all samples of a prompt are equal: set samples = 1, or a temperature")
        return self


class OnPolicy(Record):
    """`[on_policy]`: the student writes a share of the batches, the teacher grades them (GKD, arXiv 2306.13649)."""

    lmbda: float = Field(0.5, gt=0, le=1)  # share of the batches, as in TRL's GKDConfig
    max_new_tokens: int = Field(64, ge=1)
    prompt_tokens: int | None = Field(None, ge=1)  # length of a prompt from plain text; None: half of a block
    temperature: float = Field(1.0, gt=0)


class Tokenizer(Record):
    """`[tokenizer]`: a tokenizer trained on the text; without a teacher, or if the teacher has other tokens."""

    vocab_size: int = Field(2048, ge=257)


class Teacher(Record):
    """`[teacher]`: a MODEL (a folder or .gguf file beside the recipe goes first), or an endpoint."""

    model: str  # an endpoint: http://HOST:PORT/v1#NAME
    tokenizer: str | None = None  # an endpoint's: a folder or hub id; None: the student can learn only from its text
    licence: str | None = None
    licence_allows_distillation: bool | None = None  # None: decided by the licence
    trust_remote_code: bool = False
    retokenize: bool = False  # convert the teacher's distribution to the students' own tokens
    num_concurrent: int = Field(4, ge=1)  # endpoint: at most N requests at a time
    requests_per_minute: float | None = Field(None, gt=0)
    usd_per_million_input_tokens: float = Field(0.0, ge=0)
    usd_per_million_output_tokens: float = Field(0.0, ge=0)

    @property
    def is_endpoint(self) -> bool:
        return self.model.startswith(("http://", "https://"))

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        """The price of an endpoint's tokens in US dollars."""
        dollars = input_tokens * self.usd_per_million_input_tokens
        return (dollars + output_tokens * self.usd_per_million_output_tokens) / 1e6


class Cache(Record):
    """`[cache]`: what the teacher cache stores of the teacher's distribution at each position."""

    # online: store nothing, run the teacher each time; None: the smallest form that fits each objective
    form: Literal["sampled", "topk", "online"] | None = None
    samples: int = Field(12, ge=2)  # sampled: mean number of tokens per position; an unbiased estimate
    top_k: int = Field(32, ge=1)  # topk: number of most likely tokens per position, plus the mass of the rest


class Layers(Record):
    """`[objectives.NAME.layers]`: also match the teacher's hidden states; the teacher must run online."""

    loss: Literal["cosine", "mse"] = "cosine"
    weight: float = Field(1.0, gt=0)
    map: dict[int, int] | None = None  # student's layer -> teacher's, counted from 1; None: evenly spread


class Objective(Record):
    """`[objectives.NAME]`: labels * cross-entropy + (1 - labels) * divergence from the teacher (+ layers)."""

    divergence: Divergence | None = None  # chunks: for a teacher with other tokens, compares pieces of text
    labels: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)  # default for chunks: 100
    beta: float = Field(0.5, gt=0, lt=1)  # jsd: weight of the teacher in the mixture
    alpha: float = Field(0.1, gt=0, lt=1)  # skew_kl: share of the other distribution mixed in
    layers: Layers | None = None

    @model_validator(mode="before")
    @classmethod
    def _set_chunks_temperature(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("divergence") == "chunks":
            return {"temperature": CHUNKS_TEMPERATURE} | given
        return given

    @model_validator(mode="after")
    def _has_a_signal(self) -> Objective:
        if self.divergence is None and self.labels != 1.0:
            raise ValueError("an objective without a divergence learns from labels alone: set labels = 1.0")
        return self

    @property
    def uses_teacher(self) -> bool:
        return self.divergence is not None or self.layers is not None


class Training(Record):
    """`[training]`: as in transformers.TrainingArguments. `bf16` None: use it if it is measured to be faster here."""

    max_steps: int = Field(-1, ge=-1)
    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    activation_checkpointing: bool = False
    optim: Literal["adamw_torch", "muon"] = "adamw_torch"  # muon: for the matrices of fresh students
    learning_rate: float = Field(2e-3, gt=0)
    lr_scheduler_type: Scheduler = "cosine"
    warmup_steps: float = Field(0.05, ge=0)  # below 1: a share of all steps
    weight_decay: float = Field(0.1, ge=0)
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    bf16: bool | None = None
    torch_compile: bool = False
    logging_steps: int = Field(20, ge=1)
    eval_steps: int | None = Field(None, ge=1)  # steps between held-out scores; None: a tenth of the run
    save_minutes: float = Field(2.0, gt=0)  # between checkpoints; a killed run resumes from the last one


class Budget(Record):
    """`[budget]`: limits that end a student's training early; the student is kept and can be used."""

    max_tokens: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    max_usd: float | None = Field(None, gt=0)
    usd_per_hour: float | None = Field(None, gt=0)  # price of this machine; max_usd and stop_when need it
    stop_when: float | None = Field(None, gt=0)  # stop if a dollar gains less than this many held-out bits per byte

    @model_validator(mode="after")
    def _has_a_price(self) -> Budget:
        if (self.max_usd or self.stop_when) and not self.usd_per_hour:
            raise ValueError("max_usd and stop_when need what an hour of this machine costs: set usd_per_hour")
        return self


class Prune(Record):
    """`[students.NAME.prune]`: the student is the pruned teacher; a size that is not given stays the teacher's."""

    layers: tuple[int, ...] | None = None  # the teacher's layers to keep, counted from 0
    num_hidden_layers: int | None = Field(None, ge=1)  # or how many to keep, evenly spread
    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    calibration_blocks: int = Field(32, ge=1)  # blocks of training text on which importance is measured

    @model_validator(mode="after")
    def _has_one_choice_of_layers(self) -> Prune:
        if self.layers is not None and self.num_hidden_layers is not None:
            raise ValueError("give layers or num_hidden_layers, not both")
        return self


class Lora(Record):
    """`[students.NAME.lora]`: as in peft.LoraConfig; the adapter is merged into the saved student."""

    r: int = Field(16, ge=1)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"


class Student(Record):
    """`[students.NAME]`: a fresh model from `config`, a pretrained one from `model`, or the pruned teacher."""

    model: str | None = None
    config: dict[str, Any] = {}
    licence: str | None = None  # of the pretrained model; None: as its card or the registry states
    prune: Prune | None = None
    lora: Lora | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the saved weights
    training: Training = Training()  # keys set here override [training] for this student

    @model_validator(mode="after")
    def _has_a_start(self) -> Student:
        starts = [self.model is not None, "model_type" in self.config, self.prune is not None]
        if sum(starts) != 1 or (self.config and "model_type" not in self.config):
            raise ValueError(
                "a student needs one start: model (pretrained), config with a model_type, or prune (from the teacher)"
            )
        return self


class Sweep(Record):
    """`[sweep]`: varies sizes x objectives x temperatures x seeds, and adds controls."""

    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of objectives with a divergence; empty: their own
    seeds: tuple[int, ...] = ()  # empty: the recipe's
    controls: tuple[Control, ...] = ()  # students trained for comparison, for every size and seed

    @model_validator(mode="after")
    def _names_each_once(self) -> Sweep:
        for name, values in self:
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")
        return self


class Recipe(Record):
    """A whole recipe. It makes a student for every combination of size, objective, temperature and seed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    licence: str | None = None
    seed: int = 0
    data: Data
    generate: Generate | None = None
    on_policy: OnPolicy | None = None
    tokenizer: Tokenizer | None = None
    teacher: Teacher | None = None
    cache: Cache = Cache()
    students: dict[str, Student] = Field(min_length=1)
    objectives: dict[str, Objective] = Field(min_length=1)
    training: Training = Training()
    budget: Budget = Budget()
    sweep: Sweep = Sweep()

    @property
    def crosses_tokenizers(self) -> bool:
        """Whether the students may have other tokens than the teacher."""
        retokenizes = self.teacher is not None and self.teacher.retokenize
        return retokenizes or any(objective.divergence == "chunks" for objective in self.objectives.values())

    def training_of(self, student: str) -> Training:
        """`[training]` with this student's overrides."""
        return self.training.model_copy(update=self.students[student].training.model_dump(exclude_unset=True))
