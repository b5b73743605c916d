"""Speed beside llama.cpp: the same weights of a Llama, one text, 1 and 2 threads.

    python -m tests.bench.llama_cpp_speed [MODEL]

MODEL is a checkpoint of a Llama with a context of 1,152 tokens or more (for one without, the long columns are left
out). Precisions are paired by size: float32, 8 bits, 4 bits. The contestants take turns, ROUNDS times; each figure is
the best of its rounds. The limit is reading the weights once per token, as in `tests.bench.decode`; llama.cpp's weights
are the bytes of its file.
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
from tests.bench.decode import bytes_per_token, read_bandwidth
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
            weights = {name: path.stat().st_size for name, path in files.items()}
            weights |= {name: bytes_per_token(folder / name / "model.onnx") for name in PAIRS}
            _print_speeds(_measure(contestants, _context(model)), threads, weights)


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


def _measure(contestants: dict[str, Contestant], context: int) -> dict[str, dict[str, float]]:
    """Return tokens per second of each contestant by what was measured."""
    prompts = {f"prefill of {length}": length for length in PROMPTS if length < context}
    pasts = {f"decode after {length}": length for length in PASTS if length + NEW_TOKENS <= context}
    best = {name: dict.fromkeys([*prompts, *pasts], 0.0) for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            speeds = {column: length / run(length, 0)[0] for column, length in prompts.items()}
            speeds |= {column: NEW_TOKENS / run(length, NEW_TOKENS)[1] for column, length in pasts.items()}
            best[name] = {column: max(best[name][column], speed) for column, speed in speeds.items()}
    return best


def _print_speeds(speeds: dict[str, dict[str, float]], threads: int, weights: dict[str, int]) -> None:
    """Print a row for each contestant; `weights` are the bytes that it reads for a token."""
    bandwidth, rows, decode = read_bandwidth(threads), [], f"decode after {PASTS[0]}"
    columns = list(next(iter(speeds.values())))
    for precision, peers in PAIRS.items():
        for name in (precision, *(peer for peer in peers if peer in speeds)):
            row = [f"{speeds[name][column]:,.0f}" for column in columns]
            if name != precision:
                ratios = [speeds[precision][column] / speeds[name][column] for column in columns]
                row = [f"{cell} (we {ratio:.2f})" for cell, ratio in zip(row, ratios, strict=True)]
            share = f"{speeds[name][decode] * weights[name] / bandwidth:.0%}"
            rows.append([f"llama.cpp, {name}" if name in peers else f"Limbeck, {name}", *row, share])
    title = f"tokens per second, {threads} threads; memory is read at {bandwidth / 1e9:.1f} GB/s"
    print_table(title, ["", *columns, f"of the limit, {decode}"], rows)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
