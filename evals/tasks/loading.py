"""Loads lm-eval's tasks by name, and finds what is wrong with their files. No task's own code runs unasked."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from limbeck.evals.tasks.data_files import data_files_of, file_faults
from limbeck.evals.tasks.faults import Fault, FaultyTasks
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

UNPICKLING = ("pandas", "iceberg")  # formats of the library datasets
MAX_WARNING = 300  # characters of a warning of lm-eval


class LoadedTasks(NamedTuple):
    """lm-eval's tasks and groups by name, and the faults of the others."""

    tasks: dict[str, Task]
    groups: dict[str, Group]
    faults: list[Fault]
    yaml_files: dict[str, str]  # task or group -> its YAML file


class _TaskCode(Exception):
    """Code that a task file names, which must not run."""


def load_tasks(names: Sequence[str], folders: Sequence[Path], *, allow_code: bool = False) -> LoadedTasks:
    """Load tasks and groups: from the YAML files below `folders`, else lm-eval's own.

    Args:
        allow_code: run Python code that the files in `folders` name. lm-eval's own tasks may always run theirs.

    Raises:
        BadInput: a folder or a task that does not exist.
        FaultyTasks: a task that does not exist, beside files that cannot be read.
    """
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder} is not a folder", fix="give --include-path a folder with the tasks' YAML files")
    manager = _manager(names, folders)
    files = {name: str(entry.yaml_path) for name, entry in manager.task_index.items() if entry.yaml_path}
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    faults: list[Fault] = []
    for name in names:
        try:
            with _checked_construction(manager, allow_code), show_warnings():
                loaded = manager.load([name])
        except Exception as error:  # lm-eval, datasets and jinja raise any type
            faults += _loading_faults(manager, name, error)
            continue
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
    faults += _duplicates({*names, *tasks, *groups}, folders)
    for name, task in tasks.items():
        faults += _data_faults(name, task.config)
    return LoadedTasks(tasks, groups, faults, files)


def names_in(folder: Path) -> tuple[list[str], list[Fault]]:
    """The tasks that the YAML files below a folder define, and the faults of those that cannot be read."""
    named, unreadable = _names_by_file([folder])
    return sorted({name for name, is_task in named.values() if is_task}), unreadable


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """A manager of the tasks below `folders`, and of lm-eval's own (10 s) if `folders` lack one of the names."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    paths: list[str | Path] = list(folders)
    manager = TaskManager(include_path=paths, include_defaults=False)
    missing = [name for name in names if name not in manager.task_index]
    if not missing:
        return manager
    if unreadable := _names_by_file(folders)[1]:
        raise FaultyTasks(unreadable)
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


def _names_by_file(folders: Sequence[Path]) -> tuple[dict[Path, tuple[str, bool]], list[Fault]]:
    """YAML file -> (the name it defines, whether that is a task), and the faults of files that cannot be read.

    lm-eval itself skips those silently. A file without a name is one that others include.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[Path, tuple[str, bool]] = {}
    faults = []
    paths = {path.resolve(): path for folder in folders for path in folder.rglob("*.yaml")}
    for path in sorted(paths.values()):
        try:
            config = load_yaml(path, resolve_func=False)
        except Exception as error:  # YAML, include and decoding errors have no common base class
            if path.stat().st_size == 0:
                faults.append(Fault(kind="empty file", detail="it defines no task", file=str(path)))
            else:
                text = " ".join(str(error).split())[:MAX_WARNING]
                faults.append(Fault(kind="unreadable file", detail=f"cannot be read as a task: {text}", file=str(path)))
            continue
        name = config.get("group", config.get("task"))
        if isinstance(name, str):
            found[path] = name, "group" not in config
    return found, faults


def _duplicates(names: set[str], folders: Sequence[Path]) -> Iterator[Fault]:
    """A fault for each of these names that more than one file below `folders` defines: lm-eval takes one of them."""
    files: dict[str, list[Path]] = {}
    for path, (name, _) in _names_by_file(folders)[0].items():
        files.setdefault(name, []).append(path)
    for name in sorted(names & files.keys()):
        if files[name][1:]:
            several = " and ".join(map(str, files[name]))
            yield Fault(kind="two files with one name", detail=f"{several} define it", task=name)


def _loading_faults(manager: TaskManager, name: str, error: Exception) -> list[Fault]:
    """Why a task or group cannot be loaded: what is wrong with its data files, else lm-eval's own words."""
    file = _yaml_file(manager, name)
    if isinstance(error, _TaskCode):
        return [Fault(kind="code of a task", detail=str(error), task=name, file=file)]
    faults = []
    for member, config in _members(manager, name, {}):
        faults += _data_faults(member, SimpleNamespace(**config), parse=True)
    return faults or [Fault(kind="task that cannot be loaded", detail=first_line(error), task=name, file=file)]


def _members(manager: TaskManager, name: str, inherited: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, configuration) of the tasks of a group or tag; of the task itself otherwise.

    Args:
        inherited: what the group's entry sets.
    """
    entry = manager.task_index.get(name)
    config = {**((entry and entry.cfg) or {}), **inherited}
    below = config.pop("task", None)
    if not isinstance(below, list):
        tagged = sorted(entry.tags) if entry and entry.cfg is None else []
        below = [member for member in tagged if member != name]
        if not below:
            yield name, config
            return
    for member in below:
        own = member if isinstance(member, dict) else {}
        inner = str(own.get("task", own.get("group")) if own else member)
        if inner != name:
            yield from _members(manager, inner, {**config, **own, "task": None})


def _data_faults(name: str, config: Any, *, parse: bool = False) -> list[Fault]:
    """What is wrong with a task's data files; with `parse`, with their lines too."""
    files = data_files_of(config)
    encoding = str((getattr(config, "dataset_kwargs", None) or {}).get("encoding", "utf-8"))
    distinct = dict.fromkeys(path for paths in files.values() for path in paths)
    return [fault for path in distinct for fault in file_faults(path, name, encoding=encoding, parse=parse)]


def _yaml_file(manager: TaskManager, name: str) -> str | None:
    entry = manager.task_index.get(name)
    return str(entry.yaml_path) if entry and entry.yaml_path else None


@contextmanager
def _checked_construction(manager: TaskManager, allow_code: bool) -> Iterator[None]:
    """Within it, lm-eval makes tasks without code of the user's files, and with a first document of any kind.

    lm-eval tries its templates on the first document only, and fails with an IndexError if that one has a fault. Here
    the task is made nevertheless, so that all its documents are checked alike.
    """
    import lm_eval.tasks
    from lm_eval.api.registry import metric_registry
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import _factory, _yaml_loader

    own_folder = Path(lm_eval.tasks.__path__[0]).resolve()
    own_names = {
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path and Path(entry.yaml_path).resolve().is_relative_to(own_folder)
    }
    import_function: Callable[[str, Path], Any] = _yaml_loader._import_func_in_yml

    def guarded_import(name: str, folder: Path) -> Any:
        if not allow_code and not folder.resolve().is_relative_to(own_folder):
            raise _TaskCode(f"`!function {name}`")
        return import_function(name, folder)

    class AnyFirstDocument(ConfigurableTask):
        def __init__(self, config: dict[str, Any]) -> None:
            if not allow_code and config["task"].split("::")[0] not in own_names:
                for way in _ways_to_code(config, metric_registry):
                    raise _TaskCode(way)
            try:
                super().__init__(config=config)
            except Exception:
                if not hasattr(self, "multiple_target"):  # lm-eval sets it just before it reads the first document
                    raise

    _yaml_loader._import_func_in_yml = guarded_import
    _factory.ConfigurableTask = AnyFirstDocument  # type: ignore[misc]
    _use_sandbox()
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml = import_function
        _factory.ConfigurableTask = ConfigurableTask  # type: ignore[misc]


def _ways_to_code(config: dict[str, Any], metrics: Any) -> Iterator[str]:
    """How a task's configuration would have code run, without `!function`.

    Args:
        metrics: lm-eval's own by name. The library `evaluate` loads others, as Python from the hub or disk.
    """
    if config.get("dataset_path") in UNPICKLING:
        yield f"dataset_path {config['dataset_path']!r} reads pickle files, which can hold code"
    for each in config.get("metric_list") or [] if config.get("process_results") is None else []:
        metric = each.get("metric") if isinstance(each, dict) else None
        if isinstance(metric, str) and (each.get("hf_evaluate") is True or metric not in metrics):
            yield f"metric {metric!r} is not lm-eval's own: it would be loaded and run as code"


def _use_sandbox() -> None:
    """Let lm-eval's templates reach no Python internals, since one of a YAML file could run any code.

    Each is compiled once; lm-eval compiles it again for every document and example, which takes most of its time.
    """
    from jinja2 import Template
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    if isinstance(utils.env, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters |= utils.env.filters
    compiled: Callable[[str], Template] = lru_cache(maxsize=1024)(sandbox.from_string)
    sandbox.from_string = compiled  # type: ignore[method-assign,assignment]
    utils.env = sandbox


@contextmanager
def show_warnings() -> Iterator[None]:
    """Within it, print each different warning of lm-eval once."""
    seen: set[str] = set()

    class Printer(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(record.getMessage().split())
            if text not in seen:
                seen.add(text)
                print_status(f"  lm-eval: {text[:MAX_WARNING]}")

    logger, handler = logging.getLogger("lm_eval"), Printer(logging.WARNING)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the datasets library hides it in the cause."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return text.splitlines()[0][:MAX_WARNING]
