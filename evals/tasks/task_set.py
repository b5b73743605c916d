"""Loads, checks and hashes lm-eval tasks, and chooses the one metric that Limbeck records for each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from limbeck.evals.tasks.output_types import output_type_of
from limbeck.registry.core.digest import json_digest, text_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import quiet_libraries

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FEWSHOT_SEED = 1234  # lm-eval's own default


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How prompts are built, by lm-eval's own names. Everything but the last field goes into the task hashes.

    Attributes:
        num_fewshot: examples in each prompt, unless the task fixes it to 0; None is the task's own number, else 0.
        limit: the first N documents of each task; None is all.
        samples: task -> indices of the documents to use; other tasks use all. Cannot be combined with limit.
        apply_chat_template: True, or the name of one of the tokenizer's templates.
        fewshot_as_multiturn: each example is a chat turn of its own; None is True with a chat template, else False.
        system_instruction: comes before each prompt.
        gen_kwargs: overrides the generation settings of generate_until tasks.
        confirm_run_unsafe_code: allows tasks that run the code that a model writes.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    samples: Mapping[str, Sequence[int]] | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    gen_kwargs: Mapping[str, Any] | None = None
    confirm_run_unsafe_code: bool = False

    @property
    def uses_multiturn(self) -> bool:
        """`fewshot_as_multiturn`, or its default if it is None."""
        if self.fewshot_as_multiturn is None:
            return bool(self.apply_chat_template)
        return self.fewshot_as_multiturn

    def document_numbers(self, task: str) -> list[int] | None:
        """The indices of the documents to use of one task, ascending; None for all, or for the first `limit`."""
        samples = (self.samples or {}).get(task)
        return None if samples is None else sorted(set(samples))

    def hashed_settings(self, task: str) -> dict[str, Any]:
        """The settings that differ from lm-eval's defaults and are not in the task's own configuration."""
        settings = {
            "samples": self.document_numbers(task),
            "apply_chat_template": self.apply_chat_template or None,
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
    """

    names: list[str]
    digest: str
    harness: str
    requests: int
    task_hashes: dict[str, str]
    tasks: dict[str, Task]
    groups: dict[str, Group]
    settings: TaskSettings

    @classmethod
    def load(cls, names: Sequence[str], include_path: Sequence[Path] = (), **settings: Any) -> TaskSet:
        """Load tasks by name: from the YAML files below `include_path`, else lm-eval's own.

        Args:
            **settings: the fields of `TaskSettings`.

        Raises:
            BadInput: an unknown task, folder or output type; YAML that cannot be loaded; missing data; a task
                without a metric that is a mean over documents; samples that do not exist; a task that runs
                code although that was not confirmed.
        """
        quiet_libraries()
        import importlib.metadata

        task_settings = TaskSettings(**settings)
        names = list(dict.fromkeys(names))
        if not names:
            raise BadInput("no tasks are given", fix="name one or more with --tasks")
        if task_settings.samples is not None and task_settings.limit is not None:
            raise BadInput("--samples and --limit cannot be combined", fix="leave out one of them")
        if task_settings.uses_multiturn and not task_settings.apply_chat_template:
            raise BadInput("--fewshot-as-multiturn needs a chat template", fix="give --apply-chat-template too")
        manager = _manager(names, [Path(folder) for folder in include_path])
        tasks: dict[str, Task] = {}
        groups: dict[str, Group] = {}
        for name in names:
            for known, found in zip((tasks, groups), _load_task(manager, name), strict=True):
                known.update(found)
        _check_samples(tasks, task_settings)
        hashes = {}
        for name, task in tasks.items():
            _check_supported(name, task, task_settings)
            try:
                hashes[name] = _prepare(task, task_settings)
            except Exception as error:  # a template that does not fit the documents raises any type
                raise BadInput(
                    f"task {name}: its prompts cannot be built: {_first_error_line(error)}",
                    fix=_defined_in(manager, name),
                ) from error
            choose_metric(name, task, groups)
        requests = sum(instance.repeats for task in tasks.values() for instance in task.instances)
        harness = f"lm-eval {importlib.metadata.version('lm-eval')}"
        return cls(names, json_digest(hashes), harness, requests, hashes, tasks, groups, task_settings)


class Metric(NamedTuple):
    """The one metric that is recorded for a task, and the lm-eval filter it is computed after."""

    name: str
    filter: str

    @property
    def key(self) -> str:
        """The key in lm-eval's results."""
        return f"{self.name},{self.filter}"


def choose_metric(name: str, task: Task, groups: dict[str, Group]) -> Metric:
    """The metric of the task's group, else the task's first metric that is a mean over documents.

    Raises BadInput if the task has no such metric.
    """
    from lm_eval.api.metrics import bits_per_byte, mean

    means = [metric for metric, how in task.aggregation().items() if how in (mean, bits_per_byte)]
    first_filter = task._filters[0].name
    for group, leaves in outermost_groups(groups).items():
        of_group = groups[group].aggregate_metric_list[0]  # type: ignore[index]
        if name in leaves and of_group.metric in means:
            return Metric(of_group.metric, (of_group.filter_list or [first_filter])[0])
    if not means:
        raise BadInput(
            f"task {name} has no metric that is a mean over its documents: {', '.join(task.aggregation())}",
            fix="give it acc, exact_match or bits_per_byte",
        )
    return Metric(means[0], first_filter)


def outermost_groups(groups: dict[str, Group]) -> dict[str, list[str]]:
    """Group -> its tasks, for each group that has a value of its own and is in no other such group."""
    valued = [group for group in groups.values() if group.has_aggregation]
    inner = {below.name for group in valued for below in group.get_all_groups()}
    return {
        group.name: [task.task_name for task in group.get_all_tasks()] for group in valued if group.name not in inner
    }


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """A manager of the tasks below `folders`, and of lm-eval's own (10 s) if `folders` lack one of the names.

    Raises BadInput for a folder that does not exist and for a task that neither has.
    """
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder} is not a folder", fix="give --include-path a folder with the tasks' YAML files")
    paths: list[str | Path] = list(folders)
    manager = TaskManager(include_path=paths, include_defaults=False)
    missing = [name for name in names if name not in manager.task_index]
    if not missing:
        return manager
    _check_yaml(folders)
    # Searching lm-eval's 14,000 files is faster than parsing them: a typing mistake is reported at once.
    own = [path for path in Path(lm_eval.tasks.__path__[0]).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    text = b"".join(path.read_bytes() for path in own)
    known = set(manager.all_tasks) | {path.stem for path in own}
    if all(name.encode() in text for name in missing):
        manager = TaskManager(include_path=paths)
        known = set(manager.all_tasks)
        missing = [name for name in names if name not in manager.task_index]
    else:
        missing = [name for name in missing if name.encode() not in text]
    if missing:
        near = difflib.get_close_matches(missing[0], known, n=3)
        raise BadInput(
            f"unknown task {missing[0]!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
            fix=f"lm-eval has no such task; --include-path: {', '.join(map(str, folders)) or 'none'}",
        )
    return manager


def _check_yaml(folders: Sequence[Path]) -> None:
    """Raise BadInput for the first YAML file that lm-eval cannot read: lm-eval itself skips it silently."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(path for folder in folders for path in folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # YAML, include and decoding errors have no common base class
            raise BadInput(f"{path} cannot be read as a task: {error}") from error


def _load_task(manager: TaskManager, name: str) -> tuple[dict[str, Task], dict[str, Group]]:
    """lm-eval's (tasks, groups) of one name. Raises BadInput, with the YAML file, if lm-eval cannot load it."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # lm-eval, datasets and jinja raise any type
        raise BadInput(
            f"task {name} cannot be loaded: {_first_error_line(error)}", fix=_defined_in(manager, name)
        ) from error
    return loaded["tasks"], loaded.get("groups", {})


def _check_supported(name: str, task: Task, settings: TaskSettings) -> None:
    """Raise BadInput for a task that Limbeck does not support, or that runs code without confirmation."""
    output_type_of(task)
    if getattr(task, "MULTIMODAL", False):
        raise BadInput(f"task {name} needs images or sound; Limbeck supports text only")
    if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
        raise BadInput(
            f"task {name} runs code that the model writes, on this machine, and that code may do anything",
            fix="run it where that can do no harm, such as in a container, with --confirm-run-unsafe-code",
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


def _prepare(task: Task, settings: TaskSettings) -> str:
    """Configure a task as lm-eval's simple_evaluate does, build its prompts, and return its hash."""
    if settings.gen_kwargs and output_type_of(task).uses_gen_kwargs:
        task.set_config("generation_kwargs", dict(settings.gen_kwargs), update=True)
    own_fewshot = task.get_config("num_fewshot")
    if own_fewshot is None or (settings.num_fewshot is not None and own_fewshot != 0):  # a task that fixes 0 keeps 0
        task.set_config("num_fewshot", settings.num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    limit, samples = settings.limit, settings.document_numbers(task.task_name)
    with hide_progress_bars():
        # Without the chat template, which belongs to the model; prompt hashes cover the model's own prompts.
        task.build_all_requests(limit=limit, samples=samples, system_instruction=settings.system_instruction)
    from lm_eval.utils import handle_non_serializable

    def plain(value: Any) -> Any:
        # A function by its name: its repr has a memory address.
        return value.__qualname__ if hasattr(value, "__qualname__") else handle_non_serializable(value)

    # Without keys that hold file paths: the documents themselves are hashed.
    excluded = ("dataset_kwargs", "metadata")
    config = {key: value for key, value in task.dump_config().items() if key not in excluded}
    documents = [document for _, document in task.doc_iterator(limit=limit, samples=samples)]
    hashed = [config, documents, limit]
    if hashed_settings := settings.hashed_settings(task.task_name):
        hashed.append(hashed_settings)
    return text_digest(json.dumps(hashed, sort_keys=True, default=plain))


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


def _first_error_line(error: BaseException) -> str:
    """The first line of an error's message; the datasets library hides it in the cause."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _defined_in(manager: TaskManager, name: str) -> str | None:
    """The YAML file of a task, as the fix of an error."""
    entry = manager.task_index.get(name)
    return f"it is defined in {entry.yaml_path}" if entry and entry.yaml_path else None
