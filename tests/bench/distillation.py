"""Training speed from a teacher cache, beside plain cross-entropy, an online teacher and TRL's GKDTrainer.

All methods run in turns, each in a process of its own, on the same blocks of real text with the same student, batch,
precision and threads: the ratios hold better than the figures. A method's time is that of its training steps; filling
the cache is reported apart, since a whole sweep of students pays it once. Targets: from the cache, at least 0.95 times
plain cross-entropy with transformers' Trainer and 3.5 times TRL's GKDTrainer; online, at least 1.3 times TRL's. The
vocabularies are a small one, the quickstart's, and one of a usual size: they differ in the cost of the loss.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries
from tests import ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from limbeck.distill.cache.teacher_cache import TeacherCache
    from limbeck.distill.data.blocks import Blocks

LENGTH, BATCH, STEPS, ROUNDS = 256, 8, 10, 3


class Size(NamedTuple):
    """A vocabulary size, with the configs of a teacher of about 34M and a student of about 5M parameters."""

    vocabulary: int
    teacher: dict[str, int]
    student: dict[str, int]


SIZES = [
    Size(
        2048,
        dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=10, num_attention_heads=8),
        dict(hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=4),
    ),
    Size(
        32_000,
        dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=5, num_attention_heads=8),
        dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4),
    ),
]
TOKENIZER = ROOT / "quickstart" / "teacher"
PLAIN, TRL = "cross-entropy, transformers' Trainer", "forward KL, TRL's GKDTrainer, off-policy"
Method = Callable[[], float]  # returns the seconds of its training steps, or of filling a cache


def main() -> None:
    """Measure and print a table for each size."""
    quiet_libraries()
    import trl.experimental.gkd  # noqa: F401 (imported once, before the processes fork)

    from limbeck.distill.training import trainer as trainer_module  # noqa: F401

    for size in SIZES:
        with TemporaryDirectory() as temporary:
            os.environ["LIMBECK_HOME"] = temporary
            measure(size, text(), temporary)


def measure(size: Size, blocks: Blocks, temporary: str) -> None:
    """Measure all methods with one vocabulary, in turns, and print a table."""
    from limbeck.distill.recipe.schema import Objective, OnPolicy

    kl, forms = Objective(divergence="forward_kl"), ("sampled", "topk")

    def limbeck(objective: Objective, teacher: str | None, on_policy: OnPolicy | None = None) -> Method:
        return lambda: by_limbeck(size, blocks, objective, teacher, on_policy, Path(temporary) / "run")

    for form in forms:
        rate = blocks.ids.size / in_a_process(lambda form=form: fill_cache(size, blocks, form))  # type: ignore[misc]
        bytes_per_token = cache_of(size, blocks, form).disk_bytes() / blocks.ids.size
        print_status(
            f"teacher cache, {form}: {rate:,.0f} tokens/s to capture, once; {bytes_per_token:.1f} bytes per token"
        )
    methods: dict[str, Method] = {
        PLAIN: lambda: by_transformers(size, blocks, temporary),
        "cross-entropy, Limbeck": limbeck(Objective(labels=1.0), None),
        **{f"forward KL from the cache, {form}": limbeck(kl, form) for form in forms},
        "forward KL, teacher online": limbeck(kl, "online"),
        TRL: lambda: by_trl(size, blocks, temporary, lmbda=0.0),
        "on-policy, 64 new tokens, Limbeck": limbeck(kl, "online", OnPolicy(lmbda=1.0, max_new_tokens=64)),
        "on-policy, 64 new tokens, TRL": lambda: by_trl(size, blocks, temporary, lmbda=1.0),
    }
    rates: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(ROUNDS):
        for method, run in methods.items():
            rates[method].append(STEPS * BATCH * LENGTH / in_a_process(run))
    medians = {method: statistics.median(rate) for method, rate in rates.items()}
    print_table(
        f"training a student of {parameters(size, size.student):.1f}M, teacher of "
        f"{parameters(size, size.teacher):.1f}M, vocabulary {size.vocabulary:,}, batches of {BATCH} x {LENGTH}",
        ["method", "tokens/s", "times plain cross-entropy", "times TRL off-policy"],
        [
            (method, f"{rate:,.0f}", f"{rate / medians[PLAIN]:.2f}", f"{rate / medians[TRL]:.2f}")
            for method, rate in medians.items()
        ],
    )


def in_a_process(method: Method) -> float:
    """Call `method` in a forked process; this process has started no torch threads."""
    context = multiprocessing.get_context("fork")
    result = context.Value("d", -1.0)

    def run() -> None:
        result.value = method()

    process = context.Process(target=run)
    process.start()
    process.join()
    assert result.value >= 0, "a method failed: see above"
    return result.value


def text() -> Blocks:
    """Blocks of the standard library's source of one document each, since the peers do not separate documents."""
    from limbeck.distill.data.blocks import layout_digest, make_blocks
    from limbeck.distill.data.corpus import stdlib_documents
    from limbeck.registry.checkpoints.load import load_tokenizer

    made = make_blocks(list(itertools.islice(stdlib_documents(), 40)), load_tokenizer(TOKENIZER), LENGTH)
    whole = np.flatnonzero((made.segments == made.segments[:, :1]).all(1))[: STEPS * BATCH]
    ids, segments, targets = made.ids[whole], made.segments[whole], made.targets[whole]
    assert len(ids) == STEPS * BATCH
    return made._replace(ids=ids, segments=segments, targets=targets, digest=layout_digest(ids, segments, targets))


def cache_of(size: Size, blocks: Blocks, kind: str) -> TeacherCache:
    """The cache of one form, filled or not."""
    from limbeck.distill.cache.teacher_cache import TeacherCache
    from limbeck.distill.recipe.cache_form import Form
    from limbeck.distill.recipe.schema import Cache

    defaults = Cache()
    form = Form(kind, defaults.samples if kind == "sampled" else defaults.top_k, size.vocabulary)  # type: ignore[arg-type]
    return TeacherCache({"teacher": "bench"}, blocks.ids.shape, form)  # type: ignore[arg-type]


def fill_cache(size: Size, blocks: Blocks, kind: str) -> float:
    """Fill a cache, and return the seconds that it took."""
    from limbeck.distill.models.precision import uses_bf16
    from limbeck.distill.teacher.local import local_capture
    from limbeck.distill.training import distributed

    distributed.set_up()
    teacher, cache = make_llama(size, size.teacher), cache_of(size, blocks, kind)
    began = time.monotonic()
    cache.fill(local_capture(teacher, blocks, cache, uses_bf16(None, teacher.config)))
    return time.monotonic() - began


def by_limbeck(
    size: Size, blocks: Blocks, objective: Any, teacher_kind: str | None, on_policy: Any, folder: Path
) -> float:
    """Train with Limbeck, from a cache of the form `teacher_kind`, from an "online" teacher, or on labels (None)."""
    from limbeck.distill.recipe.schema import Training
    from limbeck.distill.training import distributed
    from limbeck.distill.training.trainer import Job, train

    distributed.set_up()
    training = Training(
        max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=STEPS, eval_steps=STEPS + 1, warmup_steps=0.0
    )
    teacher: Any = None
    if teacher_kind == "online":
        teacher = make_llama(size, size.teacher)
    elif teacher_kind is not None:
        teacher = cache_of(size, blocks, teacher_kind)
    student = make_llama(size, size.student)
    job = Job(student, blocks, blocks, objective, training, teacher, folder, 0, size.vocabulary, on_policy=on_policy)
    seconds = train(job).seconds
    shutil.rmtree(folder, ignore_errors=True)
    return seconds


def by_transformers(size: Size, blocks: Blocks, folder: str) -> float:
    from transformers import Trainer, TrainingArguments

    student = make_llama(size, size.student)

    rows = [{"input_ids": row, "labels": row} for row in blocks.batch(np.arange(len(blocks.ids)))["input_ids"]]
    trainer = Trainer(
        model=student, args=TrainingArguments(**arguments(student, folder)), train_dataset=rows, callbacks=[clock()]
    )
    return timed(trainer)


def by_trl(size: Size, blocks: Blocks, folder: str, lmbda: float) -> float:
    import torch
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from limbeck.registry.checkpoints.load import load_tokenizer

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        prompts = ids[:, : LENGTH // 2]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids,
            "prompts": prompts,
            "prompt_attention_mask": torch.ones_like(prompts),
        }

    student = make_llama(size, size.student)
    trainer = GKDTrainer(
        model=student,
        teacher_model=make_llama(size, size.teacher),
        args=GKDConfig(
            **arguments(student, folder),
            lmbda=lmbda,
            beta=0.0,
            temperature=1.0,
            max_new_tokens=64,
            activation_checkpointing=False,
            max_length=LENGTH,
        ),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"input_ids": blocks.ids}),
        processing_class=load_tokenizer(TOKENIZER),
        callbacks=[clock()],
    )
    return timed(trainer)


def arguments(student: PreTrainedModel, folder: str) -> dict[str, Any]:
    """The arguments of the peers: equal to Limbeck's, without anything that slows them down."""
    from limbeck.distill.models.loading import device
    from limbeck.distill.models.precision import uses_bf16

    return dict(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        weight_decay=0.1,
        bf16=uses_bf16(None, student.config),
        use_cpu=device() == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=STEPS,
        log_level="error",
    )


def clock() -> Any:
    """A callback that measures the seconds of a trainer's steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.monotonic()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.monotonic() - self.began

    return Clock()


def timed(trainer: Any) -> float:
    """Train, and return the seconds of the trainer's clock."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return next(c.seconds for c in trainer.callback_handler.callbacks if hasattr(c, "seconds") and hasattr(c, "began"))


def make_llama(size: Size, config: dict[str, int]) -> PreTrainedModel:
    """A random Llama; a teacher's matrices are scaled, so that its distributions are not nearly uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=size.vocabulary, max_position_embeddings=LENGTH, tie_word_embeddings=True)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **config, num_key_value_heads=config["num_attention_heads"]))
    if config is size.teacher:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3.0)
    return model


def parameters(size: Size, config: dict[str, int]) -> float:
    """Millions of parameters."""
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in make_llama(size, config).parameters()) / 1e6
