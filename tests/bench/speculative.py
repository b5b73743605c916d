"""Speculative decoding beside one token at a time: the same artifact, the same prompts, taking turns.

    python -m tests.bench.speculative [MODEL] [TEXT.jsonl] [DRAFT]

MODEL is a checkpoint (the quickstart's teacher), TEXT has {"text": ...} per line (the standard library's modules). An
extraction repeats its prompt: a passage, then its first words again. A free text goes on after a passage. DRAFT is a
checkpoint of a smaller model with the same tokenizer, such as a student.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries
from tests import ROOT
from tests.bench.quality import read_texts

PASSAGES, PASSAGE, WORDS, NEW = 8, 600, 40, 64  # texts; characters of a passage and of its first words; new tokens
LOOKUP = 10
PRECISIONS = ("fp32", "int8-weight", "int4")


def main(model: Path = ROOT / "quickstart/teacher", text: Path | None = None, draft: Path | None = None) -> None:
    """Export the model, decode with and without proposals, and print a table."""
    from limbeck.export.artifact.export import export_onnx
    from limbeck.export.quantize.settings import QuantizationSettings
    from limbeck.export.runtime.runtime import Runtime

    quiet_libraries()
    texts = [each for each in read_texts(text) if len(each) > PASSAGE][: 2 * PASSAGES]
    passages, rows = [each[:PASSAGE] for each in texts[:PASSAGES]], []
    tasks = {"extraction": [f"{each}\n\n{each[:WORDS]}" for each in passages], "free text": passages}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_onnx(model, folder / "fp32")
        if draft:
            export_onnx(draft, folder / "draft")
        settings = QuantizationSettings(texts[PASSAGES:], report=print_status)
        for precision in PRECISIONS:
            if precision != "fp32":
                export_onnx(model, folder / precision, precision, fp32_artifact=folder / "fp32", settings=settings)
            runtime = Runtime.load(folder / precision)
            for task, prompts in tasks.items():
                rows.append([precision, task, "prompt lookup", *compare(runtime, prompts, None)])
                if draft:
                    rows.append([precision, task, "draft", *compare(runtime, prompts, Runtime.load(folder / "draft"))])
    columns = ["precision", "task", "proposals", "times as fast", "acceptance length", "same texts"]
    print_table(f"{NEW} new tokens, greedy, one text at a time", columns, rows)


def compare(runtime: Any, prompts: list[str], draft: Any) -> list[str]:
    """Decode each prompt with and without proposals; return the cells of a row."""
    seconds, same, runs, tokens = [0.0, 0.0], 0, 0, 0.0
    for prompt in prompts:
        texts = []
        for speculates in (False, True):
            runtime.speculate(LOOKUP * (speculates and draft is None), draft if speculates else None)
            [done] = runtime.generate([prompt], max_new_tokens=NEW, ignore_eos=True)
            seconds[speculates] += done.decode_s
            texts.append(done.token_ids)
        counts = runtime.speculation.counts
        runs, tokens = runs + counts.verifications, tokens + counts.verifications + counts.accepted
        same += texts[0] == texts[1]
    return [f"{seconds[0] / seconds[1]:.2f}", f"{tokens / max(1, runs):.1f}", f"{same} of {len(prompts)}"]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
