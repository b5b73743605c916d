"""Makes the students of a sweep on a Ray cluster: one task per student, after one pass of the teacher.

Every node must see the same LIMBECK_HOME, with the teacher cache and the checkpoints, and all paths in the recipe.
Nodes on several hosts need an MLflow server. All of this is checked first.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from limbeck.distill.context import Setting, code_version
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.students import matching, student
from limbeck.distill.teacher.signal import teachers_for
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home
from limbeck.registry.core.terminal import print_status, quiet_libraries
from limbeck.registry.mlflow.store import Store
from limbeck.registry.records import Version

LOCAL = "local"  # the address for a cluster that is started here and ends with the sweep
STOP_SECONDS = 60.0  # for tasks to write a checkpoint after Ctrl-C


class TaskInput(NamedTuple):
    """What a task needs to make its student.

    Attributes:
        plans: of all missing students.
        keys: of the students, by label.
        parent_run: the MLflow run of the sweep.
    """

    setting: Setting
    plans: list[Plan]
    keys: dict[str, str]
    parent_run: str | None


@contextmanager
def ray_cluster(address: str, setting: Setting, store: Store) -> Iterator[list[dict[str, Any]]]:
    """Connect to a cluster and yield its nodes, as Ray describes them, after checking that they can make students.

    Raises BadInput if Ray is not installed, no cluster answers, or a node does not see a path that it needs.
    """
    with _connection(address):
        yield _checked_nodes(setting, store)


def make_students(
    task_input: TaskInput, nodes: Sequence[dict[str, Any]], on_made: Callable[[Plan, Version], None]
) -> dict[str, str]:
    """Make the students of `task_input` on the nodes; a control waits for the students that it is matched with.

    Returns:
        The reasons of the failed students, by label.
    """
    import ray

    failed: dict[str, str] = {}
    source = task_input.setting.source
    setting = task_input.setting._replace(source=source._replace(path=source.path.resolve()))
    remote: Any = ray.remote
    task = remote(max_retries=0, **_resources(nodes, len(task_input.plans)))(_make)
    shared = ray.put(task_input._replace(setting=setting))
    waiting = list(task_input.plans)
    running: dict[Any, Plan] = {}
    try:
        while waiting or running:
            unmade = {plan.label for plan in (*waiting, *running.values())}
            for plan in _ready(setting, waiting, unmade):
                waiting.remove(plan)
                running[task.options(name=plan.label).remote(shared, plan)] = plan
            [first], _ = ray.wait(list(running), num_returns=1)
            plan = running.pop(first)
            result = _result(first)
            if isinstance(result, Version):
                print_status(f"  {plan.label}: {result.ref}")
                on_made(plan, result)
            else:
                print_status(f"  {plan.label}: failed: {result}")
                failed[plan.label] = result
    except BaseException:
        _stop(list(running))
        raise
    return failed


def _ready(setting: Setting, waiting: Sequence[Plan], unmade: set[str]) -> list[Plan]:
    """The plans of `waiting` that are matched with none of the `unmade`."""
    return [
        plan
        for plan in waiting
        if not unmade.intersection(other.label for other in matching.plans_to_match(setting.recipe, plan))
    ]


def _make(task_input: TaskInput, plan: Plan) -> Version | str:
    """Runs on a node: make a student; returns its version, or the reason of its failure."""
    import ray

    quiet_libraries()
    try:
        teacher = (
            teachers_for(task_input.setting, task_input.plans).get(plan.label) if plan.objective.uses_teacher else None
        )
        node = f"{socket.gethostname()} {ray.get_runtime_context().get_node_id()[:8]}"
        return student.make_student(
            task_input.setting,
            plan,
            task_input.keys[plan.label],
            teacher,
            Store(),
            task_input.parent_run,
            {"limbeck.node": node},
        )
    except Exception as error:
        return student.format_error(plan, error)


def _result(reference: Any) -> Version | str:
    import ray

    try:
        result: Version | str = ray.get(reference)
    except ray.exceptions.RayError as error:  # the process or its node died
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return result


def _stop(running: list[Any]) -> None:
    """Stop the tasks, after each has written a checkpoint."""
    import ray

    if not running:
        return
    print_status(f"  stopping {len(running)} students, each with a checkpoint")
    for reference in running:
        ray.cancel(reference, force=False)
    ray.wait(running, num_returns=len(running), timeout=STOP_SECONDS)


@contextmanager
def _connection(address: str) -> Iterator[None]:
    """Connect to a cluster. Raises BadInput if Ray is not installed or no cluster answers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise BadInput("--ray needs Ray, which is not installed", fix="pip install 'limbeck[ray]'") from None
    # The nodes get these variables from here; keys and passwords must be in their own environment.
    variables = {"LIMBECK_HOME": str(home())} | {
        name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "HF_HUB_OFFLINE", "HF_HOME") if name in os.environ
    }
    local_options: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 512 * 2**20}
    try:
        ray.init(
            address=address,
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
            **(local_options if address == LOCAL else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"--ray {address}: {str(error).splitlines()[0]}",
            fix="give the address of a cluster, auto for one that runs here, or --ray alone to start one",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _checked_nodes(setting: Setting, store: Store) -> list[dict[str, Any]]:
    """The nodes of the cluster. Raises BadInput if one does not see what the students need."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    marker = home() / f".seen-{uuid4().hex[:8]}"
    needed = [marker, setting.source.path.resolve(), *(base.path for base in setting.base_models.values())]
    if setting.teacher is not None:
        needed.append(setting.teacher.path)
    marker.touch()
    try:
        remote: Any = ray.remote
        task = remote(num_cpus=1)(_inspect_node)
        references = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(needed)
            for node in nodes
        ]
        inspected = ray.get(references)
    finally:
        marker.unlink()
    for host, missing, version in inspected:
        if missing and missing[0] == marker:
            raise BadInput(
                f"--ray: {host} does not see {home()}",
                fix="put LIMBECK_HOME on a file system that every node has at the same path",
            )
        if missing:
            raise BadInput(
                f"--ray: {host} does not see {missing[0]}",
                fix=f"put {missing[0]} on a file system that every node has at the same path",
            )
        if version != code_version():
            raise BadInput(
                f"--ray: {host} has {version}, and this machine {code_version()}",
                fix="install the same Limbeck on every node",
            )
    hosts = {host for host, _, _ in inspected} | {socket.gethostname()}
    if len(hosts) > 1 and not store.is_server:
        raise BadInput(
            f"--ray: {len(hosts)} hosts ({', '.join(sorted(hosts))}) cannot write to the same {store.tracking_uri}",
            fix="start an MLflow server and set MLFLOW_TRACKING_URI to it, here and on every node",
        )
    print_status(f"  Ray: {len(nodes)} nodes on {', '.join(sorted(hosts))}")
    return nodes


def _inspect_node(needed: Sequence[Path]) -> tuple[str, list[Path], str]:
    """Runs on a node: its host name, the paths that it does not see, and its version of Limbeck."""
    return socket.gethostname(), [path for path in needed if not path.exists()], code_version()


def _resources(nodes: Sequence[dict[str, Any]], tasks: int) -> dict[str, float]:
    """The resources of a task: a GPU if every node has one, else a share of a node's processors."""
    if all(node["Resources"].get("GPU", 0) >= 1 for node in nodes):
        return {"num_gpus": 1, "num_cpus": 1}
    cpus = min(int(node["Resources"]["CPU"]) for node in nodes)
    return {"num_cpus": max(1, cpus // math.ceil(tasks / len(nodes)))}
