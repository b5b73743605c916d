"""The stored forms: samples are unbiased and small on disk, top-k is biased."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from limbeck.distill.cache import encoding
from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.data.blocks import make_blocks
from limbeck.distill.data.corpus import stdlib_documents
from limbeck.distill.losses import divergences
from limbeck.distill.recipe import cache_form
from limbeck.distill.recipe.cache_form import Form
from limbeck.distill.recipe.schema import Cache, Objective
from limbeck.distill.teacher.local import local_capture
from limbeck.registry.checkpoints.load import load_model, load_tokenizer
from tests import ROOT

KL = Objective(divergence="forward_kl")


def zipf(tokens: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Logits (tokens, vocab_size) like those of text: a few likely tokens, a long tail, positions of varied entropy."""
    chance = np.random.default_rng(seed)
    ranks = np.stack([chance.permutation(vocab_size) for _ in range(tokens)]) + 1
    return torch.from_numpy(-np.log(ranks) * chance.uniform(1.0, 3.0, (tokens, 1)))


def draws(form: Form, logits: torch.Tensor, target_mask: np.ndarray, count: int) -> list[divergences.Samples]:
    """`count` independent samples of one block, each read as a batch of one."""
    made = [encoding.block_arrays(form, logits, target_mask, (7, seed)) for seed in range(count)]
    return [divergences.Samples(**{k: v[0] for k, v in encoding.batch(form, [block]).items()}) for block in made]


def estimate(samples: divergences.Samples, vocab_size: int) -> torch.Tensor:
    """The distribution that samples estimate: (T, vocab_size) float64."""
    dense = torch.zeros(len(samples.ids), vocab_size, dtype=torch.float64)
    return dense.scatter_add_(-1, samples.ids, samples.weights.double())


# Ids take 9, 16, 17, 18 and 19 bits and leave 15, 8, 7, 6 and 13 for the weight.
VOCABULARIES = [300, 2**16, 2**17, 2**18, 2**18 + 1]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_are_unbiased(vocab_size: int, temperature: float) -> None:
    rows, count = 6, 300
    logits = zipf(rows, 300)  # the other tokens of the vocabulary have probability 0
    form, target_mask = Form("sampled", 8, vocab_size, temperature), np.ones(rows, dtype=bool)
    probs = (logits / temperature).softmax(-1)
    made = torch.stack([estimate(samples, 300) for samples in draws(form, logits, target_mask, count)])
    error = made.mean(0) - probs
    # A token stored with probability p / t and weight t has variance p (t - p).
    t = float(made[made > 0].min())
    spread = (probs * t).sqrt() / count**0.5 + 1e-4
    assert float((error / spread).abs().max()) < 5
    # The weight of a token that is always stored is rounded to one of the two nearest levels.
    certain, gap = probs >= t, t ** (-1 / (form.levels - 1)) - 1
    assert certain.any()
    assert float((error / probs)[certain].abs().max()) < 5 * gap / 2 / count**0.5 + 1e-6
    assert float((made.std(0) / probs)[certain].max()) < 0.6 * gap + 1e-6
    assert float(error.pow(2).mean().sqrt()) < 1.5 * float(spread.mean())
    kept = (made > 0).sum((1, 2)).double()
    assert kept.mean() == pytest.approx(8 * rows, rel=0.01)
    assert kept.std() <= 1
    assert float(made.sum(-1).mean()) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_the_last_ids_of_a_vocabulary_are_stored(vocab_size: int) -> None:
    logits = torch.full((3, vocab_size), -60.0)
    logits[:, -1], logits[:, -2], logits[1, 0] = 2.0, 1.0, 0.0
    form = Form("sampled", 8, vocab_size)
    (samples,) = draws(form, logits, np.ones(3, dtype=bool), 1)
    kept = [dict(zip(i[w > 0].tolist(), w[w > 0].tolist(), strict=True)) for i, w in zip(*samples[:2], strict=True)]
    last = [vocab_size - 2, vocab_size - 1]
    assert [[*row] for row in kept] == [last, [0, *last], last]
    for row, probs in zip(kept, logits.softmax(-1), strict=True):
        for token, weight in row.items():
            assert weight == pytest.approx(float(probs[token]), rel=0.07)  # one level of 64


def test_the_mean_gradient_of_samples_is_the_dense_one_and_that_of_topk_is_not() -> None:
    rows, vocab_size, count = 4, 300, 500
    teacher, target_mask = zipf(rows, vocab_size), np.ones(rows, dtype=bool)
    student = (0.1 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0))).double()
    labels = torch.zeros(rows, dtype=torch.int64)

    def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        logits = student.clone().requires_grad_()
        return torch.autograd.grad(loss(logits), logits)[0]

    dense = gradient(lambda q: kl_div(q.log_softmax(-1), teacher.softmax(-1), reduction="sum"))
    drawn = draws(Form("sampled", 8, vocab_size), teacher, target_mask, count)
    each = torch.stack([gradient(lambda q, s=s: divergences.loss(q, labels, KL, s)) for s in drawn])  # type: ignore[misc]
    error = float((each.mean(0) - dense).norm())
    expected = float(each.var(0).sum().sqrt()) / count**0.5  # standard error of the mean
    assert error < 1.3 * expected
    form = Form("topk", 8, vocab_size)
    arrays = encoding.batch(form, [encoding.block_arrays(form, teacher, target_mask, (0,))])
    topk = divergences.TopK(**{name: array[0] for name, array in arrays.items()})
    biased = gradient(lambda q: divergences.loss(q, labels, KL, topk))
    assert float((biased - dense).norm()) > 5 * error


def test_the_mean_loss_of_samples_is_the_divergence() -> None:
    rows, vocab_size, count = 4, 300, 500
    teacher, target_mask = zipf(rows, vocab_size), np.ones(rows, dtype=bool)
    student = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.zeros(rows, dtype=torch.int64)
    drawn = draws(Form("sampled", 8, vocab_size), teacher, target_mask, count)
    each = torch.stack([divergences.loss(student, labels, KL, samples) for samples in drawn])
    dense = kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")
    assert float(each.mean()) == pytest.approx(float(dense), abs=4 * float(each.std()) / count**0.5 + 4e-3)


def test_samples_are_closer_than_as_many_draws_with_replacement() -> None:
    """Compared with the published method at 50 draws, with as many distinct tokens as those have on average."""
    rows, vocab_size, count = 16, 2000, 200
    logits = zipf(rows, vocab_size)
    probs = logits.softmax(-1)
    drawn = torch.distributions.Multinomial(50, probs=probs)
    torch.manual_seed(0)
    theirs = torch.stack([drawn.sample() / 50 for _ in range(count)])
    distinct = int((theirs > 0).sum(-1).double().mean())
    samples = draws(Form("sampled", distinct, vocab_size), logits, np.ones(rows, dtype=bool), count)
    ours = torch.stack([estimate(each, vocab_size) for each in samples])
    assert float((ours - probs).pow(2).sum(-1).mean()) < 0.5 * float((theirs - probs).pow(2).sum(-1).mean())


def test_only_target_positions_take_space() -> None:
    target_mask = np.arange(16) >= 12
    form = Form("sampled", 8, 300)
    logits = zipf(16, 300)
    arrays = encoding.block_arrays(form, logits, target_mask, (0,))
    rows = encoding.batch(form, [arrays])
    best = rows["ids"][0].gather(-1, rows["weights"][0].argmax(-1, keepdim=True))[target_mask, 0]
    assert torch.equal(best, logits.argmax(-1)[target_mask])  # each position has its own tokens
    assert arrays["sizes"][~target_mask].sum() == 0
    assert arrays["sizes"][target_mask].sum() == pytest.approx(4 * 8, abs=1)
    none = encoding.block_arrays(form, zipf(16, 300), np.zeros(16, dtype=bool), (0,))
    assert len(none["entries"]) == 0
    rows = encoding.batch(form, [none, arrays])
    assert rows["ids"].shape[:2] == (2, 16)
    assert not rows["weights"][0].any()


def test_one_position_may_store_more_than_255_tokens() -> None:
    logits = torch.zeros(8, 2000)
    logits[1:, 7] = 50.0  # all but the first position are certain
    form = Form("sampled", 60, 2000)
    arrays = encoding.block_arrays(form, logits, np.ones(8, dtype=bool), (0,))
    assert arrays["sizes"][0] > 255
    assert arrays["sizes"].sum() == len(arrays["entries"])


@pytest.mark.parametrize("peak", [1.0, 50.0, 1000.0])
def test_a_confident_teacher_takes_less_space(peak: float) -> None:
    """Even if all probabilities but one are zero."""
    logits = torch.zeros(8, 300)
    logits[:, 7] = peak
    form = Form("sampled", 8, 300)
    arrays = encoding.block_arrays(form, logits, np.ones(8, dtype=bool), (0,))
    samples = divergences.Samples(**{name: array[0] for name, array in encoding.batch(form, [arrays]).items()})
    assert len(arrays["entries"]) <= 8 * 8 + 1
    if peak > 1:
        assert len(arrays["entries"]) == 8
        assert torch.equal(samples.weights.max(-1).values, torch.ones(8))
        assert (samples.ids.gather(-1, samples.weights.argmax(-1, keepdim=True)) == 7).all()


def test_the_default_takes_at_most_40_bytes_per_token(limbeck_home: Path) -> None:
    """For text and the quickstart's teacher, and for the largest vocabularies in use."""
    form = cache_form.choose_form(Cache(form="sampled"), KL, 2048)
    assert form is not None
    teacher = ROOT / "quickstart" / "teacher"
    tokenizer = load_tokenizer(teacher)
    documents = [next(stdlib_documents())]
    blocks = make_blocks(documents, tokenizer, 256, max_tokens=2048)
    cache = TeacherCache({"teacher": "t"}, (len(blocks.ids), 256), form)
    cache.fill(local_capture(load_model(teacher), blocks, cache, bf16=False))
    folder = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert 30 < cache.disk_bytes() / blocks.ids.size <= 40
    assert folder - cache.disk_bytes() < 1000  # everything besides shards
    for vocab_size in (128_256, 151_936, 262_144):
        wide = form._replace(vocab_size=vocab_size)
        arrays = encoding.block_arrays(wide, zipf(16, vocab_size), np.ones(16, bool), (0,))
        assert sum(array.nbytes for array in arrays.values()) / 16 <= 40.25  # the threshold is for 16 tokens here
