"""The process that `evals.cost.measure` starts: it loads one model, times requests and prints what it saw as JSON.

It is alone with the model, so that its peak memory is what running the model takes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FEWEST = 3


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Time `requests` requests of batch 1, each after one that stops at its first token.

    A slow model is asked less often: no more than `FEWEST` times once `seconds` have passed.

    Args:
        request: folder, engine, prompt_tokens, new_tokens, requests, seconds, threads, trust_remote_code.

    Returns:
        request_s and prefill_s (lists of seconds), peak_rss_bytes, and params where the engine tells.
    """
    load = _torch if request["engine"] == "torch" else _onnx
    generate, params = load(request)
    generate(min(8, request["new_tokens"]))  # warm-up
    request_s, prefill_s = [], []
    began = time.perf_counter()
    for done in range(request["requests"]):
        if done >= FEWEST and time.perf_counter() - began > request["seconds"]:
            break
        prefill_s.append(_seconds(generate, 1))
        request_s.append(_seconds(generate, request["new_tokens"]))
    return {"request_s": request_s, "prefill_s": prefill_s, "params": params, "peak_rss_bytes": peak_rss_bytes()}


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


def _seconds(generate: Callable[[int], None], new_tokens: int) -> float:
    start = time.perf_counter()
    generate(new_tokens)
    return time.perf_counter() - start


def _check(made: int, asked: int) -> None:
    if made != asked:
        raise RuntimeError(f"the model stopped after {made} of {asked} tokens")


def _prompt(request: dict[str, Any], vocab_size: int) -> list[int]:
    """Any tokens do: a dense model takes as long for one as for another."""
    return [(7 * place + 11) % vocab_size for place in range(request["prompt_tokens"])]


def _torch(request: dict[str, Any]) -> tuple[Callable[[int], None], int]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(request["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"],
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=request["trust_remote_code"],
    ).eval()
    # Greedy, with a cache, and no token that ends a text early.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    ids = torch.tensor([_prompt(request, model.get_input_embeddings().num_embeddings)])

    @torch.inference_mode()
    def generate(new_tokens: int) -> None:
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
        _check(text.shape[1] - ids.shape[1], new_tokens)

    return generate, model.num_parameters()


def _onnx(request: dict[str, Any]) -> tuple[Callable[[int], None], None]:
    from export.runtime import Runtime

    runtime = Runtime.load(request["folder"], threads=request["threads"], verify=False)
    prompt = _prompt(request, runtime.vocab_size)

    def generate(new_tokens: int) -> None:
        (completion,) = runtime.generate([prompt], max_new_tokens=new_tokens, ignore_eos=True)
        _check(len(completion.token_ids), new_tokens)

    return generate, None


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except Exception as error:  # whatever a model's own code raises; the parent tells the user
        sys.exit(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no words'}")
