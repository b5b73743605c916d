"""Loads, checks and hashes lm-eval tasks."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.evals.tasks.chance import Chance
from limbeck.evals.tasks.clusters import Clusters, cluster_documents
from limbeck.evals.tasks.document_faults import CheckedDocuments, recorded_examples
from limbeck.evals.tasks.faults import Fault, FaultyTasks, fault_lines
from limbeck.evals.tasks.loading import first_line, load_tasks
from limbeck.evals.tasks.metrics import DEFAULT_CHOICE, Metric, MetricChoice, check_one_metric, choose_metric
from limbeck.evals.tasks.output_types import output_type_of
from limbeck.registry.core.digest import json_digest, text_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status, quiet_libraries

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

TEMPLATE_SETTINGS = {"tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "conversation"}
FEWSHOT_SEED = 1234  # lm-eval's own default


class DocumentNumbers(list[int]):
    """Numbers of documents, ascending, without duplicates. lm-eval asks for each document whether it is among them."""

    def __init__(self, numbers: Iterable[int]) -> None:
        super().__init__(sorted(set(numbers)))
        self._set = frozenset(self)

    def __contains__(self, number: object) -> bool:
        return number in self._set


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How prompts are built, by lm-eval's own names. Everything but the last two fields goes into the task hashes.

    Attributes:
        num_fewshot: examples in each prompt, unless the task fixes it to 0; None is the task's own number, else 0.
        limit: at most N documents of each task, a random sample; None is all.
        limit_seed: of that sample. A larger limit adds documents to those of a smaller one.
        samples: task -> indices of the documents to use; other tasks use all. Cannot be combined with limit.
        apply_chat_template: True, or the name of one of the tokenizer's templates.
        chat_template_args: further variables of the template, such as `{"enable_thinking": True}`.
        think_end: the text, such as "</think>", after which a generated answer begins. A task's stop strings end only
            what comes after it.
        fewshot_as_multiturn: each example is a chat turn of its own; None is True with a chat template, else False.
        system_instruction: comes before each prompt.
        gen_kwargs: overrides the generation settings of generate_until tasks.
        choice: the metrics and filters that are recorded, where they are not a task's first ones.
        confirm_run_unsafe_code: allows tasks that run the code that a model writes.
        allow_task_code: allows Python code that the task files of a user's folder name.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    limit_seed: int = 0
    samples: Mapping[str, Sequence[int]] | None = None
    apply_chat_template: bool | str = False
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    think_end: str | None = None
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    choice: MetricChoice = DEFAULT_CHOICE
    confirm_run_unsafe_code: bool = False
    allow_task_code: bool = False

    @property
    def uses_multiturn(self) -> bool:
        """`fewshot_as_multiturn`, or its default if it is None."""
        if self.fewshot_as_multiturn is None:
            return bool(self.apply_chat_template)
        return self.fewshot_as_multiturn

    @property
    def thinks(self) -> bool:
        """Whether the chat template is asked for thoughts."""
        return bool(self.chat_template_args.get("enable_thinking"))

    def document_numbers(self, task: str, count: int) -> DocumentNumbers | None:
        """The numbers of the documents to use of one task, which has `count`, ascending; None for all."""
        if (picked := (self.samples or {}).get(task)) is not None:
            return DocumentNumbers(picked)
        if self.limit is None or self.limit >= count:
            return None
        return DocumentNumbers(np.random.default_rng(self.limit_seed).permutation(count)[: self.limit].tolist())

    def hashed_settings(self, numbers: Sequence[int] | None, metric: Metric | None) -> dict[str, Any]:
        """The settings that differ from lm-eval's defaults and are not in the task's own configuration.

        Args:
            numbers: of the documents that are used; None for all.
            metric: None if it is the one that the task itself would record.
        """
        settings = {
            "metric": metric and metric.key,
            "samples": numbers,
            "limit_seed": None if numbers is None or self.limit is None else self.limit_seed,
            "apply_chat_template": self.apply_chat_template or None,
            "chat_template_args": dict(self.chat_template_args) or None,
            "think_end": self.think_end,
            "fewshot_as_multiturn": self.uses_multiturn or None,
            "system_instruction": self.system_instruction,
        }
        return {key: value for key, value in settings.items() if value is not None}


@dataclass(frozen=True)
class TaskSet:
    """lm-eval tasks, loaded and hashed.

    Attributes:
        names: the requested tasks and groups, without duplicates.
        digest: over all task hashes.
        harness: name and version of lm-eval.
        requests: the number of requests for one model, repeats included.
        task_hashes: task -> hash of its configuration, documents and settings, but not of file paths.
        tasks, groups: lm-eval's own objects, by name.
        settings: how prompts are built.
        numbers: task -> the numbers of the documents that are used; None for all.
        metrics: task -> the one metric that is recorded.
    """

    names: list[str]
    digest: str
    harness: str
    requests: int
    task_hashes: dict[str, str]
    tasks: dict[str, Task]
    groups: dict[str, Group]
    settings: TaskSettings
    numbers: dict[str, DocumentNumbers | None]
    metrics: dict[str, Metric]

    def documents(self, name: str) -> dict[int, Any]:
        """Number -> document, of those of a task that are used."""
        return _documents(self.tasks[name], self.numbers[name])

    @functools.cached_property
    def clusters(self) -> dict[str, Clusters]:
        """Task -> which of its documents belong together. Raises BadInput if a task names a column that is missing."""
        return {name: cluster_documents(task, self.documents(name)) for name, task in self.tasks.items()}

    @functools.cached_property
    def chances(self) -> dict[str, Chance]:
        """Task -> the value of its metric that costs nothing."""
        return {name: output_type_of(task).chance(task, self.metrics[name]) for name, task in self.tasks.items()}

    def is_random_sample(self, names: Iterable[str]) -> bool:
        """Whether the documents of any of these tasks are a random sample, not all of them or picked ones."""
        return self.settings.limit is not None and any(self.numbers[name] is not None for name in names)

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        include_path: Sequence[Path] = (),
        *,
        other_faults: Iterable[Fault] = (),
        **settings: Any,
    ) -> TaskSet:
        """Load tasks by name: from the YAML files below `include_path`, else lm-eval's own. Check all they score.

        Args:
            other_faults: of the models, to name with those of the tasks.
            **settings: the fields of `TaskSettings`.

        Raises:
            BadInput: an unknown task or folder; samples that do not exist; settings that contradict each other.
            FaultyTasks: what is wrong with the tasks, their files and documents, all at once.
        """
        tasks, faults = cls.check(names, include_path, **settings)
        faults = [*faults, *other_faults]
        if any(fault.stops for fault in faults):
            raise FaultyTasks(faults)
        for line in fault_lines(faults):
            print_status(line)
        return tasks

    @classmethod
    def check(
        cls, names: Sequence[str], include_path: Sequence[Path] = (), **settings: Any
    ) -> tuple[TaskSet, list[Fault]]:
        """As `load`, but returns the faults beside the tasks, which lack those that cannot be scored."""
        quiet_libraries()
        import importlib.metadata

        task_settings = TaskSettings(**settings)
        names = list(dict.fromkeys(names))
        _check_settings(names, task_settings)
        found = load_tasks(names, [Path(folder) for folder in include_path], allow_code=task_settings.allow_task_code)
        faults = list(found.faults)
        if not faults:
            _check_samples(found.tasks, task_settings)
            task_settings.choice.check_names([*found.groups, *found.tasks])
        tasks: dict[str, Task] = {}
        hashes: dict[str, str] = {}
        numbers: dict[str, DocumentNumbers | None] = {}
        metrics: dict[str, Metric] = {}
        for name, task in found.tasks.items():
            file = found.yaml_files.get(name)
            try:
                _check_supported(name, task, task_settings)
                metrics[name] = choose_metric(name, task, found.groups, task_settings.choice)
            except BadInput as error:
                detail = "; ".join(part for part in (error.message, error.fix) if part)
                faults.append(Fault(kind="task that cannot be scored", detail=detail, task=name, file=file))
                continue
            numbers[name] = task_settings.document_numbers(name, len(task.eval_docs))
            differing = metrics[name] != choose_metric(name, task, found.groups)
            hashed = task_settings.hashed_settings(numbers[name], metrics[name] if differing else None)
            task_hash, of_task = _prepare(task, task_settings, numbers[name], hashed, file)
            faults += of_task
            if task_hash:
                tasks[name], hashes[name] = task, task_hash
        if any(task_settings.choice):
            check_one_metric(metrics, found.groups)
        requests = sum(instance.repeats for task in tasks.values() for instance in task.instances)
        harness = f"lm-eval {importlib.metadata.version('lm-eval')}"
        made = cls(
            names, json_digest(hashes), harness, requests, hashes, tasks, found.groups, task_settings, numbers, metrics
        )
        return made, faults


def _check_supported(name: str, task: Task, settings: TaskSettings) -> None:
    """Raise BadInput for a task that Limbeck does not support, or that runs code without confirmation."""
    if settings.thinks and not output_type_of(task).uses_gen_kwargs:
        raise BadInput(f"task {name} is scored without generating, so the model cannot think before it answers")
    if getattr(task, "MULTIMODAL", False):
        raise BadInput(f"task {name} needs images or sound; Limbeck supports text only")
    if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
        raise BadInput(
            f"task {name} runs code that the model writes, on this machine, and that code may do anything",
            fix="run it where that can do no harm, such as in a container, with --confirm-run-unsafe-code",
        )


def _check_settings(names: Sequence[str], settings: TaskSettings) -> None:
    """Raise BadInput for settings that contradict each other."""
    if not names:
        raise BadInput("no tasks are given", fix="name one or more with --tasks")
    if settings.samples is not None and settings.limit is not None:
        raise BadInput("--samples and --limit cannot be combined", fix="leave out one of them")
    if settings.uses_multiturn and not settings.apply_chat_template:
        raise BadInput("--fewshot-as-multiturn needs a chat template", fix="give --apply-chat-template too")
    if settings.chat_template_args and not settings.apply_chat_template:
        raise BadInput("--chat-template-args needs a chat template", fix="give --apply-chat-template too")
    if taken := sorted(TEMPLATE_SETTINGS & settings.chat_template_args.keys()):
        raise BadInput(f"--chat-template-args sets {', '.join(taken)}, which Limbeck sets itself", fix="leave it out")
    if settings.thinks and settings.think_end is None:
        raise BadInput(
            "enable_thinking needs the text that ends a thought", fix="give it, such as --think-end '</think>'"
        )


def _check_samples(tasks: dict[str, Task], settings: TaskSettings) -> None:
    """Raise BadInput for samples of a task that is not scored, and for indices that no document has."""
    for name, indices in (settings.samples or {}).items():
        if name not in tasks:
            raise BadInput(f"samples name the task {name!r}", fix=f"the tasks are {', '.join(tasks)}")
        count = len(tasks[name].eval_docs)
        wrong = [index for index in indices if not 0 <= index < count]
        if wrong or not indices:
            named = f"document {wrong[0]}" if wrong else "no documents"
            raise BadInput(f"samples of {name} name {named}", fix=f"it has documents 0 to {count - 1}")


def _prepare(
    task: Task, settings: TaskSettings, numbers: DocumentNumbers | None, hashed: Mapping[str, Any], file: str | None
) -> tuple[str | None, list[Fault]]:
    """Configure a task as lm-eval's simple_evaluate does, check its documents, and build its prompts.

    Returns its hash and faults; None for the hash if the prompts cannot be built.
    """
    if settings.gen_kwargs and output_type_of(task).uses_gen_kwargs:
        task.set_config("generation_kwargs", dict(settings.gen_kwargs), update=True)
    own_fewshot = task.get_config("num_fewshot")
    if own_fewshot is None or (settings.num_fewshot is not None and own_fewshot != 0):  # a task that fixes 0 keeps 0
        task.set_config("num_fewshot", settings.num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    documents = _documents(task, numbers)
    checked = CheckedDocuments(task, documents)
    faults = checked.faults()
    try:
        with hide_progress_bars(), recorded_examples(task) as examples:
            # Without the chat template, which belongs to the model; prompt hashes cover the model's own prompts.
            task.build_all_requests(samples=numbers, system_instruction=settings.system_instruction)
    except Exception as error:  # a template that does not fit the documents raises any type
        if not faults:
            detail = f"its prompts cannot be built: {first_line(error)}"
            faults.append(Fault(kind="task that cannot be scored", detail=detail, task=task.task_name, file=file))
        return None, faults
    return _task_hash(task, [*documents.values()], hashed), [*faults, *checked.example_faults(examples)]


def _documents(task: Task, numbers: DocumentNumbers | None) -> dict[int, Any]:
    """Number -> document, of those that are used."""
    documents = [document for _, document in task.doc_iterator(samples=numbers)]
    return dict(zip(numbers or range(len(documents)), documents, strict=True))


def _task_hash(task: Task, documents: Sequence[Any], settings: Mapping[str, Any]) -> str:
    """The hash of a task's configuration, documents and settings."""
    from lm_eval.utils import handle_non_serializable

    def plain(value: Any) -> Any:
        # A function by its name: its repr has a memory address.
        return value.__qualname__ if hasattr(value, "__qualname__") else handle_non_serializable(value)

    # Without keys that hold file paths: the documents themselves are hashed.
    excluded = ("dataset_kwargs", "metadata")
    config = {key: value for key, value in task.dump_config().items() if key not in excluded}
    return text_digest(json.dumps([config, documents, settings], sort_keys=True, default=plain))


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide lm-eval's progress bars, which have no option for that."""
    import lm_eval.api.task as module

    bar = module.tqdm
    module.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        module.tqdm = bar
