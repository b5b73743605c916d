"""Measures scoring speed beside lm-eval's own models: same model, same requests, in turns within one process.

There are three kinds of requests: four choices after a context of 256 tokens; BLiMP's minimal pairs (Warstadt et al.
2020; from the folder of JSON lines `LIMBECK_BLIMP` if it is set, else similar pairs); and windows of long texts. HFLM
runs at its fastest batch size. The scores are compared too.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries

VOCABULARY, CONTEXT, ROUNDS = 32_000, 1024, 3
BATCH_SIZES = (1, 4, 16, 64)
# 35 million parameters, 16 million of them in embeddings.
CONFIG = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
              num_key_value_heads=8, max_position_embeddings=CONTEXT, tie_word_embeddings=True)  # fmt: skip

Pair = tuple[list[int], list[int]]


def main(threads: int | None = None) -> None:
    """Measure all kinds of requests and print a table."""
    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.onnxruntime_ort import ONNXRuntimeLM

    from limbeck.evals.engines.engine import load_engine
    from limbeck.export.artifact.export import export_onnx
    from limbeck.registry.catalog.model_ref import resolve_model
    from limbeck.registry.core.machine import physical_cores

    threads = threads or physical_cores()
    torch.set_num_threads(threads)
    rows = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        params, tokenizer = make_llama(folder / "torch")
        print_status(f"a random Llama of {params / 1e6:.0f}M parameters, {threads} threads")
        export_onnx(folder / "torch", folder / "onnx")
        ours = {name: load_engine(resolve_model(str(folder / name))) for name in ("torch", "onnx")}
        hflm = HFLM(pretrained=str(folder / "torch"), device="cpu", dtype="float32", batch_size=1)
        peer = ONNXRuntimeLM(str(folder / "onnx"), max_length=CONTEXT)

        def score_with_hflm(pairs: list[Pair], size: int) -> Any:
            hflm.batch_size_per_gpu = size
            return hflm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)

        def score_with_onnxruntime(pairs: list[Pair]) -> Any:
            return peer._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)

        choices = four_choices(tokenizer, 8)
        for kind, pairs in {
            "four choices after 256 tokens": choices,
            "minimal pairs": minimal_pairs(tokenizer, 250),
            "windows of long texts": windows(tokenizer, 2),
        }.items():
            seconds = {size: min(timed(score_with_hflm, pairs[::2], size)[0] for _ in range(2)) for size in BATCH_SIZES}
            size = min(seconds, key=seconds.__getitem__)
            rows.append([kind, "torch", f"HFLM, batch {size}", *compare(ours["torch"], score_with_hflm, pairs, size)])
        rows.append(
            [rows[0][0], "onnx", "lm-eval's onnxruntime", *compare(ours["onnx"], score_with_onnxruntime, choices)]
        )
    columns = ["requests", "Limbeck", "other", "seconds", "other's seconds", "speed-up", "range of 3 rounds"]
    columns += ["tokens run", "minimum", "largest difference"]
    print_table(f"scoring, {threads} threads, load {os.getloadavg()[0]:.1f}", columns, rows)


def compare(engine: Any, other: Callable[..., Any], pairs: list[Pair], *settings: Any) -> list[str]:
    """The cells of one comparison: both are timed in turns, after one round to warm up."""
    from limbeck.evals.engines.batches import BATCH_TOKENS

    seconds: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 1):
        engine.work.tokens_run = engine.work.min_tokens = 0
        own_seconds, scores = timed(lambda: dict(engine.scores(pairs, BATCH_TOKENS)))
        other_seconds, expected = timed(other, pairs, *settings)
        seconds.append((own_seconds, other_seconds))
    speed_ups = [other_seconds / own_seconds for own_seconds, other_seconds in seconds[1:]]
    difference = max(abs(scores[index][0] - score) for index, (score, _) in enumerate(expected))
    work = engine.work
    return [
        *(f"{statistics.median(column):.2f}" for column in zip(*seconds[1:], strict=True)),
        f"{statistics.median(speed_ups):.2f}",
        f"{min(speed_ups):.2f} to {max(speed_ups):.2f}",
        f"{work.tokens_run:,}",
        f"{work.min_tokens:,} (+{work.tokens_run / work.min_tokens - 1:.1%})",
        f"{difference:.0e}",
    ]


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """(seconds, result) of a call."""
    start = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - start, result


def make_llama(folder: Path) -> tuple[int, Any]:
    """Make a random Llama in `folder`, with a tokenizer trained on this text; returns (parameters, tokenizer)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([*sources(), *(" ".join(pair) for pair in sentences())], trainer)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=VOCABULARY, **ids, **CONFIG))
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return model.num_parameters(), fast


def sources() -> list[str]:
    """The text of 60 files of the standard library."""
    return [path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]]


def sentences() -> Iterator[tuple[str, str]]:
    """(good, bad) sentences: BLiMP's if its folder is given."""
    if blimp := os.environ.get("LIMBECK_BLIMP"):
        for path in sorted(Path(blimp).glob("*.jsonl")):
            for line in path.read_text().splitlines():
                item = json.loads(line)
                yield item["sentence_good"], item["sentence_bad"]
        return
    names = ["Amanda", "Carlos", "the teachers", "most customers", "this actress", "some senators", "Ruth", "an author"]
    verbs = [("were cleaning", "was clean"), ("has hidden", "have hid"), ("know", "knows that"), ("fell", "fall")]
    ends = ["that dog.", "every cup on the table.", "a lot of old bikes.", "those gates near here.", "itself again."]
    for subject, (good, bad), end, other in product(names, verbs, ends, names):
        start = f"{subject[0].upper()}{subject[1:]} and {other} "
        yield f"{start}{good} {end}", f"{start}{bad} {end}"


def four_choices(tokenizer: Any, documents: int) -> list[Pair]:
    """Contexts of 256 tokens, each with four continuations: its own and those of three other files."""
    texts = [tokenizer.encode(text) for text in sources()]
    texts = [ids for ids in texts if len(ids) > 2000]
    random = np.random.default_rng(0)
    pairs = []
    for number in range(documents):
        starts = [int(random.integers(0, len(ids) - 400)) for ids in texts]
        own = number % len(texts)
        context = texts[own][starts[own] :][:256]
        for choice in [own, *random.choice([n for n in range(len(texts)) if n != own], 3, replace=False)]:
            length = int(random.integers(6, 18))
            pairs.append((context, texts[choice][starts[choice] + 256 :][:length]))
    return pairs


def minimal_pairs(tokenizer: Any, count: int) -> list[Pair]:
    """`count` evenly spread pairs of sentences, without context."""
    pairs = list(sentences())
    chosen = pairs[:: max(1, len(pairs) // count)][:count]
    return [([0], tokenizer.encode(sentence)) for pair in chosen for sentence in pair]


def windows(tokenizer: Any, texts: int) -> list[Pair]:
    """The rolling windows of long texts."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    pairs = []
    for text in [text for text in sources() if len(text) > 20_000][:texts]:
        tokens = tokenizer.encode(text[:6_000])
        pairs += [make_disjoint_window(window) for window in get_rolling_token_windows(tokens, 0, CONTEXT, 1)]
    return pairs


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
