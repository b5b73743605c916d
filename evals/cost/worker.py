"""A process that `evals.cost.runner` starts: it loads one model and times a batch of requests whenever it is asked to.

It is alone with the model, so that its peak memory is what running the model takes. While it is not its turn it
waits for a line on its standard input; the end of the input ends it. One JSON object a line goes out for each
that comes in, and a first one when the model is loaded.
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

    `generate(batch, new_tokens)` runs that many equal prompts to their end and gives the seconds to the first
    token and in all. `params` is None where the engine does not tell; so is `peak_device_bytes`.
    """

    generate: Callable[[int, int], tuple[float, float]]
    params: int | None
    device: str
    peak_device_bytes: Callable[[], int | None]


def main(setting: dict[str, Any], requests: Any, answers: Any) -> None:
    """Load the model, then answer each request line: a short batch to warm up, and the one that is timed.

    Args:
        setting: folder, engine, prompt_tokens, threads, cpus (to run on, or None), trust_remote_code.
        requests: lines such as {"batch": 1, "new_tokens": 64}.
        answers: first {params, device}, then {prefill_s, request_s, peak_rss_bytes, peak_device_bytes} each time.
    """
    if setting["cpus"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, setting["cpus"])  # before any library starts its threads
    loaded = (_torch if setting["engine"] == "torch" else _onnx)(setting)
    _write_answer(answers, params=loaded.params, device=loaded.device)
    for line in requests:
        batch, new_tokens = (json.loads(line)[key] for key in ("batch", "new_tokens"))
        # The models before it have taken the caches; as a server it would have them.
        loaded.generate(batch, min(WARM_UP_TOKENS, new_tokens))
        prefill_s, request_s = loaded.generate(batch, new_tokens)
        peaks = {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": loaded.peak_device_bytes()}
        _write_answer(answers, prefill_s=prefill_s, request_s=request_s, **peaks)


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    try:
        # Linux's ru_maxrss starts at what the parent held; this one starts with the program.
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
    """Any tokens do: a dense model takes as long for one as for another."""
    return [(7 * place + 11) % vocab_size for place in range(setting["prompt_tokens"])]


def _torch(setting: dict[str, Any]) -> TimedModel:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(setting["threads"])
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        setting["folder"],
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=setting["trust_remote_code"],
    ).eval()
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
        # Each begins with another token: of equal prompts the runtime would read one.
        prompts = [[*prompt[row % len(prompt) :], *prompt[: row % len(prompt)]] for row in range(batch)]
        done = runtime.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
        seconds = time.perf_counter() - began
        for completion in done:
            _check_token_count(len(completion.token_ids), new_tokens)
        return done[0].prefill_s, seconds

    return TimedModel(generate, None, device, lambda: None)


if __name__ == "__main__":
    # What a library prints must not come between the answers.
    own_output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        main(json.loads(sys.argv[1]), sys.stdin, own_output)
    except Exception as error:  # whatever a model's own code raises; the parent tells the user
        sys.exit(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no words'}")
