"""Speed beside llama.cpp: the same weights of a Llama, one text, 1 and 2 threads.

    python -m tests.bench.llama_cpp_speed [MODEL]

MODEL is a checkpoint of a Llama with a context of 1,152 tokens or more (for one without, the long columns are left
out). Precisions are paired by size: float32, 8 bits, 4 bits. The contestants take turns, ROUNDS times; each figure is
the best of its rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries
from tests import ROOT
from tests.bench._llama_cpp import quantize_by_llama_cpp
from tests.bench.quality import read_texts

ROUNDS, NEW_TOKENS, THREADS = 5, 64, (1, 2)
PROMPTS, PASTS = (64, 512), (64, 1024)  # tokens of a prompt to read, and before the tokens to decode
PAIRS = {"fp32": ("F32",), "int8-weight": ("Q8_0",), "int4": ("Q4_0", "Q4_K_M")}

Contestant = Callable[[int, int], tuple[float, float]]  # prompt and new tokens -> seconds for each


def main(model: Path = ROOT / "quickstart/teacher") -> None:
    """Export and quantize the model, and print a table for each number of threads."""
    from limbeck.export.artifact.export import export_onnx
    from limbeck.export.quantize.settings import QuantizationSettings

    quiet_libraries()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx(model, folder / "fp32")
        settings = QuantizationSettings(read_texts(None), report=print_status)
        for precision in ("int8-weight", "int4"):
            export_onnx(model, folder / precision, precision, fp32_artifact=folder / "fp32", settings=settings)
        files = quantize_by_llama_cpp(model, folder, [name for names in PAIRS.values() for name in names])
        for threads in THREADS:
            contestants = {name: _llama_cpp(path, threads) for name, path in files.items()}
            contestants |= {name: _limbeck(folder / name, threads) for name in PAIRS}
            _print_speeds(_measure(contestants, _context(model)), threads)


def _context(model: Path) -> int:
    from limbeck.registry.checkpoints.load import load_config

    return int(load_config(model).max_position_embeddings)


def _limbeck(artifact: Path, threads: int) -> Contestant:
    from limbeck.export.runtime.batch import Batch
    from limbeck.export.runtime.runtime import Runtime

    runtime = Runtime.load(artifact, verify=False, threads=threads)

    def run(prompt: int, new: int) -> tuple[float, float]:
        batch = Batch(runtime)
        slot = batch.add_prompt(_tokens(prompt, runtime.vocab_size))
        start = time.perf_counter()
        while batch.prefill([slot], runtime.max_prefill_tokens)[0] is None:
            pass
        read = time.perf_counter()
        for token in _tokens(new, runtime.vocab_size):
            batch.step([slot], [token])[0].argmax()
        end = time.perf_counter()
        batch.remove_slot(slot)
        return read - start, end - read

    return run


def _llama_cpp(path: Path, threads: int) -> Contestant:
    import llama_cpp

    longest = max(*PROMPTS, *PASTS)
    options: dict[str, Any] = {"n_ctx": longest + NEW_TOKENS, "n_batch": 512, "verbose": False}
    llama = llama_cpp.Llama(str(path), n_threads=threads, n_threads_batch=threads, **options)

    def likeliest() -> int:
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())

    def run(prompt: int, new: int) -> tuple[float, float]:
        llama.reset()
        start = time.perf_counter()
        llama.eval(_tokens(prompt, llama.n_vocab()))
        read = time.perf_counter()
        for token in _tokens(new, llama.n_vocab()):
            llama.eval([token])
            likeliest()
        return read - start, time.perf_counter() - read

    return run


def _tokens(count: int, vocab_size: int) -> list[int]:
    return np.random.default_rng(count).integers(3, vocab_size, count).tolist()


def _measure(contestants: dict[str, Contestant], context: int) -> dict[str, list[float]]:
    """Return tokens per second of each contestant: a figure for each of PROMPTS, then of PASTS."""
    prompts = [length for length in PROMPTS if length < context]
    pasts = [length for length in PASTS if length + NEW_TOKENS <= context]
    best: dict[str, list[float]] = {name: [0.0] * (len(prompts) + len(pasts)) for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            speeds = [length / run(length, 0)[0] for length in prompts]
            speeds += [NEW_TOKENS / run(length, NEW_TOKENS)[1] for length in pasts]
            best[name] = list(map(max, best[name], speeds))
    return best


def _print_speeds(speeds: dict[str, list[float]], threads: int) -> None:
    rows = []
    for precision, peers in PAIRS.items():
        for name in (precision, *(peer for peer in peers if peer in speeds)):
            row = [f"{speed:,.0f}" for speed in speeds[name]]
            if name != precision:
                ratios = zip(speeds[precision], speeds[name], strict=True)
                row = [f"{cell} (we {ours / theirs:.2f})" for cell, (ours, theirs) in zip(row, ratios, strict=True)]
            rows.append([f"llama.cpp, {name}" if name in peers else f"Limbeck, {name}", *row])
    columns = [f"prefill of {length}" for length in PROMPTS] + [f"decode after {length}" for length in PASTS]
    print_table(f"tokens per second, {threads} threads", ["", *columns[: len(rows[0]) - 1]], rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
