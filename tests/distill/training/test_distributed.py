"""Two processes train the student that one process trains. The slow test starts them with torchrun itself."""

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
from tests.distill.limbeck_processes import start_ranks

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
    ranks = start_ranks(limbeck_home, "distill", recipe, "--set", "training.max_steps=6")
    (code, out, err), (worker_code, worker_out, worker_err) = [rank.wait() for rank in ranks]
    assert (code, worker_code) == (0, 0), err + worker_err
    assert out.count("students") == 1
    assert worker_out == ""  # only the main process prints
    assert (err + worker_err).count("teacher cache") == 1
    again = limbeck("distill", recipe, "--set", "training.max_steps=6")
    assert "already made" in again.err
    accumulated = ["training.max_steps=6", "training.gradient_accumulation_steps=2"]
    one = limbeck("distill", recipe, *(word for text in accumulated for word in ("--set", text)))
    assert one.code == 0, one.err
    assert "0 of them captured now" in one.err
    check_students_are_equal(store, slice(3))


def check_sharded_run_equals_one_process(
    limbeck: Callable[..., Any], store: Store, args: list[Any], logged: slice
) -> None:
    one = limbeck(*args, "--set", "training.gradient_accumulation_steps=2")
    assert one.code == 0, one.err
    check_students_are_equal(store, logged)


def sharded_checkpoints(home: Path) -> list[Path]:
    """Checkpoints that accelerate wrote with FSDP, from step 3 to 5."""
    return list(home.glob("runs/*/checkpoint-[345]/pytorch_model_fsdp.bin"))


def test_two_processes_that_shard_the_student_equal_one(
    store: Store, limbeck_home: Path, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra=f"save_minutes = 1e-6\n\n{ON_POLICY}")
    args = ["distill", recipe, "--set", "training.max_steps=6"]
    ranks = start_ranks(limbeck_home, *args, **SHARDED)
    seen: list[Path] = []
    while not seen and ranks[0].is_running():
        time.sleep(0.002)
        seen = sharded_checkpoints(limbeck_home)
    for rank in ranks:
        code, _, err = rank.wait()
        assert code == 0, err
    assert seen
    check_sharded_run_equals_one_process(limbeck, store, args, slice(3))


@pytest.mark.slow
def test_a_sharded_run_of_torchrun_resumes_after_a_kill(
    store: Store, limbeck_home: Path, limbeck: Callable[..., Any], write_recipe: Callable[..., Path], tiny_llama: Path
) -> None:
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra=f"save_minutes = 1e-6\n\n{ON_POLICY}")
    args = ["distill", recipe, "--set", "training.max_steps=6"]
    launcher = torchrun(limbeck_home, *args, **SHARDED)
    while not sharded_checkpoints(limbeck_home) and launcher.poll() is None:
        time.sleep(0.002)
    for worker in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    launcher.communicate(timeout=60)
    alone = limbeck(*args)
    assert alone.code == 2
    assert "written by processes that did shard the student" in alone.err
    launcher = torchrun(limbeck_home, *args, **SHARDED)
    _, err = launcher.communicate(timeout=280)
    assert launcher.returncode == 0, err
    assert "resuming from checkpoints: 1 of 1" in err
    check_sharded_run_equals_one_process(limbeck, store, args, slice(1))  # the first mean covers fewer steps


def test_fsdp_1_is_refused_before_the_teacher_runs(
    limbeck: Callable[..., Any], write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SHARDED, "FSDP_VERSION": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = limbeck("distill", write_recipe())
    assert done.code == 2
    assert "use FSDP 2: accelerate launch --use_fsdp --fsdp_version 2" in done.err
