"""Decode speed of one Llama: the torch-free runtime against torch, optimum and onnxruntime-genai with the same weights.

All run in turns on the same number of threads, so the ratios are more stable than the figures. optimum runs in a
process of its own, over the overlay, the others in this one. The limit is reading the weights once per token: memory
bandwidth, measured with numpy, over the bytes of weights that one token needs. Weights in the processor's cache can
exceed it. Load time and memory are measured in a separate process for each artifact.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from limbeck.registry.core.machine import physical_cores
from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries

VOCABULARY = 32_000
PROMPT, NEW, ROUNDS = 64, 64, 4
# 81 million parameters: much more than a processor's cache holds.
CONFIG = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=9, num_attention_heads=12,
              num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True)  # fmt: skip
LOOKUPS = {"Gather", "GatherBlockQuantized"}  # operators that read one row of a table

Run = Callable[[int], Any]


def main(threads: int | None = None) -> None:
    """Measure with one thread and with one per core, or with `threads`, and print tables."""
    quiet_libraries()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        params = make_llama(folder / "torch")
        print_status(f"a random Llama of {params / 1e6:.0f}M parameters")
        artifacts = make_artifacts(folder)
        for count in [threads] if threads else sorted({1, physical_cores()}):
            measure_decoding(folder / "torch", artifacts, count)
        measure_loading(artifacts)


def make_artifacts(folder: Path) -> dict[str, Path]:
    """Export the model in each precision. Returns precision -> folder."""
    from limbeck.export.artifact.export import export_onnx
    from limbeck.export.graph.save import save_graph
    from limbeck.export.quantize.blocks.formats import BlockFormat
    from limbeck.export.quantize.weight_only import GraphWeights

    artifacts = {name: folder / name for name in ("fp32", "int8-weight", "int4")}
    export_onnx(folder / "torch", artifacts["fp32"])
    weights = GraphWeights.from_graph(artifacts["fp32"] / "model.onnx")
    for name, bits in (
        ("int8-weight", 8),
        ("int4", 4),
    ):  # without a search, since random weights have no quality to keep
        shutil.copytree(
            artifacts["fp32"], artifacts[name], ignore=shutil.ignore_patterns("model.onnx*", "limbeck.json")
        )
        save_graph(
            weights.quantize(dict.fromkeys(weights.groups, BlockFormat(bits, 32, False, 4))),
            artifacts[name] / "model.onnx",
        )
    return artifacts


def measure_decoding(model: Path, artifacts: dict[str, Path], threads: int) -> None:
    """Print the tokens per second of each contestant, run in turns."""
    runs, bytes_of_precision = load_contestants(model, artifacts, threads)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            if round_:
                rates[name].append(decode_rate(run))
            else:
                run(4)  # warm up
    bandwidth = read_bandwidth(threads)
    rows = []
    for name, values in rates.items():
        rate, precision = statistics.median(values), name.rpartition(", ")[2]
        peers = {"x torch": "torch eager, fp32", "x optimum": f"optimum, {precision}",
                 "x genai": f"onnxruntime-genai, {precision}"}  # fmt: skip
        # Ratios within a round: the machine changes more between rounds than within one.
        ratios = [
            f"{statistics.median(a / b for a, b in zip(values, rates[peer], strict=True)):.2f}"
            if peer in rates and peer != name
            else None
            for peer in peers.values()
        ]
        share = f"{rate * bytes_of_precision[precision] / bandwidth:.0%}"
        rows.append([name, f"{rate:.0f}", f"{min(values):.0f} to {max(values):.0f}", *ratios, share])
    title = (
        f"decode, batch 1, prompt {PROMPT}, {NEW} new tokens, {threads} threads, load {os.getloadavg()[0]:.1f}; "
        f"memory read at {bandwidth / 1e9:.1f} GB/s"
    )
    columns = ["", "tokens/s", f"of {ROUNDS} rounds", "x torch", "x optimum", "x genai", "of the memory limit"]
    print_table(title, columns, rows)


def load_contestants(model: Path, artifacts: dict[str, Path], threads: int) -> tuple[dict[str, Run], dict[str, int]]:
    """Return "engine, precision" -> function that decodes N tokens, and precision -> bytes that a token reads."""
    import torch
    from transformers import AutoModelForCausalLM

    from limbeck.export.runtime.runtime import Runtime

    torch.set_num_threads(threads)
    prompt = np.random.default_rng(0).integers(1, VOCABULARY, PROMPT).tolist()
    runs: dict[str, Run] = {}
    eager = AutoModelForCausalLM.from_pretrained(model).eval()
    runs["torch eager, fp32"] = lambda new: transformers_generate(eager, prompt, new)
    for name in ("fp32", "int4"):
        runs[f"optimum, {name}"] = optimum_generate(artifacts[name], prompt, threads)
        if genai := genai_generate(artifacts[name], prompt, threads):
            runs[f"onnxruntime-genai, {name}"] = genai
    for name, artifact in artifacts.items():
        own = Runtime.load(artifact, threads=threads, verify=False)
        runs[f"Limbeck, {name}"] = lambda new, own=own: own.generate([prompt], max_new_tokens=new, ignore_eos=True)
    return runs, {name: bytes_per_token(artifact / "model.onnx") for name, artifact in artifacts.items()}


OPTIMUM = """
import json, sys
import onnxruntime, torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, prompt, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
ids = torch.tensor([prompt])
for line in sys.stdin:
    new, mask = int(line), torch.ones_like(ids)
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    print("done", flush=True)
"""


def optimum_generate(artifact: Path, prompt: list[int], threads: int) -> Run:
    """Return a function that decodes greedily with optimum, in a process that ends with this one."""
    from limbeck.registry.core.overlay import install_overlay, overlay_environment

    command = [sys.executable, "-c", OPTIMUM, artifact, json.dumps(prompt), str(threads)]
    environment = overlay_environment(install_overlay(print_status))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, env=environment, text=True, bufsize=1, **pipes)

    def run(new: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{new}\n")
        if process.stdout.readline() != "done\n":
            raise RuntimeError(f"optimum ended with {process.wait()}")

    return run


def genai_generate(artifact: Path, prompt: list[int], threads: int) -> Run | None:
    """Return a function that decodes greedily with onnxruntime-genai; None if that is not installed."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        print_status("onnxruntime-genai is not installed: skipped")
        return None
    config = genai.Config(str(artifact))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)

    def run(new: int) -> None:
        parameters = genai.GeneratorParams(model)
        length = len(prompt) + new
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(new):
            generator.generate_next_token()

    return run


def bytes_per_token(graph: Path) -> int:
    """Return the bytes of the weights that one token reads: all except tables of which it reads one row."""
    import onnx

    model = onnx.load(graph).graph
    uses: dict[str, set[str]] = {}
    for node in model.node:
        for name in node.input:
            uses.setdefault(name, set()).add(node.op_type)
    return sum(
        onnx.numpy_helper.to_array(item).nbytes for item in model.initializer if uses.get(item.name, set()) - LOOKUPS
    )


def measure_loading(artifacts: dict[str, Path]) -> None:
    """Print the seconds from folder to first token, and the peak memory, each in a new process."""
    from limbeck.registry.core.digest import write_manifest

    rows = []
    for name, artifact in artifacts.items():
        write_manifest(artifact)
        weights = sum(path.stat().st_size for path in artifact.glob("model.onnx*"))
        tries = []
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", LOAD, artifact], capture_output=True, text=True, check=True)
            tries.append(json.loads(done.stdout))
        best = min(tries, key=lambda one: one["first_s"])
        needed = weights + best["cache"]
        rows.append(
            [
                name, f"{weights / 1e6:.0f}", f"{best['load_s']:.2f}", f"{best['first_s']:.2f}",
                f"{best['peak'] / 1e6:.0f}", f"{(best['peak'] - best['before']) / needed:.2f}",
                f"{best['peak'] / needed:.2f}",
            ]
        )  # fmt: skip
    columns = [
        "",
        "weights, MB",
        "load, s",
        "first token, s",
        "peak, MB",
        "(peak - Python) / (weights + cache)",
        "peak / (weights + cache)",
    ]
    print_table("a new process: verify files, load, first token; best of 3", columns, rows)


LOAD = f"""
import json, sys, time
from limbeck.export.runtime.runtime import Runtime
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
before, start = memory("VmRSS"), time.perf_counter()
runtime = Runtime.load(sys.argv[1])
loaded = time.perf_counter() - start
runtime.generate([[5] * {PROMPT}], max_new_tokens=1)
first = time.perf_counter() - start
runtime.generate([[5] * {PROMPT}], max_new_tokens={NEW}, ignore_eos=True)
cache = sum(item.shape[1] * item.shape[3] * 4 * {PROMPT + NEW} for item in runtime.past_inputs.values())
print(json.dumps(dict(load_s=loaded, first_s=first, cache=cache, peak=memory("VmHWM"), before=before)))
"""


def make_llama(folder: Path) -> int:
    """Save a random Llama with a byte-level tokenizer in `folder`. Returns its number of parameters."""
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
    """Decode `new` tokens greedily with transformers' `generate`."""
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )


def decode_rate(run: Run) -> float:
    """Measure tokens per second after the first: a long run minus a run of one token."""
    start = time.perf_counter()
    run(1)
    middle = time.perf_counter()
    run(NEW)
    end = time.perf_counter()
    return (NEW - 1) / ((end - middle) - (middle - start))


def read_bandwidth(threads: int) -> float:
    """Measure the bytes per second that `threads` threads read from memory: the best of 4 scans of 1 GB."""
    from concurrent.futures import ThreadPoolExecutor

    arrays = [np.ones(2**28 // threads, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(np.max, arrays))  # numpy releases the lock while it scans
            best = max(best, sum(array.nbytes for array in arrays) / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
