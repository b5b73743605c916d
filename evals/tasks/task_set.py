"""lm-eval's tasks, loaded, checked and hashed; and which of its numbers Limbeck keeps of each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    """How tasks are asked, by the names that lm-eval has for it. All of it goes into the tasks' hashes.

    Attributes:
        num_fewshot: examples in each prompt, where the task does not fix it to 0.
        limit: documents of each task, from its beginning; None is all.
        samples: task -> numbers of the documents to take; other tasks take all. Not together with limit.
        apply_chat_template: True, or the name of one of the tokenizer's templates.
        fewshot_as_multiturn: each example as a turn of its own; None is where there is a chat template.
        system_instruction: put before each prompt.
        gen_kwargs: laid over what generate_until tasks say themselves.
        confirm_run_unsafe_code: tasks that run what the model writes are allowed. No part of the hashes.
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
        """`fewshot_as_multiturn`, decided."""
        if self.fewshot_as_multiturn is None:
            return bool(self.apply_chat_template)
        return self.fewshot_as_multiturn

    def document_numbers(self, task: str) -> list[int] | None:
        """The documents taken of one task, in order; None where `samples` says nothing of it."""
        chosen = (self.samples or {}).get(task)
        return None if chosen is None else sorted(set(chosen))

    def hashed_settings(self, task: str) -> dict[str, Any]:
        """What is not lm-eval's default and is no part of the task's own configuration."""
        said = {
            "samples": self.document_numbers(task),
            "apply_chat_template": self.apply_chat_template or None,
            "fewshot_as_multiturn": self.uses_multiturn or None,
            "system_instruction": self.system_instruction,
        }
        return {key: value for key, value in said.items() if value is not None}


@dataclass(frozen=True)
class TaskSet:
    """lm-eval tasks, loaded and hashed.

    Attributes:
        names: as asked for. digest: over the task_hash of every task.
        harness: name and version of lm-eval. requests: how many a model will be asked, repeats included.
        task_hashes: task -> hash of its configuration, documents and settings; where the files lie has no part in it.
        tasks, groups: lm-eval's own objects. settings: how they are asked.
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
            **settings: the fields of `Settings`.

        Raises:
            BadInput: an unknown task or folder, YAML that cannot be loaded, data that is missing, a task
                with no metric that is a mean over documents, samples that are not there, or a task that runs
                code where that is not confirmed.
        """
        quiet_libraries()
        import importlib.metadata

        asked = TaskSettings(**settings)
        names = list(dict.fromkeys(names))
        if not names:
            raise BadInput("no tasks are named", fix="name some with --tasks")
        if asked.samples is not None and asked.limit is not None:
            raise BadInput("samples and a limit cannot go together", fix="leave out --samples or --limit")
        if asked.uses_multiturn and not asked.apply_chat_template:
            raise BadInput("--fewshot-as-multiturn makes turns of a chat", fix="give --apply-chat-template too")
        manager = _manager(names, [Path(folder) for folder in include_path])
        tasks: dict[str, Task] = {}
        groups: dict[str, Group] = {}
        for name in names:
            for known, found in zip((tasks, groups), _load_task(manager, name), strict=True):
                known.update(found)
        _check_samples(tasks, asked)
        hashes = {}
        for name, task in tasks.items():
            _check_code(name, task, asked)
            try:
                hashes[name] = _prepare(task, asked)
            except Exception as error:  # a template that does not fit the documents raises whatever comes
                raise BadInput(
                    f"task {name} gives no prompts: {_first_error_line(error)}", fix=_defined_in(manager, name)
                ) from error
            choose_metric(name, task, groups)
        requests = sum(instance.repeats for task in tasks.values() for instance in task.instances)
        harness = f"lm-eval {importlib.metadata.version('lm-eval')}"
        return cls(names, json_digest(hashes), harness, requests, hashes, tasks, groups, asked)


class Metric(NamedTuple):
    """The one number of a task that is kept, and the lm-eval filter it is taken after."""

    name: str
    filter: str

    @property
    def key(self) -> str:
        return f"{self.name},{self.filter}"


def choose_metric(name: str, task: Task, groups: dict[str, Group]) -> Metric:
    """The task's group decides, else it is the first metric that is a mean over documents."""
    from lm_eval.api.metrics import bits_per_byte, mean

    means = [metric for metric, how in task.aggregation().items() if how in (mean, bits_per_byte)]
    first_filter = task._filters[0].name
    for group, leaves in outermost_groups(groups).items():
        wanted = groups[group].aggregate_metric_list[0]  # type: ignore[index]
        if name in leaves and wanted.metric in means:
            return Metric(wanted.metric, (wanted.filter_list or [first_filter])[0])
    if not means:
        raise BadInput(
            f"task {name} has no metric that is a mean over its documents: {', '.join(task.aggregation())}",
            fix="give it acc, exact_match or bits_per_byte",
        )
    return Metric(means[0], first_filter)


def outermost_groups(groups: dict[str, Group]) -> dict[str, list[str]]:
    """The groups that have a value of their own and are in no other such group, and the tasks below each."""
    valued = [group for group in groups.values() if group.has_aggregation]
    inner = {below.name for group in valued for below in group.get_all_groups()}
    return {
        group.name: [task.task_name for task in group.get_all_tasks()] for group in valued if group.name not in inner
    }


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """Knows the tasks below `folders`; lm-eval's own too (10 s) where those do not have all the names."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder", fix="give --include-path a folder with the tasks' YAML files")
    paths: list[str | Path] = list(folders)
    manager = TaskManager(include_path=paths, include_defaults=False)
    missing = [name for name in names if name not in manager.task_index]
    if not missing:
        return manager
    _check_yaml(folders)
    # lm-eval's 14,000 files are searched before they are parsed, so that a typing mistake is told at once.
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
            fix=f"it is none of lm-eval's; looked in {', '.join(map(str, folders)) or 'no --include-path'} too",
        )
    return manager


def _check_yaml(folders: Sequence[Path]) -> None:
    """lm-eval leaves files that it cannot read out in silence. Raises BadInput, naming the file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(path for folder in folders for path in folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # YAML, include and decoding errors have no common type
            raise BadInput(f"{path} cannot be read as a task: {error}") from error


def _load_task(manager: TaskManager, name: str) -> tuple[dict[str, Task], dict[str, Group]]:
    """lm-eval's objects for one name. Raises BadInput for what it does not like, with the YAML file."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # lm-eval, datasets and jinja raise whatever comes
        raise BadInput(
            f"task {name} cannot be loaded: {_first_error_line(error)}", fix=_defined_in(manager, name)
        ) from error
    return loaded["tasks"], loaded.get("groups", {})


def _check_code(name: str, task: Task, settings: TaskSettings) -> None:
    """Raises BadInput for what Limbeck does not do, and for code that may not be run."""
    if getattr(task, "MULTIMODAL", False):
        raise BadInput(f"task {name} needs images or sound; Limbeck does not do that")
    if getattr(task, "UNSAFE_CODE", False) and not settings.confirm_run_unsafe_code:
        raise BadInput(
            f"task {name} runs the code that models write on this machine, and models write what they like",
            fix="give --confirm-run-unsafe-code where that can do no harm, such as in a container",
        )


def _check_samples(tasks: dict[str, Task], settings: TaskSettings) -> None:
    """Raises BadInput for a task that is not asked, and for numbers that no document has."""
    for name, chosen in (settings.samples or {}).items():
        if name not in tasks:
            raise BadInput(f"samples name the task {name!r}", fix=f"the tasks are {', '.join(tasks)}")
        count = len(tasks[name].eval_docs)
        wrong = [index for index in chosen if not 0 <= index < count]
        if wrong or not chosen:
            said = f"document {wrong[0]}" if wrong else "no documents"
            raise BadInput(f"samples of {name} name {said}", fix=f"it has documents 0 to {count - 1}")


def _prepare(task: Task, settings: TaskSettings) -> str:
    """Configure a task as lm-eval's simple_evaluate does, build its prompts, and give its hash."""
    if settings.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
        task.set_config("generation_kwargs", dict(settings.gen_kwargs), update=True)
    own = task.get_config("num_fewshot")
    if own is None or (settings.num_fewshot is not None and own != 0):  # a task that fixes 0 keeps it
        task.set_config("num_fewshot", settings.num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    limit, samples = settings.limit, settings.document_numbers(task.task_name)
    with hide_progress_bars():
        # Without the chat template, which is the model's; a model's own prompts are in the prompt hashes.
        task.build_all_requests(limit=limit, samples=samples, system_instruction=settings.system_instruction)
    from lm_eval.utils import handle_non_serializable

    def plain(value: Any) -> Any:
        # A function by its name: its repr tells where it lies in memory.
        return value.__qualname__ if hasattr(value, "__qualname__") else handle_non_serializable(value)

    # What names files is left out: the documents themselves count.
    places = ("dataset_kwargs", "metadata")
    config = {key: value for key, value in task.dump_config().items() if key not in places}
    documents = [document for _, document in task.doc_iterator(limit=limit, samples=samples)]
    hashed = [config, documents, limit]
    if said := settings.hashed_settings(task.task_name):
        hashed.append(said)
    return text_digest(json.dumps(hashed, sort_keys=True, default=plain))


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Without lm-eval's own progress bar, which cannot be turned off."""
    import lm_eval.api.task as module

    bar = module.tqdm
    module.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        module.tqdm = bar


def _first_error_line(error: BaseException) -> str:
    """The first line of what an error says; datasets hides that in the cause."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _defined_in(manager: TaskManager, name: str) -> str | None:
    entry = manager.task_index.get(name)
    return f"it is defined in {entry.yaml_path}" if entry and entry.yaml_path else None
