"""What is lost by storing the teacher: students taught from each stored form, beside one taught by every logit.

The quickstart's teacher and text, one student, the same blocks in the same order: what differs is the form alone.
Top-k is there with as many tokens as take the bytes of the samples, and with 32; beside the samples stand draws with
replacement, as they were published. Told of each: bytes a token on disk; the student's held-out bits per byte and its
divergence from the teacher; and how well its confidence is placed: the expected calibration error (Guo et al., arXiv
1706.04599) of its likeliest next token in 15 bins, and by how much it is too sure on average.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

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
    """A model on held-out text: bits per byte; divergence from the teacher, calibration error and what its confidence
    is above its accuracy, each a token."""

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

    asked = load.load_recipe(ROOT / "quickstart" / "recipe.toml")
    tokenizer = loading.load_tokenizer(ROOT / "quickstart" / "teacher")
    teacher = loading.load_model(ROOT / "quickstart" / "teacher")
    vocabulary = loading.vocabulary_size(tokenizer)
    training = asked.training.model_copy(update={"max_steps": STEPS, "per_device_train_batch_size": BATCH})
    kl, labels = Objective(divergence="forward_kl"), Objective(labels=1.0)
    with TemporaryDirectory() as temporary:
        os.environ["LIMBECK_HOME"] = temporary
        text = corpus.prepare_corpus(asked.data, ROOT / "quickstart", "bench")
        length = asked.data.max_length
        blocks = make_blocks(corpus.read_corpus(text.train), tokenizer, length, STEPS * BATCH * length)
        heldout = make_blocks(corpus.read_corpus(text.heldout), tokenizer, length)
        ways: dict[str, tuple[Objective, Any, float | None]] = {
            "every logit, teacher online": (kl, teacher, None),
            "labels alone": (labels, None, None),
        }
        forms = [Form(kind, size, vocabulary) for kind, size in FORMS]
        caches = [TeacherCache({"teacher": "bench"}, blocks.ids.shape, form) for form in forms]
        fill(caches, local_pass(teacher, blocks, vocabulary, bf16=False))
        for cache, (kind, size) in zip(caches, FORMS, strict=True):
            ways[f"{kind}, {size} a token"] = (kl, cache, cache.disk_bytes() / blocks.ids.size)
        drawn = TeacherCache({"teacher": "drawn"}, blocks.ids.shape)
        drawn.fill(with_replacement(teacher, blocks, vocabulary))
        kept = float(
            np.mean([(drawn.load_batch(np.array([n]))["weights"] > 0).sum(-1).float().mean() for n in range(BATCH)])
        )
        ways[f"{DRAWS} draws with replacement"] = (kl, drawn, 3 * kept + 3)  # packed as ours
        found: dict[str, list[Quality]] = {way: [] for way in ways}
        for seed in SEEDS:
            for way, (objective, said_by, _) in ways.items():
                student = initialise.fresh_model(asked.students["small"].config, tokenizer, length, seed)
                folder = Path(temporary) / "run" / way / str(seed)
                began = time.perf_counter()
                train(Job(student, blocks, heldout, objective, training, said_by, folder, seed, vocabulary))
                found[way].append(measure(student, teacher, heldout, vocabulary))
                print_status(f"{way}, seed {seed}: {found[way][-1]}, {time.perf_counter() - began:.0f} s")
        itself = measure(teacher, teacher, heldout, vocabulary)
    mean = {way: Quality._make(np.mean(each, axis=0)) for way, each in found.items()}
    dense = mean["every logit, teacher online"]
    rows = [
        (
            way,
            f"{ways[way][2]:.1f}" if ways[way][2] else None,
            f"{q.bits_per_byte:.4f}",
            f"{q.bits_per_byte / dense.bits_per_byte - 1:+.2%}",
            *(f"{number:.4f}" for number in (q.kl, q.calibration_error)),
            f"{q.overconfidence:+.4f}",
        )
        for way, q in mean.items()
    ]
    rows.append(("the teacher itself", None, f"{itself.bits_per_byte:.4f}", None, None, *_confidence(itself)))
    print_table(
        f"students after {STEPS} steps of {BATCH} x {length}, mean of {len(SEEDS)} seeds",
        [
            "taught by",
            "bytes a token",
            "bits per byte",
            "of every logit's",
            "KL, nats",
            "calibration error",
            "too sure by",
        ],
        rows,
    )


def with_replacement(teacher: PreTrainedModel, blocks: Blocks, vocabulary: int) -> Capture:
    """Tokens drawn from the teacher's distribution, each with its share of the draws (arXiv 2503.16870)."""
    import torch

    from limbeck.distill.models.loading import batches, logits_of

    @torch.inference_mode()
    def capture(indices: np.ndarray) -> dict[str, np.ndarray]:
        chance = torch.Generator().manual_seed(int(indices[0]))
        made: dict[str, list[torch.Tensor]] = {"ids": [], "weights": [], "entropy": []}
        for batch in batches(blocks, vocabulary, indices):
            logprobs = logits_of(teacher, batch)[..., :vocabulary].log_softmax(-1)
            draws = torch.multinomial(logprobs.exp().flatten(0, 1), DRAWS, replacement=True, generator=chance)
            counts = torch.zeros(len(draws), vocabulary).scatter_add_(-1, draws, torch.ones(draws.shape) / DRAWS)
            weights, ids = counts.view(logprobs.shape).topk(DRAWS)
            parts = {"ids": ids.int(), "weights": weights, "entropy": -(logprobs.exp() * logprobs).sum(-1)}
            for name, part in parts.items():
                made[name].append(part)
        return {name: torch.cat(parts).numpy() for name, parts in made.items()}

    return capture


def _confidence(quality: Quality) -> tuple[str, str]:
    return f"{quality.calibration_error:.4f}", f"{quality.overconfidence:+.4f}"


def measure(model: PreTrainedModel, teacher: PreTrainedModel, heldout: Blocks, vocabulary: int) -> Quality:
    """How a model does on held-out blocks, evenly spread."""
    import torch

    from limbeck.distill.models.loading import batches, logits_of

    chosen = np.unique(np.linspace(0, len(heldout.ids) - 1, HELDOUT_BLOCKS).astype(int))
    sums = torch.zeros(3, dtype=torch.float64)  # cross-entropy, divergence from the teacher, targets
    bins = torch.zeros(2, BINS, dtype=torch.float64)  # of confidence: its sum, and the sum of hits
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
    apart = (bins[0] - bins[1]) / targets
    return Quality(bits, divergence / targets, float(apart.abs().sum()), float(apart.sum()))
