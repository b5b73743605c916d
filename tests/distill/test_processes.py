"""Two processes, as torchrun starts them, make the student that one process makes of twice the batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from registry.store import Store
from tests.distill.conftest import DISTILLED

ROOT = Path(__file__).parents[2]


def torchrun(home: Path, *args: object, fsdp: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `limbeck` in two processes of their own, over gloo."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck"]
    environment = {**os.environ, "LIMBECK_HOME": str(home), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*words, *map(str, args)], env=environment, capture_output=True, text=True, timeout=280, cwd=home.parent
    )


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tiny_llama: Path) -> Path:
    """A sweep of a student that learns from the cache, and one that writes half of its batches."""
    return write_recipe(tiny_llama, objectives=DISTILLED, extra='optim = "muon"')


def test_two_processes_make_what_one_does_of_twice_the_batches(
    store: Store, limbeck_home: Path, limbeck: Callable[..., Any], recipe: Path
) -> None:
    two = torchrun(limbeck_home, "distill", recipe, "--set", "training.max_steps=6")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("students") == 1  # one process prints
    assert two.stderr.count("teacher cache") == 1
    again = limbeck("distill", recipe, "--set", "training.max_steps=6")
    assert "already made" in again.err
    accumulated = ["training.max_steps=6", "training.gradient_accumulation_steps=2"]
    one = limbeck("distill", recipe, *(word for text in accumulated for word in ("--set", text)))
    assert one.code == 0, one.err
    assert "0 of them captured now" in one.err

    versions = [version for version in store.versions() if version.kind == "student"]
    assert len(versions) == 2  # each registered once
    curves = [[m.value for m in store.client.get_metric_history(v.run_id, "loss")] for v in versions]
    assert len(curves[0]) == 3
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)
    made, expected = (load_file(store.folder(version) / "model.safetensors") for version in versions)
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor, atol=2e-5, rtol=1e-3)
