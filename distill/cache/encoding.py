"""The forms in which the teacher's words are stored: what each can serve, what is kept of it, how it is packed.

`topk` keeps the likeliest tokens with their log-probabilities; the mass of the rest follows from them. Cheap to
read and biased: what the tail is made of is lost, and a student taught by it alone is over-confident.

`sampled` is an unbiased sparse estimate (Sparse Logit Sampling, Anshumann et al., arXiv 2503.16870). There, tokens
are drawn with replacement and counted; here a token of probability p is kept with probability min(1, p / t) and
weighs max(p, t): the same estimate on average, and none of its noise where p is above t. The threshold t is a
block's own, such that it keeps `samples` tokens a position on average: more where the teacher is undecided, one or
two where it is sure. The draws are systematic (Madow, 1949): each position keeps its share of them, give or take one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.distill.recipe.cache_form import Form

if TYPE_CHECKING:
    import torch


# A position keeps at most this many times `samples` tokens.
MAX_SIZE_FACTOR = 8


# --- what a block's arrays hold


def topk_arrays(form: Form, ids: np.ndarray, logprobs: np.ndarray) -> dict[str, np.ndarray]:
    """The likeliest tokens and their log-probabilities, (..., k) each, as they are stored."""
    id_type = np.uint16 if form.vocab_size <= 2**16 else np.uint32
    return {"ids": ids.astype(id_type), "logprobs": logprobs.astype(np.float16)}


def block_arrays(
    form: Form, logits: torch.Tensor, target_mask: np.ndarray, seed: Sequence[int]
) -> dict[str, np.ndarray]:
    """What is stored of one block.

    Args:
        logits: (T, vocab_size) float.
        target_mask: (T,) bool: the positions whose next token is to be predicted; `sampled` spends nothing on others.
        seed: of the draws.
    """
    logits = logits.float() if form.temperature == 1.0 else logits.float() / form.temperature
    if form.kind == "topk":
        values, ids = logits.topk(form.size, dim=-1)
        values = values - logits.logsumexp(-1, keepdim=True)
        return topk_arrays(form, ids.cpu().numpy(), values.cpu().numpy())
    return _sampled_arrays(form, logits, target_mask, np.random.default_rng(seed))


def shard_arrays(blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Blocks one after another: `entries` end to end, all else with an axis for the blocks before its own."""
    return {
        name: np.concatenate([block[name] for block in blocks])
        if name == "entries"
        else np.stack([block[name] for block in blocks])
        for name in blocks[0]
    }


def batch(form: Form | None, blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stored blocks as a batch, by the names of `objectives.TopK` or `objectives.Samples`.

    Args:
        form: None for arrays (T, ...) by other names, which come back as they are, with an axis for the blocks.

    Returns:
        Whole numbers as int64, others as float32.
    """
    import torch

    arrays = _samples(form, blocks) if form is not None and form.kind == "sampled" else shard_arrays(blocks)
    wide = {"f": np.float32, "u": np.int64, "i": np.int64}
    return {name: torch.from_numpy(np.asarray(a, wide.get(a.dtype.kind, a.dtype))) for name, a in arrays.items()}


# --- the sampled form


def _sampled_arrays(
    form: Form, logits: torch.Tensor, target_mask: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    import torch

    places = np.flatnonzero(target_mask)
    entropy, sizes = np.zeros(len(target_mask), np.float16), np.zeros(len(target_mask), _size_type(form))
    entries, threshold = np.zeros((0, form.entry_bytes), np.uint8), 1.0
    if len(places):
        logprobs = logits[torch.from_numpy(places).to(logits.device)].log_softmax(-1)
        probs = logprobs.exp()
        entropy[places] = -torch.einsum("tv,tv->t", probs, logprobs).cpu().numpy()
        positions, ids, kept, threshold = _draw(form, probs, rng)
        sizes[places] = np.bincount(positions, minlength=len(places))
        words = ids.astype(np.uint32) | _codes(kept, threshold, form.levels, rng) << np.uint32(form.id_bits)
        entries = words.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : form.entry_bytes]
    return {"entries": entries, "sizes": sizes, "threshold": np.asarray(threshold, np.float32), "entropy": entropy}


def _size_type(form: Form) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if MAX_SIZE_FACTOR * form.size + 1 < 2**8 else np.uint32


def _draw(
    form: Form, probs: torch.Tensor, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Draw `form.size` tokens a position on average from probs (T, vocab_size), which are changed.

    Returns:
        The tokens in the order of positions: the position of each (E,), its id and its probability, or the
        threshold where that is more; and the threshold.
    """
    import torch

    floor = 1 / (MAX_SIZE_FACTOR * form.size)
    likely = (probs >= floor).nonzero()
    values = probs[likely[:, 0], likely[:, 1]]
    t = max(
        floor, _threshold(values.double().cpu().numpy(), float(probs.sum(-1).double().sum()), len(probs) * form.size)
    )
    certain = values >= t
    likely, values = likely[certain], values[certain]
    probs[likely[:, 0], likely[:, 1]] = 0.0
    # Equally spaced points on a line on which each of the other tokens is a stretch as long as its chance p / t.
    within = probs.cumsum(-1)
    ends = within[:, -1].double().cpu().numpy().cumsum() / t
    points = np.arange(1, int(ends[-1] + (start := rng.random())) + 1) - start
    rows = np.minimum(np.searchsorted(ends, points), len(ends) - 1)
    counts = np.bincount(rows, minlength=len(ends))
    # Below what any token has: the first that has something is meant by it.
    wanted = np.full((len(ends), max(1, int(counts.max()))), np.finfo(np.float32).tiny, np.float32)
    filled = np.arange(wanted.shape[1]) < counts[:, None]
    wanted[filled] = np.maximum((points - np.append(0.0, ends)[rows]) * t, np.finfo(np.float32).tiny)
    asked = torch.minimum(torch.from_numpy(wanted).to(probs.device), within[:, -1:])
    drawn = torch.searchsorted(within, asked).cpu().numpy()[filled]
    positions = np.concatenate([likely[:, 0].cpu().numpy(), rows])
    order = np.argsort(positions, kind="stable")
    ids = np.concatenate([likely[:, 1].cpu().numpy(), drawn])
    kept = np.concatenate([values.double().cpu().numpy(), np.full(len(rows), t)])
    return positions[order], ids[order], kept[order], t


def _threshold(likely: np.ndarray, total: float, budget: int) -> float:
    """The t at which sum(min(1, p / t)) is `budget`; 0 where it is less than the least of `likely`.

    Args:
        likely: the greatest of the probabilities, in any order.
        total: the sum of all.
    """
    greatest = np.sort(likely)[::-1]
    whole = np.arange(min(len(greatest), budget - 1) + 1)  # so many are kept for certain
    rest = total - np.append(0.0, np.cumsum(greatest))[whole]
    thresholds = rest / (budget - whole)
    fits = np.append(greatest, 0.0)[whole] < thresholds
    return float(thresholds[np.argmax(fits)]) if fits.any() else 0.0


def _codes(probs: np.ndarray, t: float, levels: int, rng: np.random.Generator) -> np.ndarray:
    """Weights as levels from t to 1, evenly spaced on a logarithmic scale: (E,) -> (E,) uint32.

    Which of the two levels beside a probability is taken is drawn, such that on average it is the probability.
    """
    exact = np.clip(probs, t, 1.0)
    below = np.clip(np.floor((1 - np.log(exact) / np.log(t)) * (levels - 1)), 0, levels - 2)
    low, high = (t ** (1 - (below + step) / (levels - 1)) for step in (0, 1))
    return (below + (rng.random(len(exact)) < (exact - low) / (high - low))).astype(np.uint32)


def _samples(form: Form, blocks: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields of `objectives.Samples`, padded to the position with the most tokens, to a multiple of 8."""
    entries = np.concatenate([block["entries"] for block in blocks])
    sizes = np.stack([block["sizes"] for block in blocks]).astype(np.int64)
    words = np.zeros((len(entries), 4), dtype=np.uint8)
    words[:, : form.entry_bytes] = entries
    words = words.view("<u4")[:, 0]
    codes = (words >> form.id_bits).astype(np.float32)
    log_t = np.log([block["threshold"] for block in blocks], dtype=np.float32)
    weights = np.exp(np.repeat(log_t, sizes.sum(-1)) * (1 - codes / np.float32(form.levels - 1)))
    shape = (*sizes.shape, -(-max(1, int(sizes.max())) // 8) * 8)
    filled = np.arange(shape[-1]) < sizes[..., None]
    ids, padded = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    ids[filled] = words & (2**form.id_bits - 1)
    padded[filled] = weights
    return {"ids": ids, "weights": padded, "entropy": np.stack([block["entropy"] for block in blocks])}
