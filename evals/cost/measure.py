"""What running models costs on this machine: speed, memory, size, dollars.

The protocol, number 2:

1. The models of one run, the teacher among them, each get a process of their own, with the engine that runs them:
   transformers in float32, or `limbeck.export.runtime.runtime`. On a GPU where torch, or onnxruntime, has one
   (`CUDA_VISIBLE_DEVICES=` hides it), else on the CPU: one thread for each physical core, pinned to those cores.
   All are loaded before any is timed. Where memory does not hold all of them, the run is repeated with the teacher
   and as many candidates as fit.
2. A request is 64 prompt tokens in and 64 new tokens out, greedy, with a key-value cache, and no token ends it
   early. Where a model of the run has not room for both, all of them get half of its context for each.
3. Batches of 1 and then of 8 equal requests are timed. A round times one batch of every model, one after the
   other: A B C, A B C; each right after a batch of 8 new tokens that is not timed and fills the caches. The others
   wait for their input meanwhile and use no processor. There are 10 rounds of batch 1, or 6 once 3 seconds a
   model have passed, and 6 of batch 8.
4. The clock runs from the call to the last token (on a GPU until it has finished). A figure is the median over
   rounds; its interval is between two order statistics of the rounds, with a confidence of at least 95% (fewer
   than 6 rounds: less, and the record says so). It takes rounds for independent of each other. p95 is over rounds.
   Prefill is prompt tokens over the time to the first token, decode the other new tokens over the rest.
5. Ratios are the median over rounds of one model's time over the other's of the same round: what slows the machine
   down for a while slows both. Models that were not timed in one run have no ratio.
6. Memory is the most that the process held, up to and including batches of that size. Dollars are those of the
   machine's hour at this speed, prompt and new tokens counted alike: a machine that is paid while it idles, or
   that serves larger batches, costs otherwise. FLOPs are counted, not measured: see `limbeck.evals.cost.flops`.
"""

from __future__ import annotations

import functools
import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from limbeck.evals.cost.flops import flops_per_token
from limbeck.evals.cost.runner import BatchTimings, ModelTimings, time_in_turn
from limbeck.export.runtime.session import CONTEXT_KEYS
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.digest import file_digests
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.machine import available_memory, describe_hardware, physical_cores
from limbeck.registry.records import USD, BatchCost, Cost, Estimate

PROTOCOL = 2
BATCHES = (1, 8)
ROUNDS = 10
SECONDS = 3.0
CONFIDENCE = 0.95
USD_PER_HOUR = 1.0  # of a cost that is not `priced` yet


def measure_costs(
    models: Sequence[ResolvedModel],
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cost]:
    """Time models in one run, at one dollar an hour.

    Args:
        models: torch checkpoints or ONNX artifacts; all have to fit in memory together (see `groups`).
        batches: 1 and then larger ones.
        rounds, seconds: see the protocol.
        threads: one for each physical core where None.

    Raises:
        BadInput: a context with no room for a request. LimbeckError: a process died; with its last words.
    """
    prompt_tokens, new_tokens = _fit_lengths(models, prompt_tokens, new_tokens)
    threads = threads or physical_cores()
    seen = time_in_turn(
        models,
        batches=batches,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        seconds=seconds,
        threads=threads,
        trust_remote_code=trust_remote_code,
        on_round=on_round,
    )
    run = uuid.uuid4().hex[:12]
    costs = []
    for model, found in zip(models, seen, strict=True):
        flops = flops_per_token(model.path, (prompt_tokens + new_tokens + 1) / 2, trust_remote_code)
        costs.append(_cost(model, found, prompt_tokens, new_tokens, threads, run, flops))
    return costs


def group_by_memory(
    models: Sequence[ResolvedModel], teacher: ResolvedModel | None = None
) -> Iterator[list[ResolvedModel]]:
    """Models in runs that fit in memory at once, `teacher` in each; more than one only where they must.

    Reckoned with for each: three times its files (half precision is loaded as float32) and half a gigabyte.
    """

    def needs(model: ResolvedModel) -> float:
        return 3 * _disk_bytes(model) + 2**29

    room = 0.8 * min(available_memory(), _gpu_memory())
    base = [teacher] if teacher else []
    group = list(base)
    for model in models:
        if model in base:
            continue
        if len(group) > len(base) and sum(map(needs, [*group, model])) > room:
            yield group
            group = list(base)
        group.append(model)
    if group:
        yield group


def reprice(cost: Cost, usd_per_hour: float, price: str | None = None) -> Cost:
    """The same measurement at another price; `price` says in words where it comes from."""
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
    """Whether two costs may stand in one table: measured by one protocol on one kind of machine, at one price.

    For a ratio they have to be of one run as well: see `in_one_run`.
    """
    return a.setting == b.setting


def is_same_run(a: Cost, b: Cost) -> bool:
    """Whether two comparable costs were measured in turn, so that their ratio means something."""
    return is_comparable(a, b) and a.run is not None and a.run == b.run


def paired_cost_ratio(a: Cost, b: Cost, batch: int = 1) -> Estimate:
    """Dollars a token of `a` over those of `b`, two costs of one run, with its interval."""
    ours, theirs = (cost_at_batch(cost, batch).request_ms for cost in (a, b))
    return scale_estimate(median_estimate(np.divide(ours, theirs)), a.usd_per_hour / b.usd_per_hour)


def cost_at_batch(cost: Cost, batch: int) -> BatchCost:
    """The figures of one batch size. Raises BadInput where it was not measured."""
    for load in cost.loads:
        if load.batch == batch:
            return load
    known = ", ".join(str(load.batch) for load in cost.loads) or "none"
    raise BadInput(f"batches of {batch} were not measured", fix=f"measured are batches of: {known}")


def median_estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The median of n values, and the narrowest interval between order statistics of at least 95% confidence.

    The k-th smallest and the k-th greatest enclose the true median with probability 1 - 2 P(B < k), B binomial
    (n, 1/2), whatever the distribution. Where n is under 6 the extremes are taken, with their own confidence.
    """
    from scipy.stats import binom

    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    k = max(1, int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)))
    sure = float(1 - 2 * binom.cdf(k - 1, n, 0.5))
    return Estimate(
        value=float(np.median(ordered)),
        low=float(ordered[k - 1]),
        high=float(ordered[n - k]),
        confidence=CONFIDENCE if sure >= CONFIDENCE else sure,
    )


def scale_estimate(estimate: Estimate, factor: float) -> Estimate:
    """An estimate times a number above zero."""
    return estimate.model_copy(update={name: getattr(estimate, name) * factor for name in ("value", "low", "high")})


def describe_machine(model: ResolvedModel) -> str:
    """This machine and the engine of `model`, in words: processor, cores, GPU, system; versions."""
    libraries = ["torch", "transformers"] if model.engine == "torch" else ["onnxruntime"]
    engine = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{describe_hardware(gpu_name())}; {engine}"


@functools.cache
def gpu_name() -> str | None:
    """The name of the GPU that torch uses, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _cost(
    model: ResolvedModel,
    timings: ModelTimings,
    prompt_tokens: int,
    new_tokens: int,
    threads: int,
    run: str,
    flops: float | None,
) -> Cost:
    loads = tuple(_build_batch_cost(batch, timed, prompt_tokens, new_tokens) for batch, timed in timings.loads.items())
    one = loads[0]
    interval = median_estimate(one.request_ms)
    return Cost(
        params=timings.params or (model.version and model.version.params) or _graph_params(model.path),
        disk_bytes=_disk_bytes(model),
        requests=len(one.request_ms),
        usd_per_hour=USD_PER_HOUR,
        intervals={USD: scale_estimate(interval, one.usd_per_million_tokens / interval.value), "p50_ms": interval},
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        machine=describe_machine(model),
        protocol=PROTOCOL,
        run=run,
        device=timings.device,
        flops_per_token=flops,
        loads=loads,
        **one.model_dump(exclude={"batch", "request_ms"}),
    )


def _build_batch_cost(batch: int, timings: BatchTimings, prompt_tokens: int, new_tokens: int) -> BatchCost:
    p50, p95 = map(float, np.quantile(timings.request_s, [0.5, 0.95]))
    prefill = float(np.median(timings.prefill_s))
    return BatchCost(
        batch=batch,
        request_ms=tuple(1000 * seconds for seconds in timings.request_s),
        prefill_tokens_per_s=batch * prompt_tokens / prefill,
        decode_tokens_per_s=batch * (new_tokens - 1) / max(p50 - prefill, 1e-9),
        p50_ms=1000 * p50,
        p95_ms=1000 * p95,
        usd_per_million_tokens=USD_PER_HOUR * p50 / 3600 / (batch * (prompt_tokens + new_tokens)) * 1e6,
        peak_rss_bytes=timings.peak_rss_bytes,
        peak_device_bytes=timings.peak_device_bytes,
    )


def _fit_lengths(models: Sequence[ResolvedModel], prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
    """Lengths that every model has room for."""
    for model in models:
        config = json.loads((model.path / "config.json").read_bytes())
        config = config.get("text_config") or config
        context = next((int(config[key]) for key in CONTEXT_KEYS if config.get(key)), None)
        if context is None or prompt_tokens + new_tokens <= context:
            continue
        if context < 4:
            raise BadInput(f"{model.label} has a context of {context} tokens: no room for a request")
        prompt_tokens, new_tokens = context - context // 2, context // 2
    return prompt_tokens, new_tokens


def _disk_bytes(model: ResolvedModel) -> int:
    return sum((model.path / name).stat().st_size for name in file_digests(model.path))


def _gpu_memory() -> float:
    """Free bytes of the GPU; endless where there is none."""
    import torch

    return torch.cuda.mem_get_info()[0] if gpu_name() else math.inf


def _graph_params(folder: Path) -> int:
    """Weights in an ONNX graph; shapes and indices (int64) are none."""
    import onnx

    weights = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return sum(math.prod(item.dims) for item in graph.initializer if item.data_type in weights)
