"""Two processes, started as by torchrun and accelerate launch, train the student that one process trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.distill.conftest import DISTILLED

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
ON_POLICY = '[cache]\nform = "online"\n\n[on_policy]\nlmbda = 0.5\nmax_new_tokens = 8\n'


def torchrun(home: Path, *args: object, **variables: str) -> subprocess.Popen[str]:
    """Start `limbeck` in two new processes that communicate over gloo."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--monitor-interval", "0.02", "-m", "limbeck", *map(str, args)]
    environment = {**os.environ, "LIMBECK_HOME": str(home), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words, env=environment | variables, stdout=pipe, stderr=pipe, text=True, cwd=home.parent, start_new_session=True
    )


def check_students_are_equal(store: Store, logged: slice) -> None:
    """The two registered students have the same losses at the `logged` entries, and the same weights."""
    versions = [version for version in store.versions() if version.kind == "student"]
    assert len(versions) == 2  # each registered once
    losses = [[m.value for m in store.client.get_metric_history(v.run_id, "loss")] for v in versions]
    assert len(losses[0]) == 3
    assert losses[0][logged] == pytest.approx(losses[1][logged], abs=2e-4)
    actual, expected = (
        load_file(store.artifacts.verified_folder(version) / "model.safetensors") for version in versions
    )
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=2e-5, rtol=1e-3)


def test_two_processes_equal_one_with_twice_the_accumulation(
    store: Store, limbeck_home: Path, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra='optim = "muon"')
    two = torchrun(limbeck_home, "distill", recipe, "--set", "training.max_steps=6")
    out, err = two.communicate(timeout=280)
    assert two.returncode == 0, err
    assert out.count("students") == 1  # one process prints
    assert err.count("teacher cache") == 1
    again = limbeck("distill", recipe, "--set", "training.max_steps=6")
    assert "already made" in again.err
    accumulated = ["training.max_steps=6", "training.gradient_accumulation_steps=2"]
    one = limbeck("distill", recipe, *(word for text in accumulated for word in ("--set", text)))
    assert one.code == 0, one.err
    assert "0 of them captured now" in one.err
    check_students_are_equal(store, slice(3))


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_that_shard_the_student_equal_one(
    store: Store,
    limbeck_home: Path,
    limbeck: Callable[..., Any],
    write_recipe: Callable[..., Path],
    tiny_llama: Path,
    killed: bool,
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra=f"save_minutes = 1e-6\n\n{ON_POLICY}")
    args = ["distill", recipe, "--set", "training.max_steps=6"]
    two = torchrun(limbeck_home, *args, **SHARDED)
    sharded = lambda: list(limbeck_home.glob("runs/*/checkpoint-[345]/pytorch_model_fsdp.bin"))  # noqa: E731
    while not (seen := sharded()) and two.poll() is None:
        time.sleep(0.002)
    if killed:
        for worker in Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split():
            os.kill(int(worker), signal.SIGKILL)
        two.communicate(timeout=60)
        alone = limbeck(*args)
        assert alone.code == 2
        assert "written by processes that did shard the student" in alone.err
        two = torchrun(limbeck_home, *args, **SHARDED)
    _, err = two.communicate(timeout=280)
    assert two.returncode == 0, err
    assert seen  # accelerate wrote sharded checkpoints
    assert ("resuming from checkpoints: 1 of 1" in err) == killed
    one = limbeck(*args, "--set", "training.gradient_accumulation_steps=2")
    assert one.code == 0, one.err
    check_students_are_equal(store, slice(1 if killed else 3))  # after a resume, the first mean covers fewer steps


def test_fsdp_1_is_refused_before_the_teacher_runs(
    limbeck: Callable[..., Any], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SHARDED, "FSDP_VERSION": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = limbeck("distill", write_recipe())
    assert done.code == 2
    assert "use FSDP 2: accelerate launch --use_fsdp --fsdp_version 2" in done.err
