"""Quality of int4 beside llama.cpp's formats: the same Llama weights, the same text, KL to the float32 model.

    python -m tests.bench.quality [MODEL] [TEXT.jsonl]

MODEL is a checkpoint of a Llama (the quickstart's teacher), TEXT has {"text": ...} per line (the standard library's
modules): the first half of its documents calibrates int4 and the mixed formats, the second half is scored. llama.cpp
quantizes an F32 GGUF file of the weights without an importance matrix, as the files that people download mostly are.
If int4 has parts of 8 bits, it is also made as large as Q4_K_M: with the parts that gain most per byte in 8 bits.
Sizes are of weights and graph, without the tokenizer.
"""

from __future__ import annotations

import math
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries
from tests import ROOT
from tests.bench._llama_cpp import quantize_by_llama_cpp

TOKENS, ROW_TOKENS = 4096, 256  # scored, and of one document
FORMATS = ("Q4_0", "Q4_K_M", "Q8_0")

Logits = Callable[[list[int]], np.ndarray]  # T token ids -> (T, V) logits


def main(model: Path = ROOT / "quickstart/teacher", text: Path | None = None) -> None:
    """Quantize the model in each format and print a table."""
    from limbeck.export.artifact.export import export_onnx
    from limbeck.export.quantize.settings import QuantizationSettings
    from limbeck.export.runtime.runtime import Runtime

    quiet_libraries()
    texts = read_texts(text)
    half = len(texts) // 2
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx(model, folder / "fp32")
        settings = QuantizationSettings(texts[:half], report=print_status)
        runtime = Runtime.load(folder / "fp32", verify=False)
        rows = rows_of(runtime, texts[half:])
        contestants: dict[str, tuple[int, Logits]] = {}
        for precision in ("int8-weight", "int4"):
            export_onnx(model, folder / precision, precision, fp32_artifact=folder / "fp32", settings=settings)
            size = sum(path.stat().st_size for path in (folder / precision).glob("model.onnx*"))
            contestants[f"Limbeck, {precision}"] = size, logits_of(folder / precision)
        peers = dict(llama_cpp_formats(model, folder))
        if "Q4_K_M" in peers and (found := int4_of_size(folder, texts[:half], peers["Q4_K_M"][0])):
            contestants["Limbeck, int4 at the size of Q4_K_M"] = found
        contestants |= {f"llama.cpp, {name}": found for name, found in peers.items()}
        print_scores(logits_of(folder / "fp32"), contestants, rows, runtime.decode)


def int4_of_size(folder: Path, texts: Sequence[str], limit: int) -> tuple[int, Logits] | None:
    """Make int4 of at most `limit` bytes, by the ranking of parts in `folder/int4`; None if it has none."""
    from limbeck.export.graph.save import save_graph
    from limbeck.export.quantize.precisions import FORMATS
    from limbeck.export.quantize.sample_texts import CHOICE_CONVERSATIONS, render_conversations
    from limbeck.export.quantize.weight_only import GraphWeights
    from limbeck.registry.core.digest import read_manifest

    ranked = list(read_manifest(folder / "int4")["quantization"].get("alone_in_8_bits", ()))
    if not ranked:
        return None
    weights, output = GraphWeights.from_graph(folder / "fp32/model.onnx"), folder / "int4-of-size"
    with TemporaryDirectory(dir=folder) as scratch:
        weights.calibrate(
            folder / "fp32", Path(scratch), [*texts, *render_conversations(folder / "fp32", CHOICE_CONVERSATIONS)]
        )
    shutil.copytree(folder / "int4", output)
    low, high = 0, len(ranked) + 1  # as many parts in 8 bits fit, and do not fit
    while True:
        count = (low + high) // 2 if high - low > 1 else low
        plan = dict.fromkeys(weights.groups, FORMATS[4]) | dict.fromkeys(ranked[:count], FORMATS[8])
        size = save_graph(weights.quantize(plan), output / "model.onnx") + (output / "model.onnx").stat().st_size
        if high - low == 1:
            return size, logits_of(output)
        low, high = (count, high) if size <= limit else (low, count)


def read_texts(path: Path | None) -> list[str]:
    """Return the documents of a JSON Lines file; without one, modules of Python's standard library."""
    if path:
        from limbeck.registry.core.jsonl import read_rows

        return [text for (text,) in read_rows(path, ("text",), None)]
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [module.read_text(encoding="utf-8", errors="ignore") for module in modules]
    return texts[::2] + texts[1::2]


def rows_of(runtime: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return beginnings of the texts, TOKENS in all."""
    rows = (runtime.encode(text[: 16 * ROW_TOKENS])[:ROW_TOKENS] for text in texts)
    return [row for row in rows if len(row) > 1][: TOKENS // ROW_TOKENS]


def logits_of(artifact: Path) -> Logits:
    """Return the logits of an artifact as a function of the tokens."""
    from limbeck.export.runtime.runtime import Runtime

    runtime = Runtime.load(artifact, verify=False)
    return lambda row: runtime.logits(np.array([row]), np.ones((1, len(row)), np.int64))[0]


def llama_cpp_formats(model: Path, folder: Path) -> Iterator[tuple[str, tuple[int, Logits]]]:
    """Quantize the model by llama.cpp. Yields format -> size and logits; nothing if llama-cpp-python is missing."""
    for name, path in quantize_by_llama_cpp(model, folder, FORMATS).items():
        import llama_cpp

        llama = llama_cpp.Llama(str(path), n_ctx=ROW_TOKENS, n_batch=ROW_TOKENS, logits_all=True, verbose=False)

        def logits(row: list[int], llama: Any = llama) -> np.ndarray:
            llama.reset()
            llama.eval(row)
            return np.array(llama.scores[: len(row)])

        yield name, (path.stat().st_size, logits)


def print_scores(
    reference: Logits,
    contestants: dict[str, tuple[int, Logits]],
    rows: list[list[int]],
    decode: Callable[[list[int], bool], str],
) -> None:
    """Print size, KL, bits per byte and top-1 agreement of each contestant."""
    from limbeck.export.runtime.sampling import log_softmax

    size = sum(len(decode(row[1:], False).encode()) for row in rows)
    wanted = [log_softmax(reference(row).astype(np.float64)) for row in rows]
    table = []
    for name, (bytes_, logits) in contestants.items():
        kl, same, nats = [], [], 0.0
        for row, p in zip(rows, wanted, strict=True):
            q = log_softmax(logits(row).astype(np.float64))
            kl += (np.exp(p) * (p - q)).sum(axis=1).tolist()
            same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
            nats -= float(q[np.arange(len(row) - 1), row[1:]].sum())
        figures = [f"{bytes_ / 1e6:.1f}", f"{np.mean(kl):.4f}", f"{np.quantile(kl, 0.99):.3f}"]
        table.append([name, *figures, f"{nats / math.log(2) / size:.4f}", f"{np.mean(same):.1%}"])
    bits = -sum(float(p[np.arange(len(r) - 1), r[1:]].sum()) for r, p in zip(rows, wanted, strict=True))
    print_table(
        f"{sum(map(len, rows)):,} tokens, KL to float32, whose bits per byte are {bits / math.log(2) / size:.4f}",
        ["", "MB", "KL, nats", "99% of tokens below", "bits per byte", "top-1 agreement"],
        table,
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
