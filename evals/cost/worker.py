"""The process that `limbeck.evals.cost.runner` starts for one model: it loads the model and times batches on request.

Only the model is in this process, so its peak memory is what running the model takes. The process waits for a line on
its standard input, and ends when that is closed. It prints one JSON object when the model is loaded, and one for each
line that it reads.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

WARM_UP_TOKENS = 8


class TimedModel(NamedTuple):
    """A model ready to be timed.

    Attributes:
        generate: (batch, new_tokens) -> seconds to the first token, and seconds in all, for `batch` requests.
        params: None if the engine does not know them.
        device: "cpu" or "cuda".
        peak_device_bytes: the peak of GPU memory so far; None if the engine does not know it.
    """

    generate: Callable[[int, int], tuple[float, float]]
    params: int | None
    device: str
    peak_device_bytes: Callable[[], int | None]


def main(setting: dict[str, Any], requests: Any, answers: Any) -> None:
    """Load the model, then answer each request line with the times of one batch, after a short batch to warm up.

    Args:
        setting: folder, engine, prompt_tokens, threads, cpus (to run on, or None for all), trust_remote_code.
        requests: lines such as {"batch": 1, "new_tokens": 64}.
        answers: a file for lines of JSON: first {params, device}, then {prefill_s, request_s, peak_rss_bytes,
            peak_device_bytes} for each request. Keys other than the seconds are fields of `BatchCost`.
    """
    if setting["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, setting["cpus"])  # before any library starts its threads
    loaded = (_torch if setting["engine"] == "torch" else _onnx)(setting)
    _write_answer(answers, params=loaded.params, device=loaded.device)
    for line in requests:
        batch, new_tokens = (json.loads(line)[key] for key in ("batch", "new_tokens"))
        # The models timed before have evicted this one from the processor's caches; a server would have it there.
        loaded.generate(batch, min(WARM_UP_TOKENS, new_tokens))
        prefill_s, request_s = loaded.generate(batch, new_tokens)
        peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": loaded.peak_device_bytes()}
        _write_answer(answers, prefill_s=prefill_s, request_s=request_s, **peaks)


def peak_rss_bytes() -> int:
    """The peak memory of this process."""
    try:
        # Linux's ru_maxrss includes the parent's memory at the start of the process; VmHWM does not.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _write_answer(answers: Any, **fields: Any) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def _check_token_count(generated: int, requested: int) -> None:
    if generated != requested:
        raise RuntimeError(f"the model stopped after {generated} of {requested} tokens")


def _prompt(setting: dict[str, Any], vocab_size: int) -> list[int]:
    """Arbitrary token ids: a dense model takes equally long for all of them."""
    return [(7 * index + 11) % vocab_size for index in range(setting["prompt_tokens"])]


def _torch(setting: dict[str, Any]) -> TimedModel:
    import torch
    from transformers import GenerationConfig

    from limbeck.registry.checkpoints.load import load_model

    torch.set_num_threads(setting["threads"])
    cuda = torch.cuda.is_available()
    model: Any = load_model(Path(setting["folder"]), setting["trust_remote_code"])
    model.to("cuda" if cuda else "cpu")
    # Greedy, with a cache, and no token that ends a text early.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    prompt = _prompt(setting, model.get_input_embeddings().num_embeddings)

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def generate(batch: int, new_tokens: int) -> tuple[float, float]:
        ids = torch.tensor([prompt] * batch, device=model.device)
        first: list[float] = []

        def after_a_token(_: Any, __: Any, **___: Any) -> torch.Tensor:
            if not first:
                first.append(now())
            return torch.zeros(batch, dtype=torch.bool, device=model.device)

        began = now()
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, stopping_criteria=[after_a_token]
        )
        ended = now()
        _check_token_count(text.shape[1] - ids.shape[1], new_tokens)
        return first[0] - began, ended - began

    peak = torch.cuda.max_memory_allocated if cuda else lambda: None
    return TimedModel(generate, model.num_parameters(), "cuda" if cuda else "cpu", peak)


def _onnx(setting: dict[str, Any]) -> TimedModel:
    import onnxruntime

    from limbeck.export.runtime.runtime import Runtime

    device: Literal["cpu", "cuda"] = (
        "cuda" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    )
    runtime = Runtime.load(setting["folder"], threads=setting["threads"], verify=False, device=device)
    prompt = _prompt(setting, runtime.vocab_size)

    def generate(batch: int, new_tokens: int) -> tuple[float, float]:
        began = time.perf_counter()
        # Each prompt begins with a different token: the runtime would read equal prompts only once.
        prompts = [[*prompt[row % len(prompt) :], *prompt[: row % len(prompt)]] for row in range(batch)]
        completions = runtime.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        seconds = time.perf_counter() - began
        for completion in completions:
            _check_token_count(len(completion.token_ids), new_tokens)
        return completions[0].prefill_s, seconds

    return TimedModel(generate, None, device, lambda: None)


if __name__ == "__main__":
    # Libraries that print must not write between the answers.
    own_output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        main(json.loads(sys.argv[1]), sys.stdin, own_output)
    except Exception as error:  # a model's own code may raise any type; the parent process reports the line
        lines = str(error).strip().splitlines() or ["no message"]
        sys.exit(f"{type(error).__name__}: {lines[0]}")
