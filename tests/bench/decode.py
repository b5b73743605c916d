"""Decode speed of one Llama: the torch-free runtime beside torch and optimum on the same weights.

All four run in turns within one process, on the same threads, so that the ratios hold where the figures do not.
The limit is reading the weights once per token: the memory bandwidth, as numpy reads here, over the bytes of the
graph's weights.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from registry.terminal import print_table, quiet_libraries, say

VOCABULARY = 8192
PROMPT, NEW, ROUNDS = 64, 64, 5
# 37 million parameters: more than a cache holds, few enough for a minute on two cores.
CONFIG = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8,
              num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True)  # fmt: skip


def main(threads: int | None = None) -> None:
    """Measure and print a table."""
    quiet_libraries()
    import onnxruntime as ort
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoModelForCausalLM

    from export.onnx import export
    from export.runtime import Runtime, physical_cores

    threads = threads or physical_cores()
    torch.set_num_threads(threads)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        params = make_llama(folder / "torch")
        say(f"a random Llama of {params / 1e6:.0f}M parameters, {threads} threads")
        export(folder / "torch", folder / "fp32")
        export(folder / "torch", folder / "int8", "int8", fp32=folder / "fp32")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        eager = AutoModelForCausalLM.from_pretrained(folder / "torch").eval()
        optimum = ORTModelForCausalLM.from_pretrained(folder / "fp32", session_options=options)
        runtimes = {name: Runtime.load(folder / name, threads=threads) for name in ("fp32", "int8")}
        prompt = np.random.default_rng(0).integers(1, VOCABULARY, PROMPT).tolist()
        runs: dict[str, Callable[[int], Any]] = {
            "torch eager generate": lambda new: transformers_generate(eager, prompt, new),
            "optimum generate, fp32": lambda new: transformers_generate(optimum, prompt, new),
            "Limbeck runtime, fp32": lambda new: runtimes["fp32"].generate(
                [prompt], max_new_tokens=new, ignore_eos=True
            ),
            "Limbeck runtime, int8": lambda new: runtimes["int8"].generate(
                [prompt], max_new_tokens=new, ignore_eos=True
            ),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(ROUNDS + 1):
            for name, run in runs.items():
                if round_:
                    rates[name].append(decode_rate(run))
                else:
                    run(4)  # warm
        weights = {name: (folder / name / "model.onnx").stat().st_size for name in runtimes}
    bandwidth = read_bandwidth(threads)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base, peer = medians["torch eager generate"], medians["optimum generate, fp32"]
    rows = []
    for name, rate in medians.items():
        size = weights["int8" if name.endswith("int8") else "fp32"]
        share = rate * size / bandwidth
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        rows.append([name, f"{rate:.0f}", spread, f"{rate / base:.2f}", f"{rate / peer:.2f}", f"{share:.0%}"])
    title = (
        f"decode, batch 1, prompt {PROMPT}, {NEW} new tokens, {threads} threads, load {os.getloadavg()[0]:.1f}; "
        f"memory read at {bandwidth / 1e9:.1f} GB/s"
    )
    columns = ["", "tokens/s", "of 5 rounds", "x torch", "x optimum", "of the memory limit"]
    print_table(title, columns, rows)


def make_llama(folder: Path) -> int:
    """A random Llama with a byte-level tokenizer in `folder`; gives the number of its parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=VOCABULARY, **ids, **CONFIG))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return model.num_parameters()


def transformers_generate(model: Any, prompt: list[int], new: int) -> None:
    """`new` greedy tokens by a model with transformers' `generate`."""
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )


def decode_rate(run: Callable[[int], Any]) -> float:
    """Tokens a second after the first: a long run less a run of one token."""
    start = time.perf_counter()
    run(1)
    middle = time.perf_counter()
    run(NEW)
    end = time.perf_counter()
    return (NEW - 1) / ((end - middle) - (middle - start))


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory: the best of ten searches of 128 MB each."""
    from concurrent.futures import ThreadPoolExecutor

    arrays = [np.ones(2**25, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))  # numpy lets go of the lock while it searches
            best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
