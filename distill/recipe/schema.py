"""The recipe: one TOML file that says all of a distillation run. Names are those of transformers where it has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.registry.records import Record

# Suffix of a file with a text column -> its loader in Hugging Face datasets.
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "chunks"]
CHUNKS_TEMPERATURE = 100.0  # Minixhofer et al., arXiv 2503.20083
Control = Literal["untrained", "labels", "labels_equal_cost"]


class Data(Record):
    """`[data]`: the text, and how it is laid out in blocks.

    A row of a table is a text (`text_column`), a prompt with its completion (`prompt_column`,
    `completion_column`) or a conversation (`messages_column`); of the latter two only the answers are learnt.
    """

    source: Literal["stdlib", "text", "dataset"] | None = None  # None: as the path's suffix says
    path: str | None = None  # text: a file or folder; dataset: .jsonl/.json/.parquet/.csv file or a hub id
    dataset_name: str | None = None  # a hub dataset's configuration
    split: str = "train"
    text_column: str = "text"
    prompt_column: str | None = None
    completion_column: str | None = None
    messages_column: str | None = None
    heldout: float = Field(0.1, gt=0, lt=1)  # share of documents held out, by a hash of their path
    max_length: int = Field(256, ge=8)  # tokens a block
    max_tokens: int | None = Field(None, ge=8)  # use only this many training tokens (a fair sample)
    licence: str | None = None  # several as "MIT AND CC-BY-4.0"; None: as the card of the data set says

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
        """`source`, or what the suffix of `path` says: `dataset` for a table of rows, else `text`."""
        return self.source or ("dataset" if Path(self.path or "").suffix in TABLES else "text")


class Filter(Record):
    """`[generate.filter]`: which of the teacher's answers are kept."""

    min_tokens: int = Field(1, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    finished: bool = True  # only answers that ended by themselves, not at max_new_tokens
    max_repetition: float = Field(1.0, gt=0, le=1)  # share of an answer's 4-grams that came before in it
    regex: str | None = None  # has to be found in the answer
    verifier: str | None = None  # "final_answer" (against answer_column), or "package.module:function"
    answer_column: str | None = None  # what the verifier compares with
    min_logprob: float | None = Field(None, le=0)  # mean log-probability a token under the teacher, in nats

    @model_validator(mode="after")
    def _can_be_applied(self) -> Filter:
        if self.verifier == "final_answer" and self.answer_column is None:
            raise ValueError("the verifier final_answer compares with the right answer: set answer_column")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex is no regular expression: {error}") from error
        return self


class Generate(Record):
    """`[generate]`: the teacher answers the prompts of `[data]`, and the student learns from its answers."""

    samples: int = Field(1, ge=1)  # answers a prompt
    max_prompts: int | None = Field(None, ge=1)  # use only so many (a fair sample)
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: tuple[str, ...] = ()
    chat: bool | None = None  # through the chat template; None: where the teacher has one, and not for plain text
    system_prompt: str | None = None
    batch_size: int = Field(16, ge=1)  # answers at a time (a local teacher)
    filter: Filter = Filter()

    @model_validator(mode="after")
    def _samples_differ(self) -> Generate:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all samples of a prompt are one: set samples = 1, or a temperature")
        return self


class OnPolicy(Record):
    """`[on_policy]`: the student writes a share of the batches itself, the teacher grades them (GKD)."""

    lmbda: float = Field(0.5, gt=0, le=1)  # share of the batches, as in TRL's GKDConfig
    max_new_tokens: int = Field(64, ge=1)
    prompt_tokens: int | None = Field(None, ge=1)  # of plain text; None: half of the block
    temperature: float = Field(1.0, gt=0)


class Tokenizer(Record):
    """`[tokenizer]`: trained on the training text; without a teacher, or beside one that has other tokens."""

    vocab_size: int = Field(2048, ge=257)


class Teacher(Record):
    """`[teacher]`: a folder (beside the recipe or here), a hub id, NAME/VERSION, NAME@ALIAS, or an endpoint."""

    model: str  # an endpoint: http://HOST:PORT/v1#NAME
    tokenizer: str | None = None  # an endpoint's: a folder or hub id; None: its text alone can be learnt from
    licence: str | None = None
    licence_allows_distillation: bool | None = None  # None: as is known of the licence
    trust_remote_code: bool = False
    retokenize: bool = False  # what it says of the next token is told in the students' own tokens
    num_concurrent: int = Field(4, ge=1)  # endpoint: requests at a time
    requests_per_minute: float | None = Field(None, gt=0)
    usd_per_million_input_tokens: float = Field(0.0, ge=0)
    usd_per_million_output_tokens: float = Field(0.0, ge=0)

    @property
    def is_endpoint(self) -> bool:
        return self.model.startswith(("http://", "https://"))

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        """What tokens of an endpoint cost."""
        dollars = input_tokens * self.usd_per_million_input_tokens
        return (dollars + output_tokens * self.usd_per_million_output_tokens) / 1e6


class Cache(Record):
    """`[cache]`: what is stored of the teacher's distribution at each position."""

    # online: nothing is stored, the teacher runs each time; None: for each objective the smallest that serves it
    form: Literal["sampled", "topk", "online"] | None = None
    samples: int = Field(12, ge=2)  # sampled: tokens stored a position, on average; an unbiased estimate
    top_k: int = Field(32, ge=1)  # topk: the most likely tokens stored, and the mass of the rest


class Layers(Record):
    """`[objectives.NAME.layers]`: hidden states follow the teacher's too; the teacher has to run online."""

    loss: Literal["cosine", "mse"] = "cosine"
    weight: float = Field(1.0, gt=0)
    map: dict[int, int] | None = None  # student's layer -> teacher's, counted from 1; None: evenly spread


class Objective(Record):
    """`[objectives.NAME]`: labels * cross-entropy + (1 - labels) * divergence from the teacher (+ layers)."""

    divergence: Divergence | None = None  # chunks: of a teacher with other tokens, by its text
    labels: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)  # of chunks 100, where it is not given
    beta: float = Field(0.5, gt=0, lt=1)  # jsd: weight of the teacher in the mixture
    alpha: float = Field(0.1, gt=0, lt=1)  # skew_kl: share of the other distribution mixed in
    layers: Layers | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_its_own_temperature(cls, given: Any) -> Any:
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
    """`[training]`: as in transformers.TrainingArguments; `bf16` None means where it is measured to be faster."""

    max_steps: int = Field(-1, ge=-1)
    num_train_epochs: float = Field(1.0, gt=0)
    per_device_train_batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
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
    eval_steps: int | None = Field(None, ge=1)  # held-out bits per byte and agreement so often; None: a tenth
    save_minutes: float = Field(2.0, gt=0)  # a killed run goes on from its last checkpoint


class Budget(Record):
    """`[budget]`: where a student's training ends at the latest; the student is kept and can be used."""

    max_tokens: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    max_usd: float | None = Field(None, gt=0)
    usd_per_hour: float | None = Field(None, gt=0)  # of this machine; max_usd and stop_when need it
    stop_when: float | None = Field(None, gt=0)  # gain below so many held-out bits per byte a dollar

    @model_validator(mode="after")
    def _has_a_price(self) -> Budget:
        if (self.max_usd or self.stop_when) and not self.usd_per_hour:
            raise ValueError("max_usd and stop_when need what an hour of this machine costs: set usd_per_hour")
        return self


class Prune(Record):
    """`[students.NAME.prune]`: cut from the teacher; what is not given stays as the teacher has it."""

    layers: tuple[int, ...] | None = None  # the teacher's layers that stay, counted from 0
    num_hidden_layers: int | None = Field(None, ge=1)  # or so many, evenly spread
    hidden_size: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=1)
    num_attention_heads: int | None = Field(None, ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    calibration_blocks: int = Field(32, ge=1)  # of the training text, to measure importance on

    @model_validator(mode="after")
    def _says_layers_once(self) -> Prune:
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
    """`[students.NAME]`: a fresh model from `config`, a pretrained one from `model`, or one cut from the teacher."""

    model: str | None = None
    config: dict[str, Any] = {}
    licence: str | None = None  # of the pretrained model; None: as its card or the registry says
    prune: Prune | None = None
    lora: Lora | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the saved weights
    training: Training = Training()  # the keys given here override [training] for this student

    @model_validator(mode="after")
    def _has_a_start(self) -> Student:
        starts = [self.model is not None, "model_type" in self.config, self.prune is not None]
        if sum(starts) != 1 or (self.config and "model_type" not in self.config):
            raise ValueError(
                "a student needs one start: model (pretrained), config with a model_type, or prune (from the teacher)"
            )
        return self


class Sweep(Record):
    """`[sweep]`: the grid is sizes x objectives x temperatures x seeds, and its controls."""

    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of every objective with a divergence; none: its own
    seeds: tuple[int, ...] = ()  # none: the recipe's
    controls: tuple[Control, ...] = ()  # added for every size and seed

    @model_validator(mode="after")
    def _names_each_once(self) -> Sweep:
        for name, values in self:
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice: {', '.join(map(str, values))}")
        return self


class Recipe(Record):
    """A whole distillation recipe. The students are every size under every objective, temperature and seed."""

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
        retold = self.teacher is not None and self.teacher.retokenize
        return retold or any(objective.divergence == "chunks" for objective in self.objectives.values())

    def training_of(self, student: str) -> Training:
        """`[training]` with this student's overrides."""
        return self.training.model_copy(update=self.students[student].training.model_dump(exclude_unset=True))
