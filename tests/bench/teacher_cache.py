"""What storing the teacher's outputs costs in quality: students of each stored form, and one of all logits.

The quickstart's teacher and text, one student, the same blocks in the same order: only the form differs. Top-k is
measured with 32 tokens and with the number of tokens that takes as many bytes as the samples; the samples are also
compared with draws with replacement, the published method. Reported for each: bytes per token on disk; the student's
held-out bits per byte and its divergence from the teacher; its expected calibration error (Guo et al., arXiv
1706.04599) for the most likely next token, in 15 bins; and its mean overconfidence.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from limbeck.registry.checkpoints.load import load_model, load_tokenizer
from limbeck.registry.core.terminal import print_status, print_table, quiet_libraries
from tests import ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from limbeck.distill.cache.teacher_cache import Capture
    from limbeck.distill.data.blocks import Blocks
    from limbeck.distill.recipe.cache_form import Kind

STEPS, BATCH, SEEDS, BINS, HELDOUT_BLOCKS, DRAWS = 300, 8, (0, 1), 15, 256, 50
FORMS: list[tuple[Kind, int]] = [("topk", 32), ("topk", 9), ("sampled", 12), ("sampled", 6)]


class Quality(NamedTuple):
    """A model on held-out text.

    Attributes:
        kl: divergence from the teacher, in nats per token.
        overconfidence: mean confidence minus accuracy.
    """

    bits_per_byte: float
    kl: float
    calibration_error: float
    overconfidence: float


def main() -> None:
    """Measure and print a table."""
    quiet_libraries()
    from limbeck.distill.cache.teacher_cache import TeacherCache, fill
    from limbeck.distill.data import corpus
    from limbeck.distill.data.blocks import make_blocks
    from limbeck.distill.models import loading
    from limbeck.distill.recipe import load
    from limbeck.distill.recipe.cache_form import Form
    from limbeck.distill.recipe.schema import Objective
    from limbeck.distill.students import initialise
    from limbeck.distill.teacher.local import local_pass
    from limbeck.distill.training.trainer import Job, train

    recipe = load.load_recipe(ROOT / "quickstart" / "recipe.toml")
    tokenizer = load_tokenizer(ROOT / "quickstart" / "teacher")
    teacher = load_model(ROOT / "quickstart" / "teacher")
    vocabulary = loading.vocabulary_size(tokenizer)
    training = recipe.training.model_copy(update={"max_steps": STEPS, "per_device_train_batch_size": BATCH})
    kl, labels = Objective(divergence="forward_kl"), Objective(labels=1.0)
    with TemporaryDirectory() as temporary:
        os.environ["LIMBECK_HOME"] = temporary
        text = corpus.prepare_corpus(recipe.data, ROOT / "quickstart", "bench")
        length = recipe.data.max_length
        blocks = make_blocks(corpus.read_corpus(text.train), tokenizer, length, STEPS * BATCH * length)
        heldout = make_blocks(corpus.read_corpus(text.heldout), tokenizer, length)
        methods: dict[str, tuple[Objective, Any, float | None]] = {
            "all logits, teacher online": (kl, teacher, None),
            "labels alone": (labels, None, None),
        }
        forms = [Form(kind, size, vocabulary) for kind, size in FORMS]
        caches = [TeacherCache({"teacher": "bench"}, blocks.ids.shape, form) for form in forms]
        fill(caches, local_pass(teacher, blocks, vocabulary, bf16=False))
        for cache, (kind, size) in zip(caches, FORMS, strict=True):
            methods[f"{kind}, {size} per token"] = (kl, cache, cache.disk_bytes() / blocks.ids.size)
        drawn = TeacherCache({"teacher": "drawn"}, blocks.ids.shape)
        drawn.fill(with_replacement(teacher, blocks, vocabulary))
        mean_stored = float(
            np.mean([(drawn.load_batch(np.array([n]))["weights"] > 0).sum(-1).float().mean() for n in range(BATCH)])
        )
        methods[f"{DRAWS} draws with replacement"] = (kl, drawn, 3 * mean_stored + 3)  # packed as Limbeck does
        qualities: dict[str, list[Quality]] = {method: [] for method in methods}
        for seed in SEEDS:
            for method, (objective, signal, _) in methods.items():
                student = initialise.fresh_model(recipe.students["small"].config, tokenizer, length, seed)
                folder = Path(temporary) / "run" / method / str(seed)
                began = time.perf_counter()
                train(Job(student, blocks, heldout, objective, training, signal, folder, seed, vocabulary))
                qualities[method].append(measure(student, teacher, heldout, vocabulary))
                print_status(f"{method}, seed {seed}: {qualities[method][-1]}, {time.perf_counter() - began:.0f} s")
        itself = measure(teacher, teacher, heldout, vocabulary)
    mean = {method: Quality._make(np.mean(each, axis=0)) for method, each in qualities.items()}
    dense = mean["all logits, teacher online"]
    rows = [
        (
            method,
            f"{methods[method][2]:.1f}" if methods[method][2] else None,
            f"{q.bits_per_byte:.4f}",
            f"{q.bits_per_byte / dense.bits_per_byte - 1:+.2%}",
            *(f"{number:.4f}" for number in (q.kl, q.calibration_error)),
            f"{q.overconfidence:+.4f}",
        )
        for method, q in mean.items()
    ]
    rows.append(("the teacher itself", None, f"{itself.bits_per_byte:.4f}", None, None, *_confidence(itself)))
    print_table(
        f"students after {STEPS} steps of {BATCH} x {length}, mean of {len(SEEDS)} seeds",
        [
            "teacher outputs",
            "bytes per token",
            "bits per byte",
            "against all logits",
            "KL, nats",
            "calibration error",
            "overconfidence",
        ],
        rows,
    )


def with_replacement(teacher: PreTrainedModel, blocks: Blocks, vocabulary: int) -> Capture:
    """Tokens drawn from the teacher's distribution, each weighted by its share of the draws (arXiv 2503.16870)."""
    import torch

    from limbeck.distill.models.loading import batches, logits_of

    @torch.inference_mode()
    def capture(indices: np.ndarray) -> dict[str, np.ndarray]:
        chance = torch.Generator().manual_seed(int(indices[0]))
        arrays: dict[str, list[torch.Tensor]] = {"ids": [], "weights": [], "entropy": []}
        for batch in batches(blocks, vocabulary, indices):
            logprobs = logits_of(teacher, batch)[..., :vocabulary].log_softmax(-1)
            draws = torch.multinomial(logprobs.exp().flatten(0, 1), DRAWS, replacement=True, generator=chance)
            counts = torch.zeros(len(draws), vocabulary).scatter_add_(-1, draws, torch.ones(draws.shape) / DRAWS)
            weights, ids = counts.view(logprobs.shape).topk(DRAWS)
            parts = {"ids": ids.int(), "weights": weights, "entropy": -(logprobs.exp() * logprobs).sum(-1)}
            for name, part in parts.items():
                arrays[name].append(part)
        return {name: torch.cat(parts).numpy() for name, parts in arrays.items()}

    return capture


def _confidence(quality: Quality) -> tuple[str, str]:
    return f"{quality.calibration_error:.4f}", f"{quality.overconfidence:+.4f}"


def measure(model: PreTrainedModel, teacher: PreTrainedModel, heldout: Blocks, vocabulary: int) -> Quality:
    """Measure a model on evenly spread held-out blocks."""
    import torch

    from limbeck.distill.models.loading import batches, logits_of

    chosen = np.unique(np.linspace(0, len(heldout.ids) - 1, HELDOUT_BLOCKS).astype(int))
    sums = torch.zeros(3, dtype=torch.float64)  # cross-entropy, divergence from the teacher, targets
    bins = torch.zeros(2, BINS, dtype=torch.float64)  # by confidence: its sum, and the number of right guesses
    with torch.inference_mode():
        for each in (model, teacher):
            torch.nn.Module.to(each, "cpu").eval()
        for batch in batches(heldout, vocabulary, chosen):
            labels = batch["labels"][:, 1:]
            rows = labels != -100
            log_q, log_p = (logits_of(m, batch)[:, :-1, :vocabulary][rows].log_softmax(-1) for m in (model, teacher))
            labels = labels[rows]
            sums += torch.stack(
                [
                    -log_q.gather(-1, labels[:, None]).double().sum(),
                    (log_p.exp() * (log_p - log_q)).double().sum(),
                    rows.sum(),
                ]
            )
            confidence, guess = log_q.exp().double().max(-1)
            place = (confidence * BINS).long().clamp_max(BINS - 1)
            bins[0].scatter_add_(0, place, confidence)
            bins[1].scatter_add_(0, place, (guess == labels).double())
    nats, divergence, targets = sums.tolist()
    bits = nats / targets / float(np.log(2)) * heldout.text_tokens / heldout.text_bytes
    gaps = (bins[0] - bins[1]) / targets
    return Quality(bits, divergence / targets, float(gaps.abs().sum()), float(gaps.sum()))
