"""A sweep on a Ray cluster of two nodes with one processor each, on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED

WriteRecipe = Callable[..., Path]
Limbeck = Callable[..., Any]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two nodes."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_two_nodes_make_the_students_of_a_sweep(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, tiny_llama: Path, cluster: str
) -> None:
    wild = "[students.wild.config]\nmodel_type = 'gpt2'\nn_embd = 32\nn_layer = 1\nlayer_norm_epsilon = -10.0\n"
    path = write_recipe(
        tiny_llama, objectives=DISTILLED, extra=wild + '[sweep]\ncontrols = ["labels", "labels_equal_cost"]\n'
    )
    done = limbeck("distill", path, "--ray", cluster, "--format", "json")
    assert done.code == 1, done.err
    made = {each["recipe"]: each for each in json.loads(done.out)}
    assert list(made) == ["small-distilled", "small-labels", "small-labels-equal-cost"]
    assert "wild-distilled: training diverged" in done.err
    assert "wild-labels-equal-cost: its length depends on" in done.err
    runs = {label: store.client.get_run(each["run_id"]) for label, each in made.items()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs.values()}) == 1
    assert len({run.data.tags["limbeck.node"] for run in runs.values()}) == 2
    # This process makes the same students.
    again = json.loads(limbeck("distill", path, "--restart", "--format", "json").out)
    for each in again[:2]:
        assert (each["trained"], each["digest"]) == (True, made[each["recipe"]]["digest"])


def test_without_ray_the_error_shows_how_to_install_it(
    store: Store, limbeck: Limbeck, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = limbeck("distill", write_recipe(), "--ray")
    assert done.code == 2
    assert "--ray needs Ray" in done.err
    assert "pip install 'limbeck[ray]'" in done.err
    assert store.versions("tiny") == []
