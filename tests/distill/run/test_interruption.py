"""A run that is killed or stopped goes on where it was, and comes out the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.distill.cache.teacher_cache import SHARD_TOKENS
from limbeck.registry.mlflow.store import Store
from tests import ROOT
from tests.distill.conftest import DISTILLED, lines_of_text


def start(args: list[object], home: Path, stop_at: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    """Run `limbeck` in a process of its own, send it a signal as soon as `stop_at`; exit code and stderr."""
    words = [sys.executable, "-m", "limbeck", *map(str, args)]
    environment = {**os.environ, "LIMBECK_HOME": str(home), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not stop_at():
            time.sleep(0.005)
        process.send_signal(how)
        _, err = process.communicate(timeout=120)
        return process.returncode, err
    finally:
        process.kill()


def test_killed_in_the_capture_then_stopped_in_the_training(
    store: Store,
    limbeck_home: Path,
    limbeck: Callable[..., Any],
    write_recipe: Callable[..., Path],
    text_file: Path,
    tiny_llama: Path,
) -> None:
    text_file.write_text(lines_of_text(3000))
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra='optim = "muon"\nsave_minutes = 2e-3')
    sets = ["--set", "training.max_steps=60", "--set", "data.max_length=16"]
    args = ["distill", recipe, *sets]

    shards = lambda: list((limbeck_home / "teacher-cache").glob("*/*.json"))  # noqa: E731
    code, _ = start(args, limbeck_home, lambda: len(shards()) > 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    kept = len(shards()) - 1  # one is the settings
    [harmed, *_] = sorted((limbeck_home / "teacher-cache").glob("*/*.safetensors"))
    harmed.write_bytes(harmed.read_bytes()[:-4])
    assert [version.kind for version in store.versions()] == ["teacher"]

    checkpoints = lambda: [p for p in (limbeck_home / "runs").glob("*/checkpoint-*/trainer_state.json") if _whole(p)]  # noqa: E731
    code, err = start(args, limbeck_home, checkpoints, signal.SIGINT)  # type: ignore[arg-type]
    assert code == 130, err
    assert "run the same command again to go on" in err
    assert "Traceback" not in err
    tokens, now = (int(word.replace(",", "")) for word in _counts(err))
    assert 0 < now < tokens  # the rest was there
    assert now >= tokens - (kept - 1) * SHARD_TOKENS  # and the damaged shard was captured again
    assert [version.kind for version in store.versions()] == ["teacher"]
    [reached] = checkpoints()
    step = int(reached.parent.name.removeprefix("checkpoint-"))
    assert step < 60

    state = json.loads(reached.read_text())
    [spent] = [entry for entry in state["log_history"] if "seconds" in entry and entry["step"] == step]
    assert 0 < spent["seconds"] < 100
    spent["seconds"] = 1000.0
    reached.write_text(json.dumps(state))

    resumed = limbeck(*args, "--set", "name=resumed")
    assert resumed.code == 0, resumed.err
    assert "0 of them captured now" in resumed.err
    whole = limbeck(*args, "--set", "name=whole")
    assert whole.code == 0, whole.err
    one, other = store.get("resumed/2"), store.get("whole/2")
    assert one.digest == other.digest  # bit by bit
    parts, at_once = store.runs.training_cost(one), store.runs.training_cost(other)
    assert parts
    assert at_once
    assert at_once.training_seconds < 100 < 1000 < parts.training_seconds < 1100
    assert parts.teacher_seconds == at_once.teacher_seconds > 0
    assert not list((limbeck_home / "runs").glob("*/checkpoint-*"))

    curves = [store.client.get_metric_history(version.run_id, "loss") for version in (one, other)]
    assert [m.step for m in curves[0]] == list(range(2, 61, 2))
    # The first loss after a checkpoint is a mean over fewer steps.
    apart = [a.step for a, b in zip(*curves, strict=True) if a.value != b.value]
    assert set(apart) <= {step + 1}
    statuses = {run.info.status for run in store.client.search_runs([store.runs.experiment_id()])}
    assert "KILLED" in statuses


def _whole(path: Path) -> bool:
    """Whether a JSON file is there, written to its end; another may have taken its place since it was listed."""
    try:
        return bool(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return False


def _counts(err: str) -> tuple[str, str]:
    [(tokens, now)] = re.findall(r"teacher cache: .*?([\d,]+) tokens, ([\d,]+) of them captured now", err)
    return tokens, now
