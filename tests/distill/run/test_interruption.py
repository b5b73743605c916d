"""A run that is killed or stopped resumes, and its student is the same as that of an undisturbed run."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.distill.cache.teacher_cache import SHARD_TOKENS
from limbeck.registry.mlflow.store import Store
from tests.distill.conftest import DISTILLED, lines_of_text
from tests.distill.limbeck_processes import start_limbeck


def run_until(
    args: list[object], home: Path, condition: Callable[[], object], number: signal.Signals
) -> tuple[int, str]:
    """Run `limbeck` in a new process, and send it a signal when `condition` is true; exit code and stderr."""
    started = start_limbeck(home, *args)
    try:
        while started.is_running() and not condition():
            time.sleep(0.005)
        started.send_signal(number)
        code, _, err = started.wait(timeout=120)
        return code, err
    finally:
        started.process.kill()


def test_a_run_killed_in_the_capture_and_stopped_in_the_training_resumes(
    store: Store,
    limbeck_home: Path,
    limbeck: Callable[..., Any],
    write_recipe: Callable[..., Path],
    text_file: Path,
    tiny_llama: Path,
) -> None:
    text_file.write_text(lines_of_text(2000))
    recipe = write_recipe(tiny_llama, objectives=DISTILLED, extra='optim = "muon"\nsave_minutes = 2e-3')
    sets = ["--set", "training.max_steps=60", "--set", "data.max_length=16", "--set", "training.eval_steps=1000"]
    args = ["distill", recipe, *sets]

    def shard_records() -> list[Path]:  # with one settings file
        return list((limbeck_home / "teacher-cache").glob("*/*.json"))

    code, _ = run_until(args, limbeck_home, lambda: len(shard_records()) > 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    stored_shards = len(shard_records()) - 1
    [damaged, *_] = sorted((limbeck_home / "teacher-cache").glob("*/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-4])
    assert [version.kind for version in store.versions()] == ["teacher"]

    def checkpoints() -> list[Path]:
        return [p for p in (limbeck_home / "runs").glob("*/checkpoint-*/trainer_state.json") if _is_whole(p)]

    code, err = run_until(args, limbeck_home, checkpoints, signal.SIGINT)
    assert code == 130, err
    assert "run the same command again to continue" in err
    assert "Traceback" not in err
    tokens, captured_now = (int(word.replace(",", "")) for word in _captured_tokens(err))
    assert 0 < captured_now < tokens  # the rest was stored before the kill
    assert captured_now >= tokens - (stored_shards - 1) * SHARD_TOKENS  # the damaged shard was captured again
    assert [version.kind for version in store.versions()] == ["teacher"]
    [state_path] = checkpoints()
    step = int(state_path.parent.name.removeprefix("checkpoint-"))
    assert step < 60

    state = json.loads(state_path.read_text())
    [spent] = [entry for entry in state["log_history"] if "seconds" in entry and entry["step"] == step]
    assert 0 < spent["seconds"] < 100
    spent["seconds"] = 1000.0
    state_path.write_text(json.dumps(state))

    resumed = limbeck(*args, "--set", "name=resumed")
    assert resumed.code == 0, resumed.err
    assert "0 of them captured now" in resumed.err
    whole = limbeck(*args, "--set", "name=whole")
    assert whole.code == 0, whole.err
    one, other = store.get("resumed/2"), store.get("whole/2")
    assert one.digest == other.digest  # equal to the last bit
    resumed_cost, whole_cost = store.runs.training_cost(one), store.runs.training_cost(other)
    assert resumed_cost
    assert whole_cost
    assert whole_cost.training_seconds < 100 < 1000 < resumed_cost.training_seconds < 1100
    assert resumed_cost.teacher_seconds == whole_cost.teacher_seconds > 0
    assert not list((limbeck_home / "runs").glob("*/checkpoint-*"))

    curves = [store.client.get_metric_history(version.run_id, "loss") for version in (one, other)]
    assert [m.step for m in curves[0]] == list(range(2, 61, 2))
    # The first loss after a checkpoint is a mean over fewer steps.
    different = [a.step for a, b in zip(*curves, strict=True) if a.value != b.value]
    assert set(different) <= {step + 1}
    statuses = {run.info.status for run in store.client.search_runs([store.runs.experiment_id()])}
    assert "KILLED" in statuses


def _is_whole(path: Path) -> bool:
    """Whether a JSON file exists and is complete; it may have been replaced since it was listed."""
    try:
        return bool(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return False


def _captured_tokens(err: str) -> tuple[str, str]:
    """All tokens of the teacher cache, and those captured in this run."""
    [(tokens, captured_now)] = re.findall(r"teacher cache: .*?([\d,]+) tokens, ([\d,]+) of them captured now", err)
    return tokens, captured_now
