"""lm-eval's tasks, loaded, checked and hashed; and which of its numbers Limbeck keeps of each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.digest import json_digest, text_digest
from registry.errors import BadInput
from registry.terminal import quiet_libraries

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FEWSHOT_SEED = 1234  # lm-eval's own default


@dataclass(frozen=True)
class TaskSet:
    """lm-eval tasks, loaded and hashed.

    Attributes:
        names: as asked for. digest: over the task_hash of every task.
        harness: name and version of lm-eval. requests: how many a model will be asked, repeats included.
        task_hashes: task -> hash of its configuration and documents; where the files lie has no part in it.
        tasks, groups: lm-eval's own objects. limit: documents taken of each task; None is all.
    """

    names: list[str]
    digest: str
    harness: str
    requests: int
    task_hashes: dict[str, str]
    tasks: dict[str, Task]
    groups: dict[str, Group]
    limit: int | None

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        include_path: Sequence[Path] = (),
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
    ) -> TaskSet:
        """Load tasks by name: from the YAML files below `include_path`, else lm-eval's own.

        Args:
            num_fewshot: examples in each prompt, where the task does not fix it to 0. limit: documents of
                each task, from its beginning.

        Raises:
            BadInput: an unknown task or folder, YAML that cannot be loaded, data that is missing, or a task
                with no metric that is a mean over documents.
        """
        quiet_libraries()
        import importlib.metadata

        names = list(dict.fromkeys(names))
        if not names:
            raise BadInput("no tasks are named", fix="name some with --tasks")
        manager = _manager(names, [Path(folder) for folder in include_path])
        tasks: dict[str, Task] = {}
        groups: dict[str, Group] = {}
        for name in names:
            for known, found in zip((tasks, groups), _loaded(manager, name), strict=True):
                known.update(found)
        hashes = {}
        for name, task in tasks.items():
            try:
                hashes[name] = _prepare(task, num_fewshot, limit)
            except Exception as error:  # a template that does not fit the documents raises whatever comes
                raise BadInput(f"task {name} gives no prompts: {_said(error)}", fix=_from(manager, name)) from error
            metric_of(name, task, groups)
        requests = sum(instance.repeats for task in tasks.values() for instance in task.instances)
        harness = f"lm-eval {importlib.metadata.version('lm-eval')}"
        return cls(names, json_digest(hashes), harness, requests, hashes, tasks, groups, limit)


class Metric(NamedTuple):
    """The one number of a task that is kept, and the lm-eval filter it is taken after."""

    name: str
    filter: str

    @property
    def key(self) -> str:
        return f"{self.name},{self.filter}"


def metric_of(name: str, task: Task, groups: dict[str, Group]) -> Metric:
    """The task's group decides, else it is the first metric that is a mean over documents."""
    from lm_eval.api.metrics import bits_per_byte, mean

    means = [metric for metric, how in task.aggregation().items() if how in (mean, bits_per_byte)]
    first_filter = task._filters[0].name
    for group, leaves in outermost(groups).items():
        wanted = groups[group].aggregate_metric_list[0]  # type: ignore[index]
        if name in leaves and wanted.metric in means:
            return Metric(wanted.metric, (wanted.filter_list or [first_filter])[0])
    if not means:
        raise BadInput(
            f"task {name} has no metric that is a mean over its documents: {', '.join(task.aggregation())}",
            fix="give it acc, exact_match or bits_per_byte",
        )
    return Metric(means[0], first_filter)


def outermost(groups: dict[str, Group]) -> dict[str, list[str]]:
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


def _loaded(manager: TaskManager, name: str) -> tuple[dict[str, Task], dict[str, Group]]:
    """lm-eval's objects for one name. Raises BadInput for what it does not like, with the YAML file."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # lm-eval, datasets and jinja raise whatever comes
        raise BadInput(f"task {name} cannot be loaded: {_said(error)}", fix=_from(manager, name)) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            why = "needs images or sound" if getattr(task, "MULTIMODAL", False) else "runs the code that models write"
            raise BadInput(f"task {task.task_name} {why}; Limbeck does not do that")
    return loaded["tasks"], loaded.get("groups", {})


def _prepare(task: Task, num_fewshot: int | None, limit: int | None) -> str:
    """Set the number of examples, build the prompts, and give the task's hash."""
    # As lm-eval's simple_evaluate: a task that fixes 0 keeps it.
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)
    with quiet_bars():
        task.build_all_requests(limit=limit)
    from lm_eval.utils import handle_non_serializable

    def plain(value: Any) -> Any:
        # A function by its name: its repr tells where it lies in memory.
        return value.__qualname__ if hasattr(value, "__qualname__") else handle_non_serializable(value)

    # What names files is left out: the documents themselves count.
    places = ("dataset_kwargs", "metadata")
    config = {key: value for key, value in task.dump_config().items() if key not in places}
    documents = [document for _, document in task.doc_iterator(limit=limit)]
    return text_digest(json.dumps([config, documents, limit], sort_keys=True, default=plain))


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Without lm-eval's own progress bar, which cannot be turned off."""
    import lm_eval.api.task as module

    bar = module.tqdm
    module.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        module.tqdm = bar


def _said(error: BaseException) -> str:
    """The first line of what an error says; datasets hides that in the cause."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _from(manager: TaskManager, name: str) -> str | None:
    entry = manager.task_index.get(name)
    return f"it is defined in {entry.yaml_path}" if entry and entry.yaml_path else None
