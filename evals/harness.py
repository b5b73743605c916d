"""lm-eval's tasks over any model: one metric a task, a value and a weight for every document."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from evals.statistics import mean_and_stderr
from registry.digest import json_digest, text_digest
from registry.errors import BadInput
from registry.records import TaskResult
from registry.resolve import Model
from registry.terminal import quiet_libraries

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FEWSHOT_SEED = 1234  # lm-eval's own default
DOCUMENTS = pa.schema(
    {
        "task": pa.string(),
        "doc_id": pa.int64(),
        "doc_hash": pa.string(),
        "prompt_hash": pa.string(),
        "metric": pa.string(),
        "value": pa.float64(),
        "weight": pa.float64(),
        "cluster": pa.string(),
    }
)


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
            _metric(name, task, groups)
        requests = sum(instance.repeats for task in tasks.values() for instance in task.instances)
        harness = f"lm-eval {importlib.metadata.version('lm-eval')}"
        return cls(names, json_digest(hashes), harness, requests, hashes, tasks, groups, limit)


class Scores(NamedTuple):
    """What a model made of a task set.

    `tasks`: of groups too; a sub-task names the outermost group that it counts in. `prompts_digest`: over every
    prompt_hash. `documents`: one row for each document, columns as in DOCUMENTS; a metric is the mean of its
    documents' values by their weights, a group's that of its sub-tasks' documents together.
    """

    tasks: dict[str, TaskResult]
    prompts_digest: str
    documents: pa.Table


def score(
    model: Model,
    tasks: TaskSet,
    *,
    batch_tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    trust_remote_code: bool = False,
) -> Scores:
    """Score one model.

    Args:
        batch_tokens: the most tokens of one forward pass; see `evals.lm.LimbeckLM`.
        on_progress: called with the requests done and those there are in all.

    Raises:
        BadInput: a model that cannot be loaded, or a task that it cannot do.
    """
    quiet_libraries()
    from lm_eval.evaluator import evaluate

    from evals.engines import load
    from evals.lm import LimbeckLM
    from evals.rows import BATCH_TOKENS

    done = 0

    def advance(requests: int) -> None:
        nonlocal done
        done += requests
        on_progress(done, tasks.requests)

    lm = LimbeckLM(load(model, trust_remote_code), batch_tokens=batch_tokens or BATCH_TOKENS, on_requests=advance)
    for task in tasks.tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    with _quiet_bars():
        results = evaluate(
            lm, {"tasks": tasks.tasks, "groups": tasks.groups}, limit=tasks.limit, bootstrap_iters=0, log_samples=True
        )
    return _scores(tasks, results)


def _scores(tasks: TaskSet, results: Any) -> Scores:
    """lm-eval's results as `Scores`."""
    chosen = {name: _metric(name, task, tasks.groups) for name, task in tasks.tasks.items()}
    tables = {name: _documents(task, chosen[name], results["samples"][name]) for name, task in tasks.tasks.items()}
    members = {
        group: leaves
        for group, leaves in _outermost(tasks.groups).items()
        if chosen[leaves[0]].key in results["results"][group]
    }
    for group, names in members.items():
        if not tasks.groups[group].aggregate_metric_list[0].weight_by_size:  # type: ignore[index]
            # The group's value is the mean of its tasks' means. Within a task the weights stay alike.
            documents = sum(tables[name].num_rows for name in names)
            for name in names:
                weight = documents / len(names) / tables[name].num_rows
                column = DOCUMENTS.get_field_index("weight")
                weights = pa.array([weight] * tables[name].num_rows)
                tables[name] = tables[name].set_column(column, DOCUMENTS.field(column), weights)

    def result(name: str, leaves: Sequence[str], group: str | None) -> TaskResult:
        """Of a task, or of a group with its tasks as `leaves`."""
        metric, task = chosen[leaves[0]], tasks.tasks[leaves[0]]
        table = pa.concat_tables([tables[leaf] for leaf in leaves])
        columns = (table[column].to_numpy() for column in ("value", "weight", "cluster"))
        hashes = [tasks.task_hashes[leaf] for leaf in leaves]
        prompts = [json_digest(tables[leaf]["prompt_hash"].to_pylist()) for leaf in leaves]
        chances = [(_chance(tasks.tasks[leaf], metric.name), _total(tables[leaf])) for leaf in leaves]
        known = [chance for chance, _ in chances if chance is not None]
        return TaskResult(
            metric=metric.name,
            value=float(results["results"][name][metric.key]),
            stderr=mean_and_stderr(*columns)[1],
            higher_is_better=bool(task.higher_is_better().get(metric.name, True)),
            documents=table.num_rows,
            chance=float(np.average(known, weights=[w for _, w in chances])) if len(known) == len(leaves) else None,
            task_hash=hashes[0] if leaves == [name] else json_digest(hashes),
            prompt_hash=prompts[0] if leaves == [name] else json_digest(prompts),
            group=group,
        )

    group_of = {leaf: group for group, leaves in members.items() for leaf in leaves}
    scored = {group: result(group, leaves, None) for group, leaves in members.items()}
    scored |= {name: result(name, [name], group_of.get(name)) for name in tasks.tasks}
    prompts = {name: scored[name].prompt_hash for name in tasks.tasks}
    in_order = {name: scored[name] for name in (*tasks.names, *scored) if name in scored}
    return Scores(in_order, json_digest(prompts), pa.concat_tables(tables.values()))


class _Metric(NamedTuple):
    """The one number of a task that is kept, and the lm-eval filter it is taken after."""

    name: str
    filter: str

    @property
    def key(self) -> str:
        return f"{self.name},{self.filter}"


def _metric(name: str, task: Task, groups: dict[str, Group]) -> _Metric:
    """The task's group decides, else it is the first metric that is a mean over documents."""
    from lm_eval.api.metrics import bits_per_byte, mean

    means = [metric for metric, how in task.aggregation().items() if how in (mean, bits_per_byte)]
    first_filter = task._filters[0].name
    for group, leaves in _outermost(groups).items():
        wanted = groups[group].aggregate_metric_list[0]  # type: ignore[index]
        if name in leaves and wanted.metric in means:
            return _Metric(wanted.metric, (wanted.filter_list or [first_filter])[0])
    if not means:
        raise BadInput(
            f"task {name} has no metric that is a mean over its documents: {', '.join(task.aggregation())}",
            fix="give it acc, exact_match or bits_per_byte",
        )
    return _Metric(means[0], first_filter)


def _outermost(groups: dict[str, Group]) -> dict[str, list[str]]:
    """The groups that have a value of their own and are in no other such group, and the tasks below each."""
    valued = [group for group in groups.values() if group.has_aggregation]
    inner = {below.name for group in valued for below in group.get_all_groups()}
    return {
        group.name: [task.task_name for task in group.get_all_tasks()] for group in valued if group.name not in inner
    }


def _documents(task: Task, metric: _Metric, samples: Sequence[dict[str, Any]]) -> pa.Table:
    """A task's samples by the columns of DOCUMENTS."""
    rows = []
    for sample in samples:
        if sample["filter"] != metric.filter or metric.name not in sample:
            continue
        value, weight = sample[metric.name], 1.0
        if isinstance(value, tuple):  # log-probability and size, of which bits per byte are made
            nats, weight = value
            value = -nats / weight / np.log(2)
        doc = sample["doc"]
        path = doc.get("path") if isinstance(doc, dict) else None
        rows.append(
            {
                "task": task.task_name,
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "prompt_hash": sample["prompt_hash"],
                "metric": metric.name,
                "value": float(value),
                "weight": float(weight),
                "cluster": str(path or f"{task.task_name}:{sample['doc_id']}"),
            }
        )
    return pa.Table.from_pylist(rows, DOCUMENTS)


def _total(table: pa.Table) -> float:
    return float(table["weight"].to_numpy().sum())


def _chance(task: Task, metric: str) -> float | None:
    """The metric's value for guessing; None where that has no meaning."""
    if metric == "bits_per_byte":
        return 8.0  # a byte drawn from all 256
    if task.OUTPUT_TYPE == "multiple_choice" and metric in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info"):
        docs = {instance.doc_id: instance.doc for instance in task.instances}
        return float(np.mean([1 / len(task.doc_to_choice(doc)) for doc in docs.values()]))
    return 0.0 if task.OUTPUT_TYPE == "generate_until" and task.higher_is_better().get(metric, True) else None


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
    with _quiet_bars():
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
def _quiet_bars() -> Iterator[None]:
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
