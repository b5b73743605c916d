"""What running a model costs on this machine: speed, memory, size, dollars."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from export.runtime import CONTEXT_KEYS, physical_cores
from registry.digest import file_digests
from registry.errors import BadInput, LimbeckError
from registry.machine import proc
from registry.records import Cost
from registry.resolve import Model

REQUESTS = 10
SECONDS = 3.0  # of timing; a slow model gets fewer requests, at least three


def measure(
    model: Model,
    *,
    usd_per_hour: float,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    requests: int = REQUESTS,
    seconds: float = SECONDS,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Cost:
    """Run the model alone in a process of its own and time requests of batch 1, greedy, with a cache.

    After a warm-up, `requests` requests are timed, each after one that stops at its first token. p50 and p95
    are over whole requests. Prefill is prompt tokens over the median time to the first token; decode is the
    other new tokens over what the median request takes beyond it. No token ends a request early.

    Args:
        model: a torch checkpoint (transformers, float32) or an ONNX artifact (`export.runtime`).
        usd_per_hour: the price of this machine.
        prompt_tokens, new_tokens: shortened to half the context each where it has not room for both.
        requests: at most; once `seconds` have passed no more than three.
        threads: one for each physical core where None.

    Raises:
        BadInput: a price that is not above zero. LimbeckError: the process died; with its last words.
    """
    check_price(usd_per_hour)
    prompt_tokens, new_tokens = _fitting(model, prompt_tokens, new_tokens)
    threads = threads or physical_cores()
    seen = _run(
        {
            "folder": str(model.path),
            "engine": model.engine,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "requests": requests,
            "seconds": seconds,
            "threads": threads,
            "trust_remote_code": trust_remote_code,
        },
        model.label,
    )
    p50, p95 = map(float, np.quantile(seen["request_s"], [0.5, 0.95]))
    prefill = float(np.median(seen["prefill_s"]))
    return Cost(
        params=seen["params"] or (model.version and model.version.params) or _graph_params(model.path),
        disk_bytes=sum((model.path / name).stat().st_size for name in file_digests(model.path)),
        peak_rss_bytes=seen["peak_rss_bytes"],
        prefill_tokens_per_s=prompt_tokens / prefill,
        decode_tokens_per_s=(new_tokens - 1) / max(p50 - prefill, 1e-9),
        p50_ms=1000 * p50,
        p95_ms=1000 * p95,
        usd_per_million_tokens=usd_per_hour * p50 / 3600 / (prompt_tokens + new_tokens) * 1e6,
        usd_per_hour=usd_per_hour,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests=len(seen["request_s"]),
        threads=threads,
        machine=machine(model),
    )


def check_price(usd_per_hour: float) -> None:
    """Raise BadInput for a price that is not above zero."""
    if not (math.isfinite(usd_per_hour) and usd_per_hour > 0):
        raise BadInput(f"a price of {usd_per_hour:g} dollars an hour", fix="give one above 0 with --usd-per-hour")


def priced(cost: Cost, usd_per_hour: float) -> Cost:
    """The same measurement at another price."""
    factor = usd_per_hour / cost.usd_per_hour
    dollars = cost.usd_per_million_tokens * factor
    return cost.model_copy(update={"usd_per_hour": usd_per_hour, "usd_per_million_tokens": dollars})


def comparable(a: Cost, b: Cost) -> bool:
    """Whether two costs were measured on one kind of machine, for requests of one length, at one price."""

    def setting(cost: Cost) -> tuple[object, ...]:
        hardware = cost.machine.partition(";")[0]
        return hardware, cost.threads, cost.prompt_tokens, cost.new_tokens, cost.usd_per_hour

    return setting(a) == setting(b)


def machine(model: Model) -> str:
    """This machine and the engine of `model`, in words: processor, cores, system; versions."""
    libraries = ["torch", "transformers"] if model.engine == "torch" else ["onnxruntime"]
    engine = ", ".join(f"{name} {version(name)}" for name in libraries)
    system = f"{platform.system()} {platform.machine()}"
    return f"{_processor()}, {physical_cores()} cores, {system}; {engine}"


def _processor() -> str:
    for line in proc("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _fitting(model: Model, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
    config = json.loads((model.path / "config.json").read_bytes())
    config = config.get("text_config") or config
    context = next((int(config[key]) for key in CONTEXT_KEYS if config.get(key)), None)
    if context is None or prompt_tokens + new_tokens <= context:
        return prompt_tokens, new_tokens
    if context < 4:
        raise BadInput(f"{model.label} has a context of {context} tokens: no room for a request")
    return context - context // 2, context // 2


def _run(request: dict[str, object], label: str) -> dict[str, Any]:
    """What the worker prints. Raises LimbeckError with its last line where it dies."""
    # -P: a folder `evals` where the user stands is not ours.
    command = [sys.executable, "-P", "-m", "evals.cost_worker", json.dumps(request)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(request["threads"]),
        # Threads that spin while they wait are 20 times slower where another process has one of the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        why = f"it was killed by signal {-done.returncode}" if done.returncode < 0 else lines[-1]
        raise LimbeckError(
            f"the cost of {label} could not be measured: {why}",
            fix="a model must fit in memory; --no-cost scores its quality alone",
        )
    seen: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return seen


def _graph_params(folder: Path) -> int:
    """Weights in an ONNX graph; shapes and indices (int64) are none."""
    import onnx

    weights = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return sum(math.prod(item.dims) for item in graph.initializer if item.data_type in weights)
