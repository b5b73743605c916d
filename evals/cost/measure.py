"""Measures what running models costs on this machine: speed, memory, size, dollars.

Protocol 2:

1. The models of one run, the teacher among them, each get a process of their own with the engine that runs them:
   transformers in float32, or `limbeck.export.runtime.runtime`. They run on a GPU if torch, or onnxruntime, has one
   (`CUDA_VISIBLE_DEVICES=` hides it), else on the CPU with one thread for each physical core, pinned to those cores.
   All are loaded before any is timed. If memory does not hold all of them, there are several runs, each with the
   teacher and as many candidates as fit.
2. A request is 64 prompt tokens in and 64 new tokens out, greedy, with a key-value cache, and no token ends it
   early. If the context of one model of the run is shorter, all models get half of that context for each.
3. Batches of 1 and then of 8 equal requests are timed. A round times one batch of every model in turn: A B C, A B C.
   Just before, a batch of 8 new tokens that is not timed fills the processor's caches. Meanwhile the other models wait
   for input and use no CPU time. Batch 1 gets 10 rounds, or fewer, but at least 6, once 3 seconds a model have passed;
   batch 8 gets 6.
4. The clock runs from the call to the last token (on a GPU until it has finished). A figure is the median over
   rounds. Its interval is between two order statistics of the rounds with a confidence of at least 95%; with fewer
   than 6 rounds it is lower, and the record has it. Rounds are assumed to be independent. p95 is over rounds. Prefill
   is prompt tokens over the time to the first token; decode is the other new tokens over the rest of the time.
5. A ratio is the median over rounds of one model's time over the other's time in the same round: a disturbance of
   the machine slows both. Models that were not timed in one run have no ratio.
6. Memory is the peak of the process, up to and including batches of that size. Dollars are the machine's hourly price
   at this speed, prompt and new tokens counted the same. A machine that is paid while it idles costs more, and larger
   batches cost less. FLOPs are counted, not measured: see `limbeck.evals.cost.flops`.
"""

from __future__ import annotations

import functools
import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from limbeck.evals.cost.flops import flops_per_token
from limbeck.evals.cost.runner import BatchTimings, ModelTimings, TimingPlan, time_in_turn
from limbeck.export.runtime.session import CONTEXT_KEYS
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.digest import file_digests
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import available_memory, describe_hardware
from limbeck.registry.records import USD, BatchCost, Cost, Estimate

PROTOCOL = 2
CONFIDENCE = 0.95
USD_PER_HOUR = 1.0  # of a cost before `reprice`


def measure_costs(
    models: Sequence[ResolvedModel],
    plan: TimingPlan | None = None,
    *,
    trust_remote_code: bool = False,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cost]:
    """Time models in one run; dollars are at one dollar an hour.

    Args:
        models: torch checkpoints or ONNX artifacts that fit in memory together (see `group_by_memory`).
        plan: the protocol's own if None. Its lengths are shortened if a model's context is too short.
        on_round: called after each round with the number of rounds done and of all rounds.

    Raises:
        BadInput: a context with no room for a request.
        LimbeckError: a process died; with its last error line.
    """
    plan = _fit_lengths(models, plan or TimingPlan())
    run = uuid.uuid4().hex[:12]
    timings_of_models = time_in_turn(models, plan, trust_remote_code=trust_remote_code, on_round=on_round)
    costs = []
    for model, timings in zip(models, timings_of_models, strict=True):
        flops = flops_per_token(model.path, (plan.prompt_tokens + plan.new_tokens + 1) / 2, trust_remote_code)
        costs.append(_build_cost(model, timings, plan, run, flops))
    return costs


def group_by_memory(
    models: Sequence[ResolvedModel], teacher: ResolvedModel | None = None
) -> Iterator[list[ResolvedModel]]:
    """Split models into runs that fit in memory at once, with `teacher` in each; a single run if possible.

    The estimate for a model is three times its files (half precision is loaded as float32) plus half a gigabyte.
    A model that does not fit with the teacher gets a run of the two all the same.
    """

    def required_bytes(model: ResolvedModel) -> float:
        return 3 * _disk_bytes(model) + 2**29

    room = 0.8 * min(available_memory(), _gpu_memory())
    base = [teacher] if teacher else []
    group = list(base)
    for model in models:
        if model in base:
            continue
        if len(group) > len(base) and sum(map(required_bytes, [*group, model])) > room:
            yield group
            group = list(base)
        group.append(model)
    if group:
        yield group


def reprice(cost: Cost, usd_per_hour: float, price: str | None = None) -> Cost:
    """The same measurement at another price; `price` describes where the price comes from."""
    factor = usd_per_hour / cost.usd_per_hour
    dollars = {name: scale_estimate(each, factor) for name, each in cost.intervals.items() if name == USD}
    return cost.model_copy(
        update={
            "usd_per_hour": usd_per_hour,
            "price": price,
            "usd_per_million_tokens": cost.usd_per_million_tokens * factor,
            "intervals": cost.intervals | dollars,
            "loads": tuple(
                load.model_copy(update={"usd_per_million_tokens": load.usd_per_million_tokens * factor})
                for load in cost.loads
            ),
        }
    )


def is_comparable(a: Cost, b: Cost) -> bool:
    """Whether two costs belong in one table: same protocol, kind of machine and price.

    A ratio also needs one run: see `is_same_run`.
    """
    return a.setting == b.setting


def is_same_run(a: Cost, b: Cost) -> bool:
    """Whether two costs were measured in turn in one run, so that their ratio is meaningful."""
    return is_comparable(a, b) and a.run is not None and a.run == b.run


def paired_cost_ratio(a: Cost, b: Cost, batch: int = 1) -> Estimate:
    """Dollars per token of `a` over those of `b`, two costs of one run, with its interval."""
    request_ms_a, request_ms_b = (cost_at_batch(cost, batch).request_ms for cost in (a, b))
    return scale_estimate(median_estimate(np.divide(request_ms_a, request_ms_b)), a.usd_per_hour / b.usd_per_hour)


def cost_at_batch(cost: Cost, batch: int) -> BatchCost:
    """The figures of one batch size. Raises BadInput if it was not measured."""
    for load in cost.loads:
        if load.batch == batch:
            return load
    known = ", ".join(str(load.batch) for load in cost.loads) or "none"
    raise BadInput(f"batches of {batch} were not measured", fix=f"measured batch sizes: {known}")


def median_estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The median of n values, and the narrowest interval between order statistics with at least 95% confidence.

    The k-th smallest and the k-th largest value enclose the true median with probability 1 - 2 P(B < k), where B is
    binomial(n, 1/2), for any distribution. With n below 6 the interval is from the smallest to the largest value, and
    its confidence is lower.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    k, coverage = _median_interval_rank(n)
    return Estimate(
        value=float(np.median(ordered)),
        low=float(ordered[k - 1]),
        high=float(ordered[n - k]),
        confidence=min(CONFIDENCE, coverage),
    )


@functools.cache
def _median_interval_rank(n: int) -> tuple[int, float]:
    """The rank k of `median_estimate`, and the confidence of its interval."""
    from scipy.stats import binom

    k = max(1, int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)))
    return k, float(1 - 2 * binom.cdf(k - 1, n, 0.5))


def scale_estimate(estimate: Estimate, factor: float) -> Estimate:
    """An estimate times a factor above zero."""
    return estimate.model_copy(update={name: getattr(estimate, name) * factor for name in ("value", "low", "high")})


def describe_machine(model: ResolvedModel) -> str:
    """Describe this machine and the engine of `model`: processor, cores, GPU, system; library versions."""
    libraries = ["torch", "transformers"] if model.engine == "torch" else ["onnxruntime"]
    engine = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{describe_hardware(gpu_name())}; {engine}"


@functools.cache
def gpu_name() -> str | None:
    """The name of the GPU that torch uses, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _build_cost(model: ResolvedModel, timings: ModelTimings, plan: TimingPlan, run: str, flops: float | None) -> Cost:
    loads = tuple(_build_batch_cost(batch, timed, plan) for batch, timed in timings.loads.items())
    one = loads[0]
    interval = median_estimate(one.request_ms)
    return Cost(
        params=timings.params or (model.version and model.version.params) or _graph_params(model.path),
        disk_bytes=_disk_bytes(model),
        requests=len(one.request_ms),
        usd_per_hour=USD_PER_HOUR,
        intervals={USD: scale_estimate(interval, one.usd_per_million_tokens / interval.value), "p50_ms": interval},
        prompt_tokens=plan.prompt_tokens,
        new_tokens=plan.new_tokens,
        threads=plan.threads,
        machine=describe_machine(model),
        protocol=PROTOCOL,
        run=run,
        device=timings.device,
        flops_per_token=flops,
        loads=loads,
        **one.model_dump(exclude={"batch", "request_ms"}),
    )


def _build_batch_cost(batch: int, timings: BatchTimings, plan: TimingPlan) -> BatchCost:
    p50, p95 = map(float, np.quantile(timings.request_s, [0.5, 0.95]))
    prefill = float(np.median(timings.prefill_s))
    tokens = batch * (plan.prompt_tokens + plan.new_tokens)
    return BatchCost(
        batch=batch,
        request_ms=tuple(1000 * seconds for seconds in timings.request_s),
        prefill_tokens_per_s=batch * plan.prompt_tokens / prefill,
        decode_tokens_per_s=batch * (plan.new_tokens - 1) / max(p50 - prefill, 1e-9),
        p50_ms=1000 * p50,
        p95_ms=1000 * p95,
        usd_per_million_tokens=USD_PER_HOUR * p50 / 3600 / tokens * 1e6,
        **timings.peaks,
    )


def _fit_lengths(models: Sequence[ResolvedModel], plan: TimingPlan) -> TimingPlan:
    """The plan, with lengths that fit in the context of every model."""
    for model in models:
        config = json.loads((model.path / "config.json").read_bytes())
        config = config.get("text_config") or config
        context = next((int(config[key]) for key in CONTEXT_KEYS if config.get(key)), None)
        if context is None or plan.prompt_tokens + plan.new_tokens <= context:
            continue
        if context < 4:
            raise BadInput(f"{model.label} has a context of {context} tokens: a request needs at least 4")
        plan = replace(plan, prompt_tokens=context - context // 2, new_tokens=context // 2)
    return plan


def _disk_bytes(model: ResolvedModel) -> int:
    return sum((model.path / name).stat().st_size for name in file_digests(model.path))


def _gpu_memory() -> float:
    """Free bytes of the GPU; infinite if there is none."""
    import torch

    return torch.cuda.mem_get_info()[0] if gpu_name() else math.inf


def _graph_params(folder: Path) -> int:
    """The number of weights in an ONNX graph; int64 initializers are shapes and indices, not weights."""
    import onnx

    weight_types = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return sum(math.prod(item.dims) for item in graph.initializer if item.data_type in weight_types)
