"""Training speed from stored teacher logits, beside plain cross-entropy and beside a teacher that runs online.

The three run in turns within one process, on the same blocks, so that the ratios hold where the figures do not.
Capturing the cache is told apart: it is paid once for a whole sweep of students.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from registry.terminal import print_table, quiet_libraries, say

VOCABULARY, LENGTH, BATCH, STEPS, ROUNDS = 2048, 256, 8, 10, 3
TEACHER = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8)
STUDENT = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4)


def main() -> None:
    """Measure and print a table."""
    quiet_libraries()
    import torch
    from transformers import PreTrainedModel, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from distill.cache import TeacherCache
    from distill.models import capture_topk, device, has_bf16
    from distill.recipe import Objective, Training
    from distill.train import Teacher, train

    blocks = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH * STEPS, LENGTH), dtype=np.int32)
    training = Training(max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=STEPS)
    teacher = make_llama(TEACHER)

    def by_transformers(student: PreTrainedModel) -> None:
        arguments = TrainingArguments(
            output_dir=temporary,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            bf16=has_bf16(),
            use_cpu=device() == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=STEPS,
        )
        rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(blocks).long()]
        trainer = Trainer(model=student, args=arguments, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def by_limbeck(objective: Objective, said_by: Teacher) -> Callable[[PreTrainedModel], None]:
        return lambda student: (
            train(student, blocks, objective, training, said_by, Path(temporary) / "run", 0, VOCABULARY) and None
        )

    with TemporaryDirectory() as temporary:
        os.environ["LIMBECK_HOME"] = temporary
        cache = TeacherCache({"teacher": "bench", "blocks": "bench", "top_k": 32}, blocks, VOCABULARY)
        began = time.perf_counter()
        cache.fill(capture_topk(teacher, VOCABULARY, 32, has_bf16()))
        captured = blocks.size / (time.perf_counter() - began)
        size = cache.disk_bytes() / blocks.size
        say(f"teacher cache: {captured:,.0f} tokens/s to capture, {size:.0f} bytes a token")
        kl = Objective(divergence="forward_kl")
        ways = {
            "cross-entropy, transformers' Trainer": by_transformers,
            "cross-entropy, Limbeck": by_limbeck(Objective(labels=1.0), None),
            "forward KL from the cache": by_limbeck(kl, cache),
            "forward KL, teacher online": by_limbeck(kl, teacher),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, run in ways.items():
                student = make_llama(STUDENT)
                began = time.perf_counter()
                run(student)
                rates[way].append(blocks.size / (time.perf_counter() - began))
    medians = {way: statistics.median(rate) for way, rate in rates.items()}
    first = next(iter(medians.values()))
    print_table(
        f"training a student of {parameters(make_llama(STUDENT)):.1f}M, teacher of {parameters(teacher):.1f}M, "
        f"{BATCH} x {LENGTH}, {torch.get_num_threads()} threads",
        ["way", "tokens/s", "of plain cross-entropy"],
        [(way, f"{rate:,.0f}", f"{rate / first:.2f}") for way, rate in medians.items()],
    )


def make_llama(config: dict[str, int]):  # type: ignore[no-untyped-def]
    """A random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, tie_word_embeddings=True)
    return LlamaForCausalLM(LlamaConfig(**sizes, **config, num_key_value_heads=config["num_attention_heads"]))


def parameters(model) -> float:  # type: ignore[no-untyped-def]
    """Millions of parameters."""
    return sum(p.numel() for p in model.parameters()) / 1e6
